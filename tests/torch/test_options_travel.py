"""Policies, masks and the other options through copies, files, exporters, `lean` and autocast."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.errors import OptionError
from batchnorm.statistics.policy import Policy
from tests.support.exported import run_onnx
from tests.torch.twins import assert_identical, relaid, scramble, state

POLICIES = [
    batchnorm.Batch(),
    batchnorm.Ghost(3),
    batchnorm.Ghost(2, sequential=True),
    batchnorm.Renorm(1.5, 0.5, (2, 9), (0, 0)),
    batchnorm.Running(),
    batchnorm.Adapted(2.0),
    batchnorm.Synced(over=batchnorm.Ghost(3)),
]
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=str)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Masked(nn.Module):
    """A convolution, and a layer that takes a mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 5, 3, padding=1)
        self.norm = scramble(batchnorm.BatchNorm1d(5, eps=0.25, momentum=0.3, **options))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.convolution(x), mask=mask)


def made(policy: Policy, **options: Any) -> Masked:
    return Masked(statistics=policy, activation="silu", **options)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 7), torch.rand(8, 7) > 0.3


def file_and_back(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)  # its own, of a moment ago


COPIES = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "file": file_and_back,
}


@pytest.mark.parametrize("how", COPIES)
@EVERY_POLICY
def test_a_copy_has_all_options_and_computes_the_same(policy: Policy, how: str, tmp_path: Path) -> None:
    model, (x, mask) = made(policy, nonfinite="skip", small_batch="running"), inputs()
    model(x * float("nan"))
    twin = COPIES[how](model, tmp_path)
    for name in ("statistics", "nonfinite", "small_batch", "activation", "eps", "momentum", "skipped"):
        assert getattr(twin.norm, name) == getattr(model.norm, name), name
    assert repr(twin) == repr(model)
    assert torch.equal(twin(x, mask), model(x, mask))
    assert_identical(state(twin), state(model))


def test_a_parametrized_layer_that_was_called_is_copied_without_its_contexts() -> None:
    """torch copies such a layer in a way of its own, by all of its attributes."""
    layer, x = scramble(batchnorm.BatchNorm1d(5, domains=2)), torch.randn(8, 5)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    layer(x)
    before = state(layer)
    with batchnorm.domain(layer, 1):
        layer(x + 1)
        twin = copy.deepcopy(layer)
    assert not {"_plain", "_domain", "_scope"} & vars(twin).keys()
    assert torch.equal(twin.running_mean, before["running_mean"])
    assert_identical(state(twin), state(layer))
    assert torch.equal(twin(x), layer(x))
    assert twin.parametrizations.weight.original is not layer.parametrizations.weight.original


