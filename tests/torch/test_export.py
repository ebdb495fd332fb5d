"""Exporters see torch's own operators, with the right eps, momentum and mode."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import OptionError
from tests.support.exported import run_onnx
from tests.torch.twins import STATISTICS, assert_identical, scramble, state


class Network(nn.Module):
    """Convolution, norm, addition, activation."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = scramble(batchnorm.BatchNorm2d(5, eps=0.25, momentum=0.3, **options))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(self.convolution(x), residual)


INPUTS = (
    torch.linspace(-2, 2, 4 * 3 * 36).view(4, 3, 6, 6),
    torch.linspace(1, -1, 4 * 5 * 36).view(4, 5, 6, 6),
)


def calls(program: torch.export.ExportedProgram) -> list[Any]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"momentum": None}], ids=str)
def test_row_29_torch_export(options: dict[str, Any], training: bool) -> None:
    """Row 29: stock operators only; eps, momentum and mode are the layer's, and so are the results."""
    network = Network()
    network.norm.activation = options.get("activation")
    network.norm.momentum = options.get("momentum", 0.3)
    network.train(training)
    eager = copy.deepcopy(network)  # the program shares its buffers with the network
    program = torch.export.export(network, INPUTS)
    assert {node.target.namespace for node in calls(program) if hasattr(node.target, "namespace")} == {"aten"}
    (norm,) = (node for node in calls(program) if "batch_norm" in str(node.target))
    schema = dict(zip((a.name for a in norm.target._schema.arguments), norm.args, strict=False)) | norm.kwargs
    assert schema["eps"] == 0.25
    assert schema["training"] is training
    if training and network.norm.momentum is not None:
        assert schema["momentum"] == 0.3
    exported = program.module()
    torch.testing.assert_close(exported(*INPUTS), eager(*INPUTS), rtol=1e-5, atol=1e-5)
    if training:
        moved = {name.removeprefix("norm."): t for name, t in exported.state_dict().items()}
        for name in STATISTICS:
            torch.testing.assert_close(moved[name], getattr(eager.norm, name), rtol=1e-5, atol=1e-5)


