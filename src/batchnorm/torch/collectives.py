"""Numbers of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    group: tuple[int, ...] | None
    timeout: float


_G = {}


def _group(ranks):
    if ranks.group is None:
        return None
    if ranks.group not in _G:
        _G[ranks.group] = dist.new_group(list(ranks.group), use_local_synchronization=True)
    return _G[ranks.group]


def members(ranks: Ranks) -> int:
    if not dist.is_initialized():
        return 1
    return dist.get_world_size() if ranks.group is None else len(ranks.group)


def gather(packet: Any, ranks: Ranks, label: str) -> Any:
    out = [torch.empty_like(packet) for _ in range(members(ranks))]
    dist.all_gather(out, packet.contiguous(), group=_group(ranks))
    return torch.stack(out)


def add(packet, ranks, label):
    out = packet.clone()
    dist.all_reduce(out, group=_group(ranks))
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packet, ranks, label):
        ctx.s = ranks, label
        return gather(packet, ranks, label)

    @staticmethod
    def backward(ctx, dy):
        me = dist.get_rank() if ctx.s[0].group is None else ctx.s[0].group.index(dist.get_rank())
        return differentiable_add(dy, *ctx.s)[me], None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packet, ranks, label):
        ctx.s = ranks, label
        return add(packet, ranks, label)

    @staticmethod
    def backward(ctx, dy):
        return differentiable_add(dy, *ctx.s), None, None


differentiable_gather = _Gather.apply
differentiable_add = _Add.apply
