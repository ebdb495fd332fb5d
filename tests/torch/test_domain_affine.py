"""Row 43: `domain_affine=True`, a weight and bias for each domain, and the verbs on such layers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import kernels
from batchnorm.errors import OptionError
from tests.support.covering import covering_array
from tests.torch.test_domains import POLICIES, STATISTICS
from tests.torch.twins import assert_identical, assert_same, scramble, state, step

AFFINE = ("weight", "bias")
IDS = torch.tensor([2, 0, 2, 2, 0, 0, 2])  # none of domain 1
WIDE = (1e-12, 1e-12)  # float64


def layer_of(domains: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """Return a layer each of whose domains has a past and parameters of its own."""
    options = {"dtype": dtype, "domain_affine": True} | options
    layer = batchnorm.BatchNorm2d(4, domains=domains, **options)
    for k in range(domains):
        with batchnorm.domain(layer, k):
            scramble(layer)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.uniform_(0.5, 1.5) if "weight" in name else parameter.normal_()
    return layer


def alone(layer: nn.Module, k: int, **options: Any) -> nn.Module:
    """Return a layer of one domain with what is of domain `k`."""
    one = batchnorm.BatchNorm2d(layer.num_features, dtype=torch.float64, **options)
    found, end = layer.state_dict(), f"_{k}" if k else ""
    one.load_state_dict({name: found[name + end] for name in (*AFFINE, *STATISTICS)})
    return one


def of_domain(layer: nn.Module, k: int) -> dict[str, Tensor]:
    """Return state and gradients of domain `k` by the names of a layer that has one."""
    found, end = state(layer), f"_{k}" if k else ""
    grads = {f"d{name}": layer.get_parameter(name + end).grad for name in AFFINE}
    return {name: found[name + end] for name in (*AFFINE, *STATISTICS)} | grads


@pytest.mark.parametrize(
    ("policy", "engine", "training", "way"),
    covering_array([*POLICIES], ["cpu", "eager"], [True, False], ["number", "ids"]),
    ids=str,
)
def test_row_43_each_domain_is_a_layer_of_its_own(policy: str, engine: str, training: bool, way: str) -> None:
    """Row 43: output, gradients and statistics; what no sample is of stays, and has no gradient."""
    options = {"statistics": POLICIES[policy], "activation": "silu"}
    layer = layer_of(**options).train(training)
    ones = [alone(layer, k, **options).train(training) for k in range(3)]
    x, dy = torch.randn(7, 4, 3, 5, dtype=torch.float64) + 1, torch.randn(7, 4, 3, 5, dtype=torch.float64)
    leaf, found = x.clone().requires_grad_(), torch.empty_like(x)
    expected = {"y": torch.empty_like(x), "dx": torch.empty_like(x)}
    with kernels.use(engine):
        if way == "ids":
            with batchnorm.domain(layer, IDS):
                y = layer(leaf)
            y.backward(dy)
            found = y.detach()
        for k in (2, 0):
            here = IDS.eq(k)
            if way == "number":
                with batchnorm.domain(layer, k):
                    part = layer(leaf[here])
                part.backward(dy[here])
                found[here] = part.detach()
            of_one = step(ones[k], x[here], dy[here])
            for name, whole in expected.items():
                whole[here] = of_one[name]
    assert_same({"y": found, "dx": leaf.grad}, expected, WIDE)
    for k, one in enumerate(ones):
        assert_same(of_domain(layer, k), of_domain(one, 0), WIDE)
    assert layer.weight_1.grad is None


def test_parameters_have_the_same_names_and_order_within_a_block() -> None:
    """By which optimizers, averages of weights, FSDP and `get_parameter` know them."""
    layer = layer_of()
    names = dict(layer.named_parameters())
    assert [*names] == [name + end for end in ("", "_1", "_2") for name in AFFINE]
    average = torch.optim.swa_utils.AveragedModel(layer)
    with torch.no_grad():
        layer.weight_1 += 1
    with batchnorm.domain(layer, 2):
        inside = dict(layer.named_parameters())
        assert [*inside] == [*names]
        assert all(inside[name] is parameter for name, parameter in names.items())
        assert all(layer.get_parameter(name) is parameter for name, parameter in names.items())
        average.n_averaged.fill_(1)
        average.update_parameters(layer)
    torch.testing.assert_close(average.module.weight_1, layer.weight_1 - 0.5)
    assert torch.equal(average.module.weight_2, layer.weight_2)


def test_a_step_in_the_block_moves_the_domain_that_was_used() -> None:
    """An optimizer that was made outside, with momentum and decay, as one of a layer of its own."""
    layer, x = layer_of(), torch.randn(6, 4, 3, 5, dtype=torch.float64)
    one, before = alone(layer, 1), state(layer)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.3) for m in (layer, one)]
    for number in range(3):
        dy = torch.randn_like(x)
        with batchnorm.domain(layer, 1):
            for model, optimizer in zip((layer, one), optimizers, strict=True):
                optimizer.zero_grad()
                model(x + number).backward(dy)
                optimizer.step()
    assert_same(of_domain(layer, 1), of_domain(one, 0), WIDE)
    for name, tensor in state(layer).items():
        assert torch.equal(tensor, before[name]) == (not name.endswith("_1")), name


def test_states_go_through_files_and_copies_in_a_block_too() -> None:
    layer, other = layer_of(), layer_of()
    before, file = state(layer), io.BytesIO()
    with batchnorm.domain(layer, 2), batchnorm.domain(other, 1):
        assert_identical(state(layer), before)
        copies = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))
    for one in (*copies, other):
        assert_identical(state(one), before)
    other.load_state_dict(layer.state_dict(), assign=True)
    assert [*other.state_dict()] == [*before]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["stock", "shared"])
def test_a_state_without_such_weights_is_where_every_domain_starts(kind: str, assign: bool) -> None:
    """Strictly: of a stock layer, and of one whose domains share a weight, with statistics of their own."""
    given = scramble(nn.BatchNorm2d(4).double()) if kind == "stock" else layer_of(domain_affine=False)
    layer = layer_of()
    layer.load_state_dict(given.state_dict(), assign=assign)
    for k in range(3):
        end, found = "" if kind == "stock" or k == 0 else f"_{k}", of_domain(layer, k)
        assert torch.equal(found["weight"], given.weight)
        assert torch.equal(found["bias"], given.bias)
        assert torch.equal(found["running_var"], given.state_dict()[f"running_var{end}"])
    with torch.no_grad():
        layer.weight.zero_()
    assert layer.weight_1.all()
    layer.load_state_dict({"bias": torch.ones(4)}, strict=False)
    assert layer.weight_1.all()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_1"):
        given.load_state_dict(layer.state_dict())


def test_reset_and_layers_without_a_bias() -> None:
    layer = layer_of(bias=False)
    assert layer.bias_2 is None
    layer.reset_parameters()
    fresh = batchnorm.BatchNorm2d(4, domains=3, domain_affine=True, bias=False, dtype=torch.float64)
    assert_identical(state(layer), state(fresh))
    with batchnorm.domain(layer, 2):
        assert layer(torch.randn(3, 4, 2, 2, dtype=torch.float64)).shape == (3, 4, 2, 2)
    assert layer_of(dtype=torch.float32).half().weight_1.dtype is torch.float16
    assert batchnorm.SyncBatchNorm(4, domains=2, domain_affine=True).weight_1.shape == (4,)


def test_what_cannot_be_is_refused_by_name_and_changes_nothing() -> None:
    for wrong in (1, "yes", None):
        with pytest.raises(OptionError, match=r"^BatchNorm2d: domain_affine must be True or False; got"):
            batchnorm.BatchNorm2d(3, domains=2, domain_affine=wrong)
    with pytest.raises(OptionError, match=r"^BatchNorm2d: .* one domain: pass domains=n too"):
        batchnorm.BatchNorm2d(3, domain_affine=True)
    with pytest.raises(OptionError, match=r"^BatchNorm2d: .* has none: make it with affine=True"):
        batchnorm.BatchNorm2d(3, domains=2, domain_affine=True, affine=False)
    both = {"domains": 2, "domain_affine": True}
    parametrized = nn.Sequential(nn.BatchNorm2d(3))
    nn.utils.parametrize.register_parametrization(parametrized[0], "weight", nn.Softplus())
    for model, options, why in (
        (nn.Sequential(nn.BatchNorm2d(3)), {"domain_affine": True}, "pass domains=n too"),
        (nn.Sequential(nn.BatchNorm2d(3)), {"domains": 2, "domain_affine": 1}, "True or False"),
        (
            nn.Sequential(nn.BatchNorm2d(3, affine=False)),
            {"domains": 2, "domain_affine": True},
            "affine=True",
        ),
        (parametrized, both, "parametrized"),
        (nn.Sequential(layer_of()), {"domain_affine": False}, "each of its domains has a weight and bias"),
    ):
        before, cls = state(model), type(model[0])
        with pytest.raises(OptionError, match=rf"^0 \(.*{why}"):
            batchnorm.convert(model, **options)
        assert_identical(state(model), before)
        assert type(model[0]) is cls


@pytest.mark.parametrize("name", ["weight", "weight_2"])
def test_a_weight_that_is_parametrized_later(name: str) -> None:
    """Forwards and verbs take it; `fold` refuses, by name, to put another one in its place."""
    model, x = nn.Sequential(layer_of()), torch.randn(7, 4, 3, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(model[0], name, nn.Identity())
    for where in (1, 2, IDS):
        with batchnorm.domain(model, where), batchnorm.domain(plain, where):
            assert torch.equal(model(x), plain(x))
    for layer in (model, plain):
        with torch.no_grad():
            layer[0].get_parameter(f"parametrizations.{name}.original" if layer is model else name)[1] = 0
    with batchnorm.domain(model, 2), batchnorm.domain(plain, 2):
        assert batchnorm.inspect(model).rows[0].health == batchnorm.inspect(plain).rows[0].health
        batchnorm.calibrate(model, [x])
        batchnorm.calibrate(plain, [x])
        before = state(model)
        match = r"^0 \(ParametrizedBatchNorm2d\): .*parametrized, and that of domain 2 cannot take its place"
        with pytest.raises(OptionError, match=match):
            batchnorm.fold(model)
        assert_identical(state(model), before)
    assert torch.equal(batchnorm.fold(model)(x), plain.eval()(x))


def test_convert_starts_each_domain_from_the_layer() -> None:
    """In one go or two, again without effect; `unfreeze` lets the new ones learn where the old one did."""
    for ways in (({"domains": 3, "domain_affine": True},), ({"domains": 3}, {"domain_affine": True})):
        model = nn.Sequential(scramble(nn.BatchNorm2d(4)))
        weight, before = model[0].weight, state(model[0])
        for options in (*ways, *ways):
            batchnorm.convert(model, **options)
        assert model[0].weight is weight
        for k in range(3):
            found = of_domain(model[0], k)
            assert all(torch.equal(found[name], before[name]) for name in before)
        batchnorm.freeze(model, parameters=True)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        batchnorm.unfreeze(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
    held = batchnorm.freeze(nn.Sequential(nn.BatchNorm2d(4)), parameters=True)
    batchnorm.convert(held, domains=2, domain_affine=True)
    assert not held[0].weight_1.requires_grad
    assert batchnorm.unfreeze(held)[0].weight_1.requires_grad


@pytest.mark.parametrize("k", [0, 1, 2])
def test_verbs_in_the_block_are_about_the_domain(k: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1).double(), layer_of(), nn.ReLU()).eval()
    x, ends = torch.randn(5, 3, 4, 4, dtype=torch.float64), ("", "_1", "_2")
    with torch.no_grad():
        model[1].get_parameter(f"weight{ends[k]}")[1] = 0
    fused = batchnorm.fuse(copy.deepcopy(model), x)
    with batchnorm.domain(model, k), batchnorm.domain(fused, k):
        y = model(x)
        folded = batchnorm.fold(model, x)
        torch.testing.assert_close(fused(x), y, rtol=0, atol=1e-12)
        (row,) = batchnorm.inspect(model).rows
        _, weights = batchnorm.conventions.torch_to_keras(model[1])
    torch.testing.assert_close(folded(x), y, rtol=0, atol=1e-12)
    assert not any("_1" in name for name in folded.state_dict())
    assert f"domain {k} of 3, domain_affine=True" in row.policy
    assert "dead weight (1 of 4)" in row.health
    assert torch.equal(torch.from_numpy(weights[0]), model[1].get_parameter(f"weight{ends[k]}").detach())
    for other in {0, 1, 2} - {k}:
        with batchnorm.domain(model, other):
            assert "dead weight (1 of 4)" not in batchnorm.inspect(model).rows[0].health
            assert (batchnorm.fold(model, x)(x) - y).abs().max() > 0.01


@pytest.mark.parametrize("method", ["batch", "layerwise"])
def test_calibrate_normalizes_by_the_weights_of_the_domain(method: str) -> None:
    """By which the statistics of the second norm are."""
    model, x = nn.Sequential(layer_of(), nn.ReLU(), layer_of()), torch.randn(9, 4, 3, 5, dtype=torch.float64)
    ones = nn.Sequential(alone(model[0], 2), nn.ReLU(), alone(model[2], 2))
    with batchnorm.domain(model, 2):
        batchnorm.calibrate(model, [x], method=method)
    batchnorm.calibrate(ones, [x], method=method)
    for layer, one in ((model[0], ones[0]), (model[2], ones[2])):
        assert_same(of_domain(layer, 2), of_domain(one, 0), WIDE)


def test_the_monitor_logs_the_gradient_of_each_domain() -> None:
    model, rows = nn.Sequential(nn.Conv2d(3, 4, 1).double(), layer_of()), []
    with torch.no_grad():
        model[1].weight_1[:2] = 0
    with batchnorm.monitor(model, lambda row, _: rows.append(row), every=1), batchnorm.domain(model, IDS):
        model(torch.randn(7, 3, 4, 4, dtype=torch.float64)).square().sum().backward()
    (row,) = rows
    for name in ("weight", "bias_2"):
        expected = float(model[1].get_parameter(name).grad.norm())
        assert row[f"bn/1/{name}_grad_norm"] == pytest.approx(expected, rel=1e-6)
    assert "bn/1/weight_1_grad_norm" not in row  # no sample is of domain 1
    assert row["bn/1/dead_channels"] == pytest.approx(2 / 12)


def test_row_28_compiled_models_have_a_graph_for_each_domain() -> None:
    """Row 28: and none more for coming back to one."""
    torch.compiler.reset()
    eager = layer_of()
    compiled = copy.deepcopy(eager)
    counts = CompileCounter()
    run = torch.compile(compiled, backend=counts, fullgraph=True)
    for k in (0, 2, 1, 0, 2):
        x = torch.randn(6, 4, 3, 5, dtype=torch.float64) + k
        dy = torch.randn_like(x)
        with batchnorm.domain(compiled, k), batchnorm.domain(eager, k):
            run(x).backward(dy)
            eager(x).backward(dy)
    for k in range(3):
        assert_same(of_domain(compiled, k), of_domain(eager, k), WIDE)
    assert counts.frame_count <= 3
    torch.compiler.reset()


@pytest.mark.parametrize("way", ["functional_call", "lean", "reentrant", "not reentrant", "accumulate"])
def test_what_surrounds_a_call_takes_the_domains_parameters(way: str) -> None:
    """And the backward is outside of the block."""
    layer, x = layer_of(activation="silu"), torch.randn(7, 4, 3, 5, dtype=torch.float64)
    plain, dy = copy.deepcopy(layer), torch.randn_like(x)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with batchnorm.domain(layer, IDS), batchnorm.domain(plain, IDS):
        expected = plain(leaves[0])
        if way == "functional_call":
            y = torch.func.functional_call(layer, tensors, (leaves[1],))
        elif way == "lean":
            with batchnorm.lean():
                y = layer(leaves[1])
        elif way == "accumulate":
            with batchnorm.accumulate(layer, 1):
                y = layer(leaves[1])
        else:
            y = checkpoint(layer, leaves[1], use_reentrant=way == "reentrant")
    expected.backward(dy)
    y.backward(dy)
    assert torch.equal(y, expected)
    assert torch.equal(leaves[1].grad, leaves[0].grad)
    for k in range(3):
        assert_same(of_domain(layer, k), of_domain(plain, k), WIDE)
