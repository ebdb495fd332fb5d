"""Row 56: the first update of the running statistics takes the batch's own, not mixed with 0 and 1."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import kernels, reference
from batchnorm.errors import OptionError
from batchnorm.statistics.policy import Policy
from tests.support.compare import as_array, assert_close
from tests.support.covering import covering_array
from tests.support.interpreted import DEVICE, HAS_TRITON
from tests.torch.test_trouble import Unread, call
from tests.torch.twins import assert_identical, assert_same, scramble, state

POLICIES: dict[str, Policy] = {
    "batch": batchnorm.Batch(),
    "ghost": batchnorm.Ghost(4),
    "sequential": batchnorm.Ghost(4, sequential=True),
    "synced": batchnorm.Synced(),
    "renorm": batchnorm.Renorm(1.5, 0.5, (0, 9), (0, 0)),
    "adapted": batchnorm.Adapted(3.0),
}
PATHS = ["cpu", "eager", "compiled", "transformed", *(["gpu"] if HAS_TRITON else [])]
MOMENTUM = 0.3


def layer_of(**options: Any) -> nn.Module:
    """Return a new layer, whose running statistics are the initial ones."""
    return batchnorm.BatchNorm2d(5, momentum=MOMENTUM, warm_start=True, **options)


def batches(number: int = 3) -> list[Tensor]:
    return [torch.randn(10, 5, 3, 4) * (k + 1) + 3 - k for k in range(number)]


def groups_of(x: Tensor, mask: Tensor | None, policy: Policy) -> list[reference.Normalized]:
    """Return the reference's moments of each part of a batch that moves the running statistics by itself."""
    size = 4 if policy.is_sequential else len(x)
    counts = [None] * len(x) if mask is None else mask.split(size)
    parts = zip(x.split(size), counts, strict=False)
    return [reference.forward(as_array(x), mask=None if m is None else m.numpy()) for x, m in parts]


def expected(layer: nn.Module, parts: list[reference.Normalized], running: reference.Running | None) -> Any:
    """Return the running statistics after these parts; None = no batch has come before."""
    for part in parts:
        start = reference.Running(as_array(layer.running_mean), as_array(layer.running_var))
        running = reference.update_running_torch(
            running or start,
            part.mean[0],
            part.var[0],
            float(part.count[0]),
            momentum=MOMENTUM if running else 1.0,
            batches=0,
        )
    return running


def assert_moved(layer: nn.Module, running: Any, number: int) -> None:
    assert_close(layer.running_mean.cpu(), running.mean, dtype=torch.float32, what="running_mean")
    assert_close(layer.running_var.cpu(), running.var, dtype=torch.float32, what="running_var")
    assert layer.num_batches_tracked == number


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("policy", "path", "masked"), covering_array([*POLICIES], PATHS, [False, True]), ids=str
)
def test_row_56_the_first_update_is_the_batch_and_later_ones_mix(
    policy: str, path: str, masked: bool
) -> None:
    """Row 56: against the reference with momentum 1, on every path, by every policy."""
    layer = layer_of(statistics=POLICIES[policy])
    running = None
    where = DEVICE if path == "gpu" else "cpu"
    for k, x in enumerate(batches()):
        mask = torch.rand(10, 3, 4) > 0.3 if masked else None
        parts = groups_of(x, mask, POLICIES[policy])
        running = expected(layer, parts, running)
        call(layer.to(where), path, x.to(where), None if mask is None else mask.to(where))
        assert_moved(layer, running, (k + 1) * len(parts))


def test_row_56_without_it_the_initial_values_stay_in() -> None:
    """Row 56: what is mended."""
    layer, (x, *_) = layer_of(), batches()
    layer.warm_start = False
    layer(x)
    mean = x.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, MOMENTUM * mean)


def test_a_layer_that_began_runs_its_prepared_call() -> None:
    """Outputs and statistics are then bit for bit those of a layer without the option; until it is reset."""
    layer, (first, *others) = layer_of(), batches()
    layer(first)
    twin = batchnorm.BatchNorm2d(5, momentum=MOMENTUM)
    twin.load_state_dict(layer.state_dict())
    for x in others:
        assert torch.equal(layer(x), twin(x))
        assert layer._plain is not None
        assert_identical(state(layer), state(twin))
    layer.reset_running_stats()
    layer(others[0])
    assert_moved(layer, expected(layer, groups_of(others[0], None, layer.statistics), None), 1)


def test_loaded_statistics_count_as_begun() -> None:
    """Whatever their count says: files of torch < 0.4.1 have none."""
    stock = scramble(nn.BatchNorm2d(5, momentum=MOMENTUM))
    stock.num_batches_tracked.zero_()
    layer, (x, *_) = layer_of(), batches()
    assert list(layer.state_dict()) == list(stock.state_dict())
    layer.load_state_dict(stock.state_dict())
    layer(x)
    stock(x)
    assert_same(state(layer), state(stock), (4e-6, 4e-6))


def test_each_channel_begins_by_itself() -> None:
    layer, (x, *_) = layer_of(), batches()
    layer.running_mean[2], layer.running_var[1] = 0.25, 3.0
    layer(x)
    share = torch.tensor([1, MOMENTUM, MOMENTUM, 1, 1])
    old = torch.tensor([0, 0, 0.25, 0, 0])
    torch.testing.assert_close(layer.running_mean, (1 - share) * old + share * x.mean((0, 2, 3)))


