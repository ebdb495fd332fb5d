"""Gathers and adds tensors across ranks, eagerly or as differentiable operations.

The message of a rank that skipped a layer never pairs with those of others: all ranks raise, and name the
layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .exchange import Operation
from .process_groups import (
    Ranks,
    exchange_of,
    index_of,
    members,
    members_as_before,
    numbered,
    sharing_ranks,
    timeout_of,
)

__all__ = [
    "Ranks",
    "add",
    "differentiable_add",
    "differentiable_gather",
    "gather",
    "members",
    "numbered",
    "sharing_ranks",
    "timeout_of",
]


def gather(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """Return the packets of all ranks in the order of the ranks, with the same bits on each rank.

    Args:
        packet: any shape, the same on all ranks; float64, or on CPUs any dtype.
        ranks: the ranks that take part.
        label: identifies the sender, such as `features.3 (BatchNorm2d) forward`.

    Returns:
        `[R, *packet.shape]`, a tensor of its own.

    Raises:
        RankError: a rank is missing after the timeout, or sent the packet of another layer or of another
            call; or the number of ranks differs from that of the forward.
        OptionError: this process is not in the group.
    """
    return _run("gather", packet, ranks, label)


def add(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """Return the sum of the packets of all ranks, with the same bits on each rank.

    Args, Raises: as `gather`.

    Returns:
        a tensor of its own, of the packet's shape.
    """
    return _run("add", packet, ranks, label)


def _run(operation: Operation, packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    if members_as_before(ranks, label) == 1:
        alone = packet.detach().clone()
        return alone[None] if operation == "gather" else alone
    return exchange_of(ranks, packet.device).run(operation, packet.detach(), label, ranks.call)


def differentiable_gather(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """As `gather`, differentiable to any order: the gradient is this rank's row of the sum over ranks."""
    return _differentiable(packet, ranks, label, "gather")


def differentiable_add(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """As `add`, differentiable to any order: the gradient is the sum over ranks."""
    return _differentiable(packet, ranks, label, "add")


def _differentiable(packet: Tensor, ranks: Ranks, label: str, operation: Operation) -> Tensor:
    found: Tensor = _Collective.apply(packet, ranks, label, operation)  # type: ignore[no-untyped-call]
    return found


class _Collective(torch.autograd.Function):
    """(packet, ranks, label, operation) -> Tensor, linear in the packet."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.ranks, ctx.label, ctx.operation = inputs

    @staticmethod
    def forward(packet: Tensor, ranks: Ranks, label: str, operation: Operation) -> Tensor:
        return _run(operation, packet, ranks, label)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total = differentiable_add(gradient, ctx.ranks, f"{ctx.label}, gradient")
        return total[index_of(ctx.ranks)] if ctx.operation == "gather" else total, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _differentiable(tangent, ctx.ranks, f"{ctx.label}, tangent", ctx.operation)

    @staticmethod
    def vmap(
        info: Any,  # noqa: ARG004
        in_dims: tuple[int | None, ...],
        packet: Tensor,
        ranks: Ranks,
        label: str,
        operation: Operation,
    ) -> tuple[Tensor, int | None]:
        dim, is_gather = in_dims[0], operation == "gather"
        found = _differentiable(packet, ranks, label, operation)
        return found, dim + 1 if is_gather and dim is not None else dim
