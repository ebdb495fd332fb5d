"""Gathers and adds tensors across ranks, eagerly or as differentiable operations.

The message of a rank that skipped a layer never pairs with those of others: all ranks raise, and name the
layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    if members_as_before(ranks, label) == 1:
        return packet.detach().clone()[None]
    return exchange_of(ranks, packet.device).run("gather", packet.detach(), label, ranks.call)


def add(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """Return the sum of the packets of all ranks, with the same bits on each rank.

    Args, Raises: as `gather`.

    Returns:
        a tensor of its own, of the packet's shape.
    """
    if members_as_before(ranks, label) == 1:
        return packet.detach().clone()
    return exchange_of(ranks, packet.device).run("add", packet.detach(), label, ranks.call)


def differentiable_gather(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """As `gather`, differentiable to any order: the gradient is this rank's row of the sum over ranks."""
    gathered: Tensor = _Gather.apply(packet, ranks, label)  # type: ignore[no-untyped-call]
    return gathered


def differentiable_add(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """As `add`, differentiable to any order: the gradient is the sum over ranks."""
    total: Tensor = _Add.apply(packet, ranks, label)  # type: ignore[no-untyped-call]
    return total


class _Collective(torch.autograd.Function):
    """(packet, ranks, label) -> Tensor, linear in the packet."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Ranks, str], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.ranks, ctx.label = inputs


class _Gather(_Collective):
    @staticmethod
    def forward(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
        return gather(packet, ranks, label)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = differentiable_add(gradient, ctx.ranks, f"{ctx.label}, gradient")
        return total[index_of(ctx.ranks)], None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return differentiable_gather(tangent, ctx.ranks, f"{ctx.label}, tangent")

    @staticmethod
    def vmap(
        info: Any,  # noqa: ARG004
        in_dims: tuple[int | None, None, None],
        packet: Tensor,
        ranks: Ranks,
        label: str,
    ) -> tuple[Tensor, int | None]:
        dim = in_dims[0]
        return differentiable_gather(packet, ranks, label), None if dim is None else dim + 1


class _Add(_Collective):
    @staticmethod
    def forward(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
        return add(packet, ranks, label)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return differentiable_add(gradient, ctx.ranks, f"{ctx.label}, gradient"), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return differentiable_add(tangent, ctx.ranks, f"{ctx.label}, tangent")

    @staticmethod
    def vmap(
        info: Any,  # noqa: ARG004
        in_dims: tuple[int | None, None, None],
        packet: Tensor,
        ranks: Ranks,
        label: str,
    ) -> tuple[Tensor, int | None]:
        return differentiable_add(packet, ranks, label), in_dims[0]
