"""Networks, the ways of checkpointing, and what steps of training give, for the tests of checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from tests.torch.twins import assert_identical, scramble

RENORM = batchnorm.Renorm(1.5, 0.5, r_steps=(2, 6), d_steps=(2, 6))
POLICIES = {
    "batch": {},
    "average": {"momentum": None},
    "ghost": {"statistics": batchnorm.Ghost(3)},
    "sequential": {"statistics": batchnorm.Ghost(2, sequential=True)},
    "renorm": {"statistics": RENORM},
    "synced-renorm": {"statistics": batchnorm.Synced(over=RENORM)},
    "running": {"statistics": batchnorm.Running()},
    "adapted": {"statistics": batchnorm.Adapted(4)},
    "untracked": {"track_running_stats": False},
    "lenient": {"small_batch": "running"},
    "lenient-ghost": {"small_batch": "running", "statistics": batchnorm.Ghost(5)},
    "skip": {"nonfinite": "skip"},
    "skip-renorm": {"nonfinite": "skip", "statistics": RENORM},
}
Way = Callable[..., Any]
WAYS: dict[str, Way] = {
    "reentrant": lambda f, *a: checkpoint(f, *a, use_reentrant=True),
    "not": lambda f, *a: checkpoint(f, *a, use_reentrant=False),
    "nested-reentrant": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=True), *a, use_reentrant=True
    ),
    "nested": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=False), *a, use_reentrant=False
    ),
    "mixed": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=True), *a, use_reentrant=False
    ),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
each_way = pytest.mark.parametrize("way", [WAYS["reentrant"], WAYS["not"]], ids=["reentrant", "not"])


def plainly(f: Way, *a: Any) -> Any:
    return f(*a)


class Net(nn.Module):
    """Norms that are called once, twice, with a residual, and with a mask of their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)])
        self.first = scramble(batchnorm.BatchNorm2d(4, **options, activation="silu"))
        self.shared = scramble(batchnorm.BatchNorm2d(4, **options))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.first(self.convs[0](x), None, mask)
        y = self.shared(self.convs[1](y), x, mask)
        return self.shared(self.convs[2](y), None, mask)


def made(options: dict[str, Any], make: Callable[..., nn.Module] = Net) -> nn.Module:
    torch.manual_seed(3)
    return make(**options)


def batches(count: int = 3, samples: int = 7) -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(samples, 4, 5, 4) * (k + 1) + k for k in range(count)]


def trained(
    net: nn.Module, way: Way, inputs: list[Tensor], masks: list[Tensor] | None = None, steps: int = 2
) -> dict[str, Tensor]:
    """Return outputs, gradients and state after steps of several forwards and then their backwards."""
    torch.manual_seed(5)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = [
            way(net, leaf) if masks is None else way(net, leaf, mask)
            for leaf, mask in zip(leaves, masks or leaves, strict=True)
        ]
        found |= differentiated(net, leaves, outputs, f"of step {step}")
    return found


def differentiated(
    net: nn.Module, leaves: list[Tensor], outputs: list[Tensor], what: str = ""
) -> dict[str, Tensor]:
    """Return outputs, gradients and buffers; a backward for each output, as sums depend on their order."""
    found: dict[str, Tensor] = {}
    for k, (leaf, y) in enumerate(zip(leaves, outputs, strict=True)):
        net.zero_grad()
        y.backward(torch.randn_like(y))
        found |= {f"y{k} {what}": y.detach(), f"dx{k} {what}": leaf.grad}
        found |= {f"d{n} {k} {what}": p.grad for n, p in net.named_parameters()}
    return found | {f"{n} {what}": b.clone() for n, b in net.named_buffers()}  # `skipped` too


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """NaN equals itself here."""
    zeroed = [{n: torch.where(t.isnan(), 1e30, t) for n, t in both.items()} for both in (found, expected)]
    assert_identical(*zeroed)
