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
