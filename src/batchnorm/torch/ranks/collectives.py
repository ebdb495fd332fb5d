"""Numbers of all ranks: one collective each, eagerly or as differentiable operations.

The message of a rank that skipped a layer never pairs with those of others: all raise, and name the layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .process_groups import Ranks, index_of, members, members_as_before, numbered, sharing, sharing_ranks

__all__ = [
    "Ranks",
    "add",
    "differentiable_add",
    "differentiable_gather",
    "gather",
    "members",
    "numbered",
    "sharing_ranks",
]


def gather(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """Return the packets of all ranks, in their order: the same bits on each.

    Args:
        packet: any shape, the same on all ranks; float64 (elsewhere than on CPUs; there, any dtype).
        ranks: who takes part.
        label: what identifies the sender, such as `features.3 (BatchNorm2d) forward`.

    Returns:
        `[R, *packet.shape]`, a tensor of its own.

    Raises:
        RankError: a rank is missing after the timeout, or sent another layer's packet or that of
            another call of the same; or there are not as many ranks as there were in the forward.
        OptionError: this process is not one of the group.
    """
    if members_as_before(ranks, label) == 1:
        return packet.detach().clone()[None]
    return sharing(ranks, packet.device).exchange("gather", packet.detach(), label, ranks.call)


def add(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """Return the sum of the packets of all ranks: the same bits on each.

    Args, Raises: as `gather`.

    Returns:
        of the packet's shape, a tensor of its own.
    """
    if members_as_before(ranks, label) == 1:
        return packet.detach().clone()
    return sharing(ranks, packet.device).exchange("add", packet.detach(), label, ranks.call)


def differentiable_gather(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """As `gather`; its gradient is this rank's row of the ranks' sum, to any order."""
    gathered: Tensor = _Gather.apply(packet, ranks, label)  # type: ignore[no-untyped-call]
    return gathered


def differentiable_add(packet: Tensor, ranks: Ranks, label: str) -> Tensor:
    """As `add`; its gradient is the ranks' sum, to any order."""
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