@pytest.mark.parametrize("path", ["cpu", "eager", "compiled"])
def test_batches_that_move_nothing_begin_nothing(path: str) -> None:
    """A skipped batch, an empty one, and one that a mask leaves empty: the next begins the statistics."""
    layer, (x, *_) = layer_of(nonfinite="skip"), batches()
    bad = x.clone()
    bad[0, 0, 0, 0] = torch.inf
    nothing = torch.zeros(10, 3, 4, dtype=torch.bool)
    for given, mask in ((bad, None), (x[:0], None), (x, nothing), (x, None)):
        call(layer, path, given, mask)
    assert layer.skipped == 1
    assert_moved(layer, expected(layer, groups_of(x, None, layer.statistics), None), 3)


def test_an_empty_ghost_batch_begins_nothing() -> None:
    layer, (x, *_) = layer_of(statistics=batchnorm.Ghost(4, sequential=True)), batches()
    mask = torch.ones(10, 3, 4, dtype=torch.bool)
    mask[:4] = False
    layer(x, mask=mask)
    assert_moved(layer, expected(layer, groups_of(x[4:], None, layer.statistics), None), 3)


def test_accumulated_micro_batches_begin_as_one() -> None:
    layer, parts = layer_of(), batches(4)
    running = None
    with batchnorm.accumulate(layer, 2):
        for pair in (parts[:2], parts[2:]):
            running = expected(layer, groups_of(torch.cat(pair), None, batchnorm.Batch()), running)
            for x in pair:
                layer(x)
    assert_moved(layer, running, 2)


def test_each_domain_begins_by_itself() -> None:
    layer, (x, other, _) = layer_of(domains=2), batches()
    layer(x)
    with batchnorm.domain(layer, 1):
        layer(other)
        assert_moved(layer, expected(layer, groups_of(other, None, batchnorm.Batch()), None), 1)
    assert_moved(layer, expected(layer, groups_of(x, None, batchnorm.Batch()), None), 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_begins_nothing(reentrant: bool) -> None:
    layer, (x, *_) = layer_of(), batches()
    y = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
    after = state(layer)
    y.backward(torch.randn_like(y))
    assert_identical(state(layer), after)
    assert_moved(layer, expected(layer, groups_of(x, None, batchnorm.Batch()), None), 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_does_not_wait_for_a_device(policy: str) -> None:
    """Operations on tensors decide, whatever a step finds: a CUDA graph can hold it."""
    layer = layer_of(statistics=POLICIES[policy])
    running = None
    for x in batches():
        parts = groups_of(x, None, layer.statistics)
        running = expected(layer, parts, running)
        with kernels.use("eager"), Unread():
            layer(x)
    assert_moved(layer, running, 3 * len(parts))


def test_it_exports_in_training() -> None:
    """Both the first step of the exported program and the second are those of the layer."""
    layer, (x, other, _) = layer_of(), batches()
    program = torch.export.export(copy.deepcopy(layer), (x,)).module()
    for given in (x, other):
        torch.testing.assert_close(program(given), layer(given))
        assert_same(state(program), state(layer), (4e-6, 4e-6))


def test_copies_files_and_verbs_keep_it() -> None:
    for other in (copy.deepcopy(layer_of()), pickle.loads(pickle.dumps(layer_of()))):
        assert other.warm_start
    assert "warm_start=True" in repr(layer_of())
    assert batchnorm.SyncBatchNorm(5, warm_start=True).warm_start
    model = batchnorm.convert(nn.Sequential(nn.Conv2d(3, 5, 1), nn.LazyBatchNorm2d()), warm_start=True)
    x = torch.randn(4, 3, 5, 5)
    model(x)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)))
    assert batchnorm.inspect(model).rows[0].policy == "batch, warm_start=True"
    with pytest.raises(OptionError, match=r"warm_start=True.*layer.warm_start = False first"):
        batchnorm.revert(model)
    model[1].warm_start = False
    assert type(batchnorm.revert(model)[1]) is nn.BatchNorm2d
    assert "_warm_start" not in vars(model[1])


def test_wrong_values_are_refused_and_change_nothing() -> None:
    with pytest.raises(OptionError, match=r"^BatchNorm2d: warm_start must be True or False; got 1"):
        batchnorm.BatchNorm2d(5, warm_start=1)
    with pytest.raises(OptionError, match=r"warm_start=True begins .*track_running_stats=True"):
        batchnorm.BatchNorm2d(5, track_running_stats=False, warm_start=True)
    model = nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5, track_running_stats=False))
    with pytest.raises(OptionError, match=r"^1 \(torch.nn.BatchNorm2d\): warm_start=True"):
        batchnorm.convert(model, warm_start=True)
    assert type(model[0]) is nn.BatchNorm2d


def test_the_doctor_finds_no_initial_values_in_it() -> None:
    layer, (x, *_) = layer_of(), batches()
    layer(x)
    model = nn.Sequential(layer)
    assert "prior" not in {finding.check for finding in batchnorm.diagnose(model).findings}
    layer.warm_start = False
    layer.running_var.fill_(1.5)
    assert "prior" in {finding.check for finding in batchnorm.diagnose(model).findings}
