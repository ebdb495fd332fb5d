"""`domains=` and `batchnorm.domain`: running statistics of several domains, one of which is in use."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import InputShapeError, OptionError
from tests.torch.twins import TOLERANCES, assert_identical, assert_same, scramble, state, step

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
POLICIES = {
    "batch": batchnorm.Batch(),
    "ghost": batchnorm.Ghost(3, sequential=True),
    "renorm": batchnorm.Renorm(1.5, 0.5, r_steps=(0, 0), d_steps=(0, 0)),
    "running": batchnorm.Running(),
    "adapted": batchnorm.Adapted(3),
}


def layer_of(domains: int = 3, channels: int = 4, **options: Any) -> nn.Module:
    """Return a layer whose domains have pasts of their own."""
    layer = scramble(batchnorm.BatchNorm2d(channels, domains=domains, **options))
    for k in range(1, domains):
        getattr(layer, f"running_mean_{k}").normal_()
        getattr(layer, f"running_var_{k}").uniform_(0.5, 2)
        getattr(layer, f"num_batches_tracked_{k}").fill_(3 + k)
    return layer


def alone(layer: nn.Module, k: int, **options: Any) -> nn.Module:
    """Return a layer of one domain with the parameters of a layer and the statistics of its domain `k`."""
    one = batchnorm.BatchNorm2d(layer.num_features, **options)
    end = f"_{k}" if k else ""
    state = layer.state_dict()
    one.load_state_dict({n: state[n] for n in ("weight", "bias")} | {n: state[n + end] for n in STATISTICS})
    return one


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_row_35_each_domain_is_a_layer_of_its_own_with_shared_parameters(policy: Any, training: bool) -> None:
    """Row 35: output, gradients and statistics, bit for bit, in any order of domains; the others stay."""
    options = {"statistics": policy, "activation": "silu"}
    layer = layer_of(**options).train(training)
    ones = [alone(layer, k, **options).train(training) for k in range(3)]
    for k in (1, 0, 2, 1, 1, 0):
        x, dy = torch.randn(6, 4, 3, 5) + k, torch.randn(6, 4, 3, 5)
        with batchnorm.domain(layer, k):
            found = step(layer, x, dy)
        expected = step(ones[k], x, dy)
        for name in ("y", "dx", "dweight", "dbias"):
            assert torch.equal(found[name], expected[name]), name
        for j, one in enumerate(ones):
            end = f"_{j}" if j else ""
            assert_identical({n: layer.state_dict()[n + end] for n in STATISTICS}, state_of(one))


def state_of(one: nn.Module) -> dict[str, Tensor]:
    return {name: state(one)[name] for name in STATISTICS}


def test_within_the_block_the_domains_statistics_are_the_layers() -> None:
    layer = layer_of()
    mean = layer.running_mean_2.clone()
    before = state(layer)
    with batchnorm.domain(layer, 2):
        assert torch.equal(layer.running_mean, mean)
        assert_identical(state(layer), before)  # in the same order too
        with batchnorm.domain(layer, 1):
            assert torch.equal(layer.running_var, before["running_var_1"])
            with batchnorm.domain(layer, 0):
                assert torch.equal(layer.running_var, before["running_var"])
        assert torch.equal(layer.running_mean, mean)
    with pytest.raises(ZeroDivisionError), batchnorm.domain(layer, 2):
        raise ZeroDivisionError
    assert torch.equal(layer.running_mean, before["running_mean"])
    assert "_scope" not in vars(layer)
    assert "_domain" not in vars(layer)


def test_a_model_whose_call_raises_in_the_block_is_as_it_was() -> None:
    model = nn.Sequential(layer_of(), layer_of())
    before = state(model)
    with pytest.raises(InputShapeError), batchnorm.domain(model, 1):
        model(torch.randn(6, 5, 3, 3))
    assert_identical(state(model), before)


def test_states_are_the_same_in_the_block_and_load_there() -> None:
    layer, other = layer_of(), layer_of()
    with batchnorm.domain(layer, 1), batchnorm.domain(other, 2):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.running_mean, layer.running_mean_2)
    assert_identical(state(other), state(layer))
    with batchnorm.domain(other, 2):
        other.load_state_dict(layer_of().state_dict(), assign=True)
    assert list(other.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_row_35_a_stock_state_is_where_every_domain_starts(assign: bool) -> None:
    """Row 35: strict too; and each domain has memory of its own."""
    stock = scramble(nn.BatchNorm2d(4))
    model = nn.Sequential(layer_of())
    start = state_of(stock)
    model.load_state_dict(nn.Sequential(stock).state_dict(), assign=assign)
    for k in range(3):
        with batchnorm.domain(model, k):
            assert_identical({n: getattr(model[0], n) for n in STATISTICS}, start)
            model(torch.randn(5, 4, 2, 2) + k)
    found = model.state_dict()
    assert len({found[f"0.running_mean{end}"][0].item() for end in ("", "_1", "_2")}) == 3
    old = {n: t for n, t in stock.state_dict().items() if n != "num_batches_tracked"}
    counted = layer_of()
    counted.load_state_dict(old)  # torch < 0.4.1 had no counter: they stay
    assert (counted.num_batches_tracked, counted.num_batches_tracked_2) == (3, 5)
    with pytest.raises(RuntimeError, match=r"Missing key.*running_mean"):
        layer_of().load_state_dict({n: t for n, t in stock.state_dict().items() if "mean" not in n})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*running_mean_2"):
        layer_of(2).load_state_dict(layer_of(3).state_dict())
    nn.BatchNorm2d(4).load_state_dict(layer_of(1).state_dict())
    assert list(layer_of(1).state_dict()) == list(stock.state_dict())


def test_copies_and_files_are_as_outside() -> None:
    layer = layer_of()
    before = state(layer)
    file = io.BytesIO()
    with batchnorm.domain(layer, 2):
        torch.save(layer, file)
        others = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
        file.seek(0)
        others.append(torch.load(file, weights_only=False))
        x = torch.randn(5, 4, 2, 2)
        for other in others:
            assert_identical(state(other), before)
            assert torch.equal(other.running_mean, before["running_mean"])
            assert "domains=3" in repr(other)
            with batchnorm.domain(other, 1):
                other.eval()(x)
    assert_identical(state(layer), before)


@pytest.mark.parametrize("within", [0, 2])
def test_row_32_statistics_of_every_domain_stay_float32(within: int) -> None:
    """Row 32: under `.half()` in a block and outside; other moves take all of them along."""
    layer = layer_of()
    before = state(layer)
    with batchnorm.domain(layer, within):
        layer.half()
    assert layer.weight.dtype is torch.float16
    for name in before.keys() - {"weight", "bias"}:
        assert torch.equal(layer.state_dict()[name], before[name]), name
        assert layer.state_dict()[name].dtype is before[name].dtype
    assert {t.dtype for n, t in layer.double().state_dict().items() if "running" in n} == {torch.float64}
    halves = batchnorm.BatchNorm2d(4, domains=2, dtype=torch.bfloat16)
    assert halves.running_var_1.dtype is torch.float32
    wide = batchnorm.BatchNorm2d(4, domains=2)
    wide.load_state_dict({n: t.half() for n, t in halves.state_dict().items()}, assign=True)
    assert wide.running_mean_1.dtype is wide.running_mean.dtype is torch.float32


def test_reset_is_of_all_domains_or_of_the_one_of_the_block() -> None:
    layer = layer_of()
    before = state(layer)
    with batchnorm.domain(layer, 1):
        layer.reset_running_stats()
    after = state(layer)
    for name in before:
        assert torch.equal(after[name], before[name]) == (not name.endswith("_1")), name
    assert (after["running_mean_1"] == 0).all()
    layer.reset_parameters()
    fresh = batchnorm.BatchNorm2d(4, domains=3)
    assert_identical(state(layer), state(fresh))


def test_what_cannot_be_is_refused_by_name() -> None:
    for domains in (0, -1, 1.5, True, "2", None):
        with pytest.raises(OptionError, match=r"^BatchNorm2d: domains must be a whole number of 1 or more"):
            batchnorm.BatchNorm2d(3, domains=domains)
    with pytest.raises(OptionError, match=r"BatchNorm2d: .* make it with track_running_stats=True"):
        batchnorm.BatchNorm2d(3, domains=2, track_running_stats=False)
    model = nn.Sequential(layer_of(3), layer_of(2), batchnorm.BatchNorm2d(4))
    for k in (2, -1, True, 1.0, "1", None):
        with (
            pytest.raises(OptionError, match=r"^[01] \(batchnorm.BatchNorm2d\): domain must be 0 to"),
            batchnorm.domain(model, k),
        ):
            pass
    assert all("_domain" not in vars(norm) for norm in model)
    for stock in (nn.Linear(2, 2), nn.BatchNorm2d(3), batchnorm.BatchNorm2d(3)):
        with pytest.raises(OptionError, match="no batch normalization with several domains"):
            batchnorm.domain(stock, 0).__enter__()
    with pytest.raises(OptionError, match="cannot compile a layer with domains=3"):
        layer_of().__prepare_scriptable__()


def test_layers_of_one_domain_go_on_as_before() -> None:
    model = nn.Sequential(layer_of(2), scramble(batchnorm.BatchNorm2d(4)))
    with batchnorm.domain(model, 1):
        model(torch.randn(5, 4, 3, 3))
    assert model[0].num_batches_tracked == 3
    assert model[0].num_batches_tracked_1 == 5
    assert model[1].num_batches_tracked == 4


def test_sync_batch_norm_has_domains_too() -> None:
    layer = batchnorm.SyncBatchNorm(4, domains=2)
    with batchnorm.domain(layer, 1):
        layer(torch.randn(5, 4))
    assert (layer.num_batches_tracked, layer.num_batches_tracked_1) == (0, 1)


@pytest.mark.parametrize("policy", ["batch", "renorm", "running"])
def test_row_28_compiled_models_change_domain(policy: str) -> None:
    """Row 28: without compiling anew for each."""
    torch.compiler.reset()
    eager = layer_of(statistics=POLICIES[policy])
    compiled = copy.deepcopy(eager)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    run = torch.compile(compiled, backend=backend, fullgraph=True)
    for k in (0, 2, 1, 0, 2):
        x, dy = torch.randn(6, 4, 3, 5) + k, torch.randn(6, 4, 3, 5)
        with batchnorm.domain(compiled, k), batchnorm.domain(eager, k):
            step(run, x, dy)
            step(eager, x, dy)
        assert_same(state(compiled), state(eager), TOLERANCES[torch.float32])
    assert graphs <= 2
    torch.compiler.reset()


def test_functional_call_and_ddp_like_views_of_buffers() -> None:
    """Whoever holds a buffer holds that of its domain, whichever is in use."""
    layer = layer_of()
    held = dict(layer.named_buffers())
    with batchnorm.domain(layer, 2):
        layer(torch.randn(5, 4, 3, 3))
        inside = dict(layer.named_buffers())
        assert inside["running_mean"] is held["running_mean_2"]
        assert inside["running_mean_2"] is held["running_mean"]
    assert all(layer.get_buffer(name) is buffer for name, buffer in held.items())