@EVERY_POLICY
def test_the_state_is_the_stock_layers(policy: Policy) -> None:
    """Whatever the options: stock's names in and out, strictly; the options stay the layer's own."""
    layer = made(policy, nonfinite="skip", small_batch="running").norm
    stock = nn.BatchNorm1d(5)
    assert list(layer.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(layer.state_dict())
    layer.load_state_dict(stock.state_dict())
    assert layer.statistics == policy
    assert layer.nonfinite == "skip"


@EVERY_POLICY
def test_it_prints_where_it_is_not_stocks(policy: Policy) -> None:
    shown = repr(batchnorm.BatchNorm2d(3, statistics=policy))
    assert (f"statistics={policy!r}" in shown) == (policy != batchnorm.Batch())


@EVERY_POLICY
def test_jit_script_refuses_what_stock_does_not_compute(policy: Policy) -> None:
    layer = batchnorm.BatchNorm1d(5, statistics=policy)
    if policy == batchnorm.Batch():
        layer.__prepare_scriptable__()
        return
    with pytest.raises(
        OptionError, match=r"jit\.script cannot compile a layer with statistics=.*torch\.export"
    ):
        layer.__prepare_scriptable__()


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@EVERY_POLICY
def test_row_29_torch_export(policy: Policy, masked: bool) -> None:
    """Row 29: in evaluation, with a mask as an input or none, for any batch size: torch's own operators."""
    model, (x, mask) = made(policy).eval(), inputs()
    arguments = (x, mask) if masked else (x,)
    samples = torch.export.Dim("samples", min=2)
    program = torch.export.export(model, arguments, dynamic_shapes=[{0: samples}] * len(arguments))
    spaces = {n.target.namespace for n in program.graph.nodes if hasattr(n.target, "namespace")}
    assert spaces <= {"aten"}
    for size in (8, 5):
        cut = tuple(t[:size] for t in arguments)
        torch.testing.assert_close(program.module()(*cut), model(*cut), rtol=1e-5, atol=1e-5)


@EVERY_POLICY
def test_row_29_torch_export_in_training(policy: Policy) -> None:
    """Row 29: the moved statistics too."""
    model, (x, mask) = made(policy), inputs()
    eager = copy.deepcopy(model)
    exported = torch.export.export(model, (x, mask)).module()
    for _ in range(2):
        torch.testing.assert_close(exported(x, mask), eager(x, mask), rtol=1e-5, atol=1e-5)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("policy", [batchnorm.Batch(), batchnorm.Ghost(3), batchnorm.Adapted(2.0)], ids=str)
def test_row_29_onnx(policy: Policy, masked: bool, tmp_path: Path) -> None:
    """Row 29: onnxruntime computes what the layer computes in evaluation, with a mask as an input too."""
    model, (x, mask) = made(policy).eval(), inputs()
    arguments = (x, mask) if masked else (x,)
    y, kinds = run_onnx(model, arguments, tmp_path)
    torch.testing.assert_close(y, model(*arguments).detach(), rtol=1e-5, atol=1e-5)
    if not masked and policy != batchnorm.Adapted(2.0):  # the exporter may fold what it knows
        assert kinds <= {"BatchNormalization", "Conv", "Mul", "Sigmoid"}


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("engine", ["cpu", "eager"])
@MODES
@EVERY_POLICY
def test_row_23_lean_changes_no_bit(
    policy: Policy, training: bool, engine: str, layout: str, masked: bool
) -> None:
    """Row 23: gradients and statistics bit for bit, and the output is not kept, with any policy and mask."""
    layer = scramble(batchnorm.BatchNorm2d(5, statistics=policy, activation="gelu")).train(training)
    x, residual, cotangent = (relaid(torch.randn(8, 5, 4, 3) + 1, layout) for _ in range(3))
    mask = torch.rand(8, 4, 3) > 0.3 if masked else None
    start, found, scale = state(layer), [], torch.rand(5, 1, 1)
    for around in (contextlib.nullcontext(), batchnorm.lean()):
        layer.load_state_dict(start)
        layer.zero_grad()
        leaves = [t.detach().requires_grad_() for t in (x, residual, scale)]
        with around, kernels.use(engine):
            y = layer(leaves[0] * 1, leaves[1] * 1, mask)
            kept = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
            loss = ((y * leaves[2]).sin() * cotangent).sum()
        del y
        is_kept = not kept.expired()
        with kernels.use(engine):
            loss.backward()
        gradients = {f"d{i}": leaf.grad for i, leaf in enumerate(leaves)}
        gradients |= {name: p.grad.clone() for name, p in layer.named_parameters()}
        found.append((gradients | state(layer), is_kept))
    assert_identical(found[1][0], found[0][0])
    assert (found[0][1], found[1][1]) == (True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@MODES
@EVERY_POLICY
def test_autocast_gives_16_bits_and_wide_statistics(
    policy: Policy, training: bool, dtype: torch.dtype
) -> None:
    """The 16-bit input that autocast hands on, computed wide: what float32 makes of the same values."""
    model, (x, mask) = made(policy).train(training), inputs()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype):
        narrow = model.convolution(x)
        y = model.norm(narrow, mask=mask)
    assert narrow.dtype is y.dtype is dtype
    y.float().sin().sum().backward()
    expected = twin.norm(narrow.detach().float(), mask=mask)
    expected.to(dtype).float().sin().sum().backward()
    assert torch.equal(y, expected.to(dtype))
    assert_identical(state(model.norm), state(twin.norm))
    for ours, theirs in zip(model.norm.parameters(), twin.norm.parameters(), strict=True):
        assert ours.grad.dtype is torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
