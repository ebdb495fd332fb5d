"""Row 43: `batchnorm.domain(model, ids)`, a domain for each sample of a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import kernels
from batchnorm.errors import InputShapeError, InputTypeError, NonFiniteError, OptionError
from tests.support.covering import covering_array
from tests.torch.test_domains import POLICIES, layer_of
from tests.torch.twins import TOLERANCES, assert_identical, assert_same, scramble, state, step

IDS = torch.tensor([2, 0, 2, 2, 0, 0, 2])  # none of domain 1


def data(samples: int = 7) -> list[Tensor]:
    return [torch.randn(samples, 4, 3, 5) + number for number in range(3)]


def per_domain(layer: nn.Module, ids: Tensor, x: Tensor, dy: Tensor, *others: Tensor) -> dict[str, Any]:
    """Return what one forward and backward per domain give, put together; the layer moves."""
    found: dict[str, Any] = {"y": torch.empty_like(x), "dx": torch.empty_like(x), "dweight": 0, "dbias": 0}
    if others:
        found["dresidual"] = torch.empty_like(x)
    for k in sorted(set(ids.tolist())):
        here = ids == k
        with batchnorm.domain(layer, k):
            part = step(layer, x[here], dy[here], *(other[here] for other in others))
        for name, values in found.items():
            if isinstance(values, Tensor) and values.dim() > 1:
                values[here] = part[name]
            else:
                found[name] = values + part[name]
    return found | state(layer)


@pytest.mark.parametrize(
    ("policy", "engine", "training", "residual"),
    covering_array([*POLICIES], ["cpu", "eager"], [True, False], [True, False]),
    ids=str,
)
def test_row_43_as_a_call_for_each_domain(policy: str, engine: str, training: bool, residual: bool) -> None:
    """Row 43: output, gradients and statistics; those of a domain without samples stay."""
    layer = layer_of(statistics=POLICIES[policy], activation="silu").train(training)
    twin = copy.deepcopy(layer)
    given = data() if residual else data()[:2]
    with kernels.use(engine):
        with batchnorm.domain(layer, IDS):
            found = step(layer, given[0], given[1], *given[2:])
        expected = per_domain(twin, IDS, given[0], given[1], *given[2:])
    for name in ("dweight", "dbias"):  # the sum of two, added in another order
        torch.testing.assert_close(found.pop(name), expected.pop(name), rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_row_43_with_masks_of_the_call_and_of_the_context() -> None:
    """Row 43: each sample has its own."""
    mask = torch.rand(7, 3, 5) > 0.4
    outputs = []
    for way in ("call", "context", "apart"):
        torch.manual_seed(1)
        layer, (x, *_) = layer_of(), data()
        if way == "call":
            with batchnorm.domain(layer, IDS):
                y = layer(x, mask=mask)
        elif way == "context":
            with batchnorm.domain(layer, IDS), batchnorm.mask(layer, mask):
                y = layer(x)
        else:
            y = torch.empty_like(x)
            for k in (0, 2):
                with batchnorm.domain(layer, k):
                    y[IDS.eq(k)] = layer(x[IDS.eq(k)], mask=mask[IDS.eq(k)])
        outputs.append({"y": y.detach()} | state(layer))
    for found in outputs[:2]:
        assert_identical(found, outputs[2])


def test_one_domain_in_the_batch_is_as_by_its_number() -> None:
    layer, (x, *_) = layer_of(), data()
    twin = copy.deepcopy(layer)
    with batchnorm.domain(layer, torch.full([7], 1)), batchnorm.domain(twin, 1):
        assert torch.equal(layer(x), twin(x))
    assert_identical(state(layer), state(twin))


def test_of_nested_blocks_the_inner_one_holds() -> None:
    layer, (x, *_) = layer_of(), data()
    twin = copy.deepcopy(layer)
    with batchnorm.domain(layer, 1), batchnorm.domain(layer, IDS):
        y = layer(x)
        with batchnorm.domain(layer, 1):
            inside = layer(x)
    with batchnorm.domain(twin, IDS):
        assert torch.equal(twin(x), y)
    with batchnorm.domain(twin, 1):
        assert torch.equal(twin(x), inside)
    assert_identical(state(layer), state(twin))
    assert "_scope" not in vars(layer)
    assert "_domain" not in vars(layer)


def test_the_ids_are_read_once_and_no_samples_are_a_batch_too() -> None:
    layer, (x, *_), ids = layer_of(), data(), IDS.clone()
    twin = copy.deepcopy(layer)
    with batchnorm.domain(layer, ids):
        ids.zero_()
        y = layer(x)
    with batchnorm.domain(twin, IDS):
        assert torch.equal(twin(x), y)
    with batchnorm.domain(layer, ids[:0]):
        assert layer(x[:0]).shape == (0, 4, 3, 5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_has_its_domains(reentrant: bool) -> None:
    """Though the backward is outside of the block, and another block came after."""
    layer, (x, dy, other) = layer_of(statistics=POLICIES["renorm"], activation="silu"), data()
    plain = copy.deepcopy(layer)
    found = []
    for one, way in ((layer, True), (plain, False)):
        leaf = x.clone().requires_grad_()
        with batchnorm.domain(one, IDS):
            y = checkpoint(one, leaf, use_reentrant=reentrant) if way else one(leaf)
        with batchnorm.domain(one, 1):
            one(other)
        y.backward(dy)
        found.append({"dx": leaf.grad, "dweight": one.weight.grad, "dbias": one.bias.grad} | state(one))
    assert_identical(*found)


def test_accumulated_per_domain() -> None:
    layer, (x, other, _) = layer_of(), data()
    twin = copy.deepcopy(layer)
    with batchnorm.accumulate(layer, 2):
        for batch in (x, other):
            with batchnorm.domain(layer, IDS):
                layer(batch)
    for k in (0, 2):
        with batchnorm.accumulate(twin, 2), batchnorm.domain(twin, k):
            for batch in (x, other):
                twin(batch[IDS.eq(k)])
    assert_same(state(layer), state(twin), (1e-6, 1e-6))


@pytest.mark.parametrize("failing", ["too few", "nonfinite"])
def test_a_call_that_raises_has_moved_no_domain(failing: str) -> None:
    layer, (x, *_) = layer_of(nonfinite="raise"), data()
    before = state(layer)
    if failing == "too few":
        x, ids, error = x[..., :1, :1], torch.tensor([0, 0, 0, 0, 0, 0, 2]), InputShapeError
    else:
        ids, error = IDS, NonFiniteError
        x[0, 0, 0, 0] = torch.inf
    with pytest.raises(error, match=r"^BatchNorm2d: "), batchnorm.domain(layer, ids):
        layer(x)
    assert_identical(state(layer), before)


def test_synchronized_layers_have_one_too() -> None:
    """Every domain is called, as another rank may have samples of it: its batch is empty then, and counts."""
    layer, (x, *_) = layer_of(statistics=batchnorm.Synced()), data()
    twin, before = copy.deepcopy(layer), state(layer)
    with batchnorm.domain(layer, IDS):
        y = layer(x)
    twin.statistics = batchnorm.Batch()
    with batchnorm.domain(twin, IDS):
        torch.testing.assert_close(y, twin(x))
    after = state(layer)
    assert torch.equal(after["running_mean_1"], before["running_mean_1"])
    assert after["num_batches_tracked_1"] == before["num_batches_tracked_1"] + 1


def test_row_28_compiled() -> None:
    """Row 28: within one graph for each number of samples of each domain."""
    torch.compiler.reset()
    eager = layer_of()
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, backend="eager", fullgraph=True)
    for ids in (IDS, IDS.flip(0)):
        x, dy, _ = data()
        with batchnorm.domain(compiled, ids), batchnorm.domain(eager, ids):
            found, expected = step(run, x, dy), step(eager, x, dy)
        assert torch.equal(found["y"], expected["y"])
        assert_same(state(compiled), state(eager), TOLERANCES[torch.float32])
    torch.compiler.reset()


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(0, (-1, 4)), layer_of(2))
    before = state(model)
    with pytest.raises(OptionError, match=r"^2 \(.*BatchNorm2d\): domain must be 0 to 1, as it has 2; got 2"):
        batchnorm.domain(model, IDS).__enter__()
    with pytest.raises(OptionError, match="got -1"):
        batchnorm.domain(model, torch.tensor([0, -1])).__enter__()
    for wrong in (torch.ones(3), torch.tensor([True])):
        with pytest.raises(InputTypeError, match=r"tensor of integers, \[N\]; got torch\."):
            batchnorm.domain(model, wrong).__enter__()
    with pytest.raises(InputShapeError, match=r"one for each, \[N\]; got shape \[1, 3\]"):
        batchnorm.domain(model, torch.zeros(1, 3, dtype=torch.long)).__enter__()
    match = r"^2 \(BatchNorm2d\): batchnorm.domain: the ids are of 5 samples, and this layer's input has 7"
    with pytest.raises(InputShapeError, match=match), batchnorm.domain(model, torch.zeros(5, dtype=int)):
        model(data()[0])
    assert_identical(state(model), before)
    with batchnorm.domain(model, torch.zeros(7, dtype=int)):
        for verb in (batchnorm.fold, batchnorm.inspect, batchnorm.freeze, batchnorm.convert):
            with pytest.raises(
                OptionError, match=rf"^2 .*{verb.__name__} within batchnorm.domain\(model, ids\)"
            ):
                verb(model)
        with pytest.raises(OptionError, match=r"calibrate within batchnorm\.domain"):
            batchnorm.calibrate(model, data())
    assert_identical(state(model), before)


def test_a_model_with_layers_of_one_domain_too() -> None:
    model = nn.Sequential(layer_of(), nn.Conv2d(4, 4, 1), scramble(batchnorm.BatchNorm2d(4)))
    x, counts = data()[0], [int(model[2].num_batches_tracked)]
    with batchnorm.domain(model, IDS):
        model(x)
    assert int(model[2].num_batches_tracked) == counts[0] + 1
