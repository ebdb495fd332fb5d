"""Policies and masks under `torch.compile`: one graph, and what the eager call computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.statistics.policy import Policy
from tests.torch.twins import TOLERANCES, assert_same, scramble, step

CALLS = {
    "batch": (batchnorm.Batch(), True),
    "ghost": (batchnorm.Ghost(3), True),
    "ghost-sequential": (batchnorm.Ghost(2, sequential=True), True),
    "renorm": (batchnorm.Renorm(1.5, 0.5, (2, 9), (0, 0)), True),
    "running": (batchnorm.Running(), True),
    "adapted": (batchnorm.Adapted(2.0), False),
    "synced": (batchnorm.Synced(over=batchnorm.Renorm(1.5, 0.5, (0, 0), (0, 9))), True),
}
EVERY_CALL = pytest.mark.parametrize(("policy", "training"), CALLS.values(), ids=CALLS)


pytestmark = pytest.mark.usefixtures("no_earlier_graphs")


def made(**options: Any) -> nn.Module:
    return scramble(batchnorm.BatchNorm1d(5, **options))


def stepped(layer: nn.Module, *tensors: Tensor, **masks: Tensor | None) -> dict[str, Tensor | None]:
    """Return output, gradients, state and the counter that is no part of it."""
    return step(layer, *tensors, **masks) | {"skipped": layer.skipped}


SMOOTH, SKIPS = {"activation": "silu"}, {"momentum": None, "nonfinite": "skip"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("masks", "options"), [("none", SKIPS), ("mask", SMOOTH), ("mask", SKIPS), ("lengths", SMOOTH)], ids=str
)
@EVERY_CALL
def test_row_28_compiled_is_eager(
    policy: Policy, training: bool, masks: str, options: dict[str, Any]
) -> None:
    """Row 28: output, gradients, running statistics and counters, over two steps of a full graph."""
    eager = made(statistics=policy, small_batch="running", **options).train(training)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        x, dy, residual = (torch.randn(8, 5, 7) + 1 for _ in range(3))
        chosen = {
            "none": {},
            "mask": {"mask": torch.rand(8, 7) > 0.4},
            "lengths": {"lengths": torch.randint(0, 8, (8,))},
        }[masks]
        found, expected = (stepped(model, x, dy, residual, **chosen) for model in (compiled, eager))
        assert_same(found, expected, TOLERANCES[torch.float32])


@pytest.mark.one_in(5)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize(
    "policy",
    [batchnorm.Ghost(4), batchnorm.Ghost(4, sequential=True), batchnorm.Renorm(2, 2, (0, 0), (0, 0))],
    ids=str,
)
def test_row_21_and_28_few_graphs_for_all_batch_sizes(policy: Policy, masked: bool) -> None:
    """Rows 21 and 28: as many ghost batches as a batch has, tails included."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    eager = made(statistics=policy)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend=backend, fullgraph=True, dynamic=True)
    for samples in (8, 10, 6, 7, 9) if policy.is_sequential else (8, 10, 6, 14, 31):
        x, dy, residual = (torch.randn(samples, 5, 7) for _ in range(3))
        mask = torch.rand(samples, 7) > 0.4 if masked else None
        found, expected = (stepped(model, x, dy, residual, mask=mask) for model in (compiled, eager))
        assert_same(found, expected, TOLERANCES[torch.float32])
    # With a tail or without; a sequence is unrolled, so that there is one for each number of ghost batches.
    most = {"ghost": 3 if policy.is_sequential else 2, "renorm": 1}[policy.name]
    assert len(graphs) <= most


@pytest.mark.one_in(2)
@EVERY_CALL
def test_row_28_other_policies_and_options_are_noticed(policy: Policy, training: bool) -> None:
    """Row 28: what is set on a compiled layer holds from the next call on."""
    eager = made().train(training)
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="aot_eager", fullgraph=True)
    x, dy, residual = (torch.randn(8, 5, 7) + 1 for _ in range(3))
    for chosen, nonfinite in ((batchnorm.Batch(), "propagate"), (policy, "propagate"), (policy, "skip")):
        for model in (compiled, eager):
            model.statistics, model.nonfinite = chosen, nonfinite
        found, expected = (stepped(model, x, dy, residual) for model in (compiled, eager))
        assert_same(found, expected, TOLERANCES[torch.float32])
