"""No option is lost without a word: scripting refuses by name, and each remedy that it names helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import InputShapeError, NonFiniteError, OptionError
from batchnorm.models.norms.timm import BatchNormAct2d
from batchnorm.torch.layers import OPTIONS
from tests.torch.twins import scramble, state

# torch's own, of the functions under test
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
]
CASES: dict[str, Any] = {
    "activation": ["relu", "gelu"],
    "statistics": [
        batchnorm.Ghost(2),
        batchnorm.Renorm(),
        batchnorm.Running(),
        batchnorm.Synced(),
        batchnorm.Adapted(2),
    ],
    "nonfinite": ["skip", "raise"],
    "small_batch": ["running"],
    "domains": [2],
    "warm_start": [True],
}
EACH = pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in CASES.items() for value in values], ids=str
)


def model_with(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), scramble(batchnorm.BatchNorm1d(3, **options)))


def test_every_option_of_the_constructor_is_here() -> None:
    assert {*CASES, "domain_affine"} == set(OPTIONS)  # it needs domains, which are refused
    assert set(OPTIONS) == set(batchnorm.BatchNorm2d.__init__.__kwdefaults__) - {"bias"}


@EACH
def test_script_refuses_each_option_and_each_remedy_helps(name: str, value: Any) -> None:
    model = model_with(**{name: value})
    before = state(model)
    with pytest.raises(OptionError, match=rf"^BatchNorm1d: .* with {name}=") as caught:
        torch.jit.script(model)
    assert isinstance(model[1], batchnorm.BatchNorm1d)
    text, x = str(caught.value), torch.randn(6, 5)
    model.eval()
    y = model(x)
    remedies = {"torch.jit.trace": torch.jit.trace(model, x), "torch.export": exported(model, x)}
    other = copy.deepcopy(model)
    if "batchnorm.revert(copy)" in text:
        remedies["batchnorm.revert(copy)"] = torch.jit.script(batchnorm.revert(other))
    elif "batchnorm.convert(copy, Batch())" in text:
        remedies["batchnorm.convert(copy"] = torch.jit.script(batchnorm.convert(other, batchnorm.Batch()))
    elif f"layer.{name} = {OPTIONS[name]!r}" in text:
        setattr(other[1], name, OPTIONS[name])
        remedies[f"layer.{name} ="] = torch.jit.script(other)
    else:
        assert name == "domains" or value == batchnorm.Adapted(2)
    for words, found in remedies.items():
        assert words in text
        torch.testing.assert_close(found(x), y, rtol=1e-5, atol=1e-5, msg=words)
    assert list(state(model)) == list(before)


def exported(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.export.export(model, (x,)).module()


@pytest.mark.parametrize("how", ["trace", "export"])
def test_domains_the_remedy_takes_the_domain_of_the_context(how: str) -> None:
    model, x = model_with(domains=2).eval(), torch.randn(6, 5)
    with torch.no_grad():
        model[1].running_mean_1.fill_(4)
    with batchnorm.domain(model, 1):
        y = model(x)
        found = torch.jit.trace(model, x) if how == "trace" else exported(model, x)
    torch.testing.assert_close(found(x), y, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), y)


class Twice(batchnorm.BatchNorm1d):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Own(batchnorm.BatchNorm1d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


@pytest.mark.parametrize("kind", ["Twice", "SyncBatchNorm", "BatchNormAct2d"])
def test_script_refuses_what_is_no_stock_layer_with_other_options(kind: str) -> None:
    layer = {"Twice": Twice, "SyncBatchNorm": batchnorm.SyncBatchNorm}.get(kind, BatchNormAct2d)(3)
    if kind == "SyncBatchNorm":
        layer.statistics = batchnorm.Batch()
    if kind == "BatchNormAct2d":
        layer.drop, layer.act = nn.Identity(), nn.PReLU()
    model = nn.Sequential(scramble(layer)).eval()
    x = torch.randn(4, 3, 2, 2) if kind == "BatchNormAct2d" else torch.randn(4, 3)
    with pytest.raises(OptionError, match=rf"^{kind}: .*torch\.jit\.trace or torch\.export"):
        torch.jit.script(model)
    for found in (torch.jit.trace(model, x), exported(model, x)):
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)


def test_script_takes_a_subclass_that_adds_nothing_and_leaves_out_a_counter_of_the_past() -> None:
    layer = scramble(Own(3))
    layer.nonfinite = "skip"
    layer.nonfinite = "propagate"
    scripted, x = torch.jit.script(nn.Sequential(layer)), torch.randn(4, 3)
    assert not any("skipped" in name for name in scripted.state_dict())
    torch.testing.assert_close(scripted.eval()(x), layer.eval()(x), rtol=1e-5, atol=1e-5)


def test_script_is_refused_within_contexts_that_no_stock_layer_heeds() -> None:
    model, mask = model_with(), torch.ones(4, dtype=torch.bool)
    for context in (batchnorm.mask(model, mask), batchnorm.accumulate(model, 2)):
        with context, pytest.raises(OptionError, match="outside of the block"):
            torch.jit.script(model)
    with batchnorm.mask(model, None):
        torch.jit.script(copy.deepcopy(model))


@pytest.mark.parametrize("how", ["trace", "export"])
def test_training_graphs_skip_bad_batches_too(how: str) -> None:
    """`trace` and `export` in training dropped nonfinite="skip": one inf was in the statistics for ever."""
    model, x = model_with(nonfinite="skip"), torch.randn(6, 5)
    eager = copy.deepcopy(model)
    if how == "trace":
        graph: Any = torch.jit.trace(model, x, check_trace=False)
        model[1].load_state_dict(eager[1].state_dict())
    else:
        graph = exported(model, x)
    for batch in (x, x.clone().fill_(float("inf")), x * 2 + 1):
        torch.testing.assert_close(graph(batch), eager(batch), rtol=1e-5, atol=1e-5, equal_nan=True)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(graph.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_training_graphs_that_should_raise_are_refused(how: str) -> None:
    model, x = model_with(nonfinite="raise"), torch.randn(6, 5)
    with pytest.raises(OptionError, match=r"nonfinite=\"raise\" cannot be exported in training.*eval\(\)"):
        torch.jit.trace(model, x) if how == "trace" else exported(model, x)


def test_a_traced_training_graph_normalizes_a_batch_of_one_by_the_running_statistics() -> None:
    model, x = model_with(small_batch="running"), torch.randn(6, 5)
    eager = copy.deepcopy(model)
    graph = torch.jit.trace(model, x, check_trace=False)
    model[1].load_state_dict(eager[1].state_dict())
    for batch in (x, x[:1], x[:3]):
        torch.testing.assert_close(graph(batch), eager(batch), rtol=1e-5, atol=1e-5)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(graph.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_transforms_heed_a_layer_that_raises() -> None:
    layer = scramble(batchnorm.BatchNorm1d(3, nonfinite="raise", track_running_stats=False))
    bad = torch.randn(4, 3)
    bad[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="channel 2"):
        torch.func.vjp(layer, bad)
    torch.func.vjp(layer, bad.nan_to_num())
    with pytest.raises(OptionError, match=r"vmap: set layer\.nonfinite"):
        torch.func.vmap(layer)(bad.expand(2, 4, 3))


def test_options_that_would_do_nothing_without_running_statistics_are_refused() -> None:
    untracked = batchnorm.BatchNorm1d(3, track_running_stats=False)
    for name, value in (("small_batch", "running"), ("nonfinite", "skip")):
        with pytest.raises(OptionError, match=rf"^BatchNorm1d: {name}=.*track_running_stats=True"):
            batchnorm.BatchNorm1d(3, track_running_stats=False, **{name: value})
        with pytest.raises(OptionError, match=rf"^BatchNorm1d: {name}=.*track_running_stats=True"):
            setattr(untracked, name, value)
        assert getattr(untracked, name) == OPTIONS[name]
    with pytest.raises(OptionError, match="small_batch must be 'raise' or 'running'; got 'ignore'"):
        untracked.small_batch = "ignore"
    untracked.nonfinite = "raise"
    bad = torch.randn(4, 3).index_fill(0, torch.tensor([1]), float("inf"))
    with pytest.raises(NonFiniteError):
        untracked(bad)
    untracked.eval()(bad)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_value_without_running_statistics_names_remedies_that_help(training: bool) -> None:
    """Row 19: `.eval()` and small_batch="running" cannot help there, and are not advised alone."""
    for options in ({}, {"statistics": batchnorm.Ghost(1)}):
        layer = batchnorm.BatchNorm1d(5, track_running_stats=False, **options).train(training)
        with pytest.raises(InputShapeError, match=r"more than 1 value.*track_running_stats=True") as caught:
            layer(torch.randn(1, 5))
        assert ".eval()" not in str(caught.value)
    remedy = batchnorm.BatchNorm1d(5, track_running_stats=True, small_batch="running").train(training)
    assert remedy(torch.randn(1, 5)).isfinite().all()
    with pytest.raises(InputShapeError, match=r"or pass running statistics$"):
        batchnorm.functional.batch_norm(torch.randn(1, 5), None, None, training=True)
    mean, var = torch.zeros(5), torch.ones(5)
    with pytest.raises(InputShapeError, match=r"or pass training=False$"):
        batchnorm.functional.batch_norm(torch.randn(1, 5), mean, var, training=True)
    batchnorm.functional.batch_norm(torch.randn(1, 5), mean, var, training=False)


def test_one_running_statistic_without_the_other_is_refused_as_in_stock() -> None:
    x, one = torch.randn(4, 3), torch.ones(3)
    for pair in ((None, one), (one, None)):
        for function in (nn.functional.batch_norm, batchnorm.functional.batch_norm):
            with pytest.raises(ValueError, match="must either both be None or neither be None"):
                function(x, *pair, training=True)
        with pytest.raises(OptionError, match="neither be None"):
            batchnorm.functional.pure_batch_norm(x, *pair, training=True)
    for name in ("running_mean", "running_var"):
        layer = nn.Sequential(batchnorm.BatchNorm1d(3))
        setattr(layer[0], name, None)
        before = state(layer)
        for call in (layer, torch.compile(layer, backend="aot_eager")):
            with pytest.raises(ValueError, match="neither be None"):
                call(x)
        for key, value in state(layer).items():
            assert torch.equal(value, before[key])


def test_conventions_carry_or_refuse_each_option() -> None:
    """Settings for Keras dropped what its layer has too, and what it has not."""
    to_keras = batchnorm.conventions.torch_to_keras
    for name, value in (("nonfinite", "skip"), ("small_batch", "running")):
        settings, _ = to_keras(batchnorm.BatchNorm1d(3, **{name: value}))
        assert settings[name] == value
        assert name not in to_keras(batchnorm.BatchNorm1d(3))[0]
    refused = batchnorm.BatchNorm1d(3, nonfinite="raise")
    with pytest.raises(OptionError, match=r"set layer\.nonfinite = \"skip\" and convert again"):
        to_keras(refused)
    refused.nonfinite = "skip"
    to_keras(refused)
    several = scramble(batchnorm.BatchNorm1d(3, domains=2))
    with pytest.raises(OptionError, match=r"convert within batchnorm\.domain\(layer, k\)"):
        to_keras(several)
    with batchnorm.domain(several, 1):
        _, weights = to_keras(several)
        assert (weights[2] == several.running_mean.numpy()).all()