def test_row_29_pure_batch_norm_exports_as_the_stock_operator() -> None:
    """Row 29: running statistics go in and come out as values."""

    class Pure(nn.Module):
        def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Any:
            return batchnorm.functional.pure_batch_norm(x, mean, var, training=True, momentum=0.3, eps=0.25)

    given = (INPUTS[1], torch.randn(5), torch.rand(5) + 0.5)
    program = torch.export.export(Pure(), given)
    assert sum("batch_norm" in str(node.target) for node in calls(program)) == 1
    for found, expected in zip(program.module()(*given), Pure()(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", None])
def test_row_29_onnx(activation: str | None, tmp_path: Path) -> None:
    """Row 29: the exported network computes in onnxruntime what the layer computes in evaluation."""
    network = Network(activation=activation).eval()
    y, kinds = run_onnx(network, INPUTS, tmp_path)
    torch.testing.assert_close(y, network(*INPUTS).detach(), rtol=1e-5, atol=1e-5)
    assert kinds <= {"BatchNormalization", "Conv", "Add", "Relu"}


def test_row_29_onnx_of_a_16_bit_layer(tmp_path: Path) -> None:
    """Row 29: float16 input and parameters with float32 statistics."""
    layer = scramble(batchnorm.BatchNorm1d(5)).half().eval()
    x = torch.linspace(-2, 2, 30).view(6, 5).half()
    y, _ = run_onnx(layer, (x,), tmp_path)
    torch.testing.assert_close(y, layer(x).detach(), rtol=2e-3, atol=2e-3)


def around_norms() -> nn.Module:
    """Norms before and behind everything that an exporter's optimizer folds them into."""
    norm = batchnorm.BatchNorm2d
    model = nn.Sequential(
        norm(3),
        nn.Conv2d(3, 4, 3),
        norm(4, activation="elu"),
        nn.Conv2d(4, 4, 1, bias=False),
        norm(4, affine=False),
        nn.ConvTranspose2d(4, 3, 2),
        norm(3, activation="hardswish", statistics=batchnorm.Running()),
        norm(3, activation="gelu", statistics=batchnorm.Adapted(8)),
        nn.Flatten(),
        nn.Linear(75, 6),
        batchnorm.BatchNorm1d(6, activation="leaky_relu"),
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 4, 1),
        batchnorm.BatchNorm1d(4),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    for layer in model:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            scramble(layer)
    return model.eval()


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor:torch.jit.TracerWarning")
@pytest.mark.parametrize("exporter", ["default", "program", "traced"])
def test_row_72_onnx_of_a_16_bit_model(exporter: str, tmp_path: Path) -> None:
    """Row 72: it had float32 parameters folded into float16 layers, which ONNX Runtime does not load."""
    model = around_norms()
    x = torch.linspace(-2, 2, 4 * 3 * 36).view(4, 3, 6, 6)
    wanted = model(x).detach()
    y, _ = run_onnx(model.half(), (x.half(),), tmp_path, exporter)
    assert y.dtype == torch.float16
    # Some twenty roundings to float16, each by up to 2^-11 of a value, of values up to 5.
    torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=2e-2)


class Masked(nn.Module):
    """A norm by the running statistics, one by a policy; both with an activation, and a mask."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        adapted = batchnorm.BatchNorm1d(3, activation="gelu", statistics=batchnorm.Adapted(4))
        self.norms = nn.ModuleList([scramble(batchnorm.BatchNorm1d(3, activation="elu")), scramble(adapted)])
        self.norms = self.norms[:layers]
        self.register_buffer("mask", torch.rand(4, 5) > 0.4)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x, mask=self.mask)
        return x


@pytest.mark.one_in(5)
@pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("exporter", ["default", "traced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_onnx_of_policies_and_masks(dtype: torch.dtype, exporter: str, tmp_path: Path) -> None:
    """ONNX Runtime has few activations in float64, and in bfloat16 little but casts."""
    model = Masked(layers=1 if dtype == torch.bfloat16 else 2).to(dtype).eval()
    x = torch.randn(4, 3, 5).to(dtype)
    y, _ = run_onnx(model, (x,), tmp_path, exporter)
    assert y.dtype == dtype
    close = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(y, model(x).detach(), rtol=close, atol=close)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of the function under test
def test_a_traced_mask_counts_the_values_of_other_inputs() -> None:
    model = batchnorm.BatchNorm1d(3, statistics=batchnorm.Adapted(4)).eval().requires_grad_(False)
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) > 0.4
    traced = torch.jit.trace(lambda x, mask: model(x, mask=mask), (x, mask))
    x, mask = torch.randn(2, 3, 9), torch.rand(2, 9) > 0.4
    torch.testing.assert_close(traced(x, mask), model(x, mask=mask))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_torch_export_of_16_bit_layers(dtype: torch.dtype, training: bool) -> None:
    layer = scramble(batchnorm.BatchNorm2d(5)).to(dtype).train(training)
    x = torch.randn(4, 5, 3, 3).to(dtype)
    exported = torch.export.export(layer, (x,)).module()
    # Both round the same value once, each by at most half of 2^-7 of it.
    torch.testing.assert_close(exported(x), layer(x), rtol=2**-7, atol=2**-7)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of the function under test
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_jit_trace(options: dict[str, Any]) -> None:
    network = Network(**options).eval()
    traced = torch.jit.trace(network, INPUTS)
    assert "aten::batch_norm" in str(traced.inlined_graph)
    longer = tuple(torch.cat([t, t * 2]) for t in INPUTS)
    torch.testing.assert_close(traced(*longer), network(*longer), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of the function under test
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_jit_script_shares_parameters_and_statistics(momentum: float | None, training: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 5), scramble(batchnorm.BatchNorm1d(5, momentum=momentum)))
    model.train(training)
    layer = model[1]
    scripted = torch.jit.script(model)
    x = torch.randn(6, 5)
    before = state(model)
    y = scripted(x)
    after = state(model)
    assert training != torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert_identical(state(scripted), after)
    dy = torch.randn_like(y)
    y.backward(dy)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.load_state_dict(before)
    model.zero_grad()
    ours = torch.nn.Sequential(model[0], layer)(x)
    torch.testing.assert_close(y, ours, rtol=1e-5, atol=1e-5)
    ours.backward(dy)
    for scripted_gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(scripted_gradient, parameter.grad, rtol=1e-5, atol=1e-5)
    assert layer.running_mean is model[1].running_mean
    file = io.BytesIO()
    torch.jit.save(scripted, file)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of the function under test
def test_jit_script_refuses_an_activation_and_says_what_to_do() -> None:
    model = nn.Sequential(batchnorm.BatchNorm1d(5, activation="relu"))
    with pytest.raises(OptionError, match=r"BatchNorm1d: torch\.jit\.script.*'relu'.*torch\.export"):
        torch.jit.script(model)
