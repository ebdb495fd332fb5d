"""Under `torch.compile` a layer computes what it computes eagerly, in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import BatchNormError
from tests.support.covering import covering_array
from tests.torch.twins import TOLERANCES, assert_identical, assert_same, scramble, state, step

pytestmark = pytest.mark.usefixtures("no_earlier_graphs")


def pair(backend: str = "aot_eager", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return a compiled layer and an eager one in the same state."""
    eager = scramble(batchnorm.BatchNorm2d(5, **options))
    layer = batchnorm.BatchNorm2d(5, **options)
    layer.load_state_dict(eager.state_dict())
    layer.compile(backend=backend, fullgraph=True)
    return layer, eager


OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "silu"},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"statistics": batchnorm.Running()},
]


@pytest.mark.parametrize(
    ("options", "with_residual", "training"), covering_array(OPTIONS, [True, False], [True, False]), ids=str
)
def test_row_28_compiled_is_eager(options: dict[str, Any], with_residual: bool, training: bool) -> None:
    """Row 28: output, gradients, running statistics and counter, over two steps."""
    compiled, eager = (layer.train(training) for layer in pair(**options))
    for _ in range(2):
        tensors = [torch.randn(4, 5, 3, 7) + 2 for _ in range(2 + with_residual)]
        assert_same(step(compiled, *tensors), step(eager, *tensors), TOLERANCES[torch.float32])


def test_row_28_freezing_a_compiled_layer_is_noticed() -> None:
    """Row 28: a policy that changes is a guard of the graph, both ways."""
    compiled, eager = pair(activation="tanh")
    for policy in (batchnorm.Batch(), batchnorm.Running(), batchnorm.Batch()):
        compiled.statistics = eager.statistics = policy
        x, dy = torch.randn(4, 5, 3, 7) + 2, torch.randn(4, 5, 3, 7)
        assert_same(step(compiled, x, dy), step(eager, x, dy), TOLERANCES[torch.float32])
    assert eager.num_batches_tracked == 5


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")  # inductor's own, at import
def test_row_28_compiled_with_inductor_is_eager() -> None:
    """Row 28: the default backend, with an activation, a residual, and channels-last input."""
    compiled, eager = pair("inductor", activation="relu", momentum=None)
    x, dy, residual = (torch.randn(4, 5, 3, 7) + 2 for _ in range(3))
    x = x.to(memory_format=torch.channels_last)
    try:
        found = step(compiled, x, dy, residual)
    except Exception as error:
        if "InvalidCxxCompiler" not in f"{type(error)} {error}":
            raise
        pytest.skip("no C++ compiler, which torch's inductor needs")
    assert_same(found, step(eager, x, dy, residual), TOLERANCES[torch.float32])


def test_row_28_dynamic_batch_size_compiles_once() -> None:
    """Row 28: one graph serves every batch size."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    eager = scramble(batchnorm.BatchNorm1d(5))
    layer = batchnorm.BatchNorm1d(5)
    layer.load_state_dict(eager.state_dict())
    layer.compile(backend=backend, fullgraph=True, dynamic=True)
    for samples in (8, 5, 13, 64):
        x, dy = torch.randn(samples, 5), torch.randn(samples, 5)
        assert_same(step(layer, x, dy), step(eager, x, dy), TOLERANCES[torch.float32])
    assert len(graphs) == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_16_bit_and_autocast(training: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), scramble(batchnorm.BatchNorm2d(5, activation="relu")))
    network.train(training)
    x, dy, before = torch.randn(2, 3, 7, 7), torch.randn(2, 5, 5, 5), state(network)
    found = []
    for model in (torch.compile(network, backend="aot_eager", fullgraph=True), network):
        network.load_state_dict(before)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.backward(dy.to(y.dtype))
        found.append({"y": y.detach(), "dweight": network[1].weight.grad.clone(), **state(network)})
        assert y.dtype is torch.bfloat16
    assert_same(*found, tolerance=(1e-2, 1e-2))


def test_an_error_under_compile_is_ours_and_changes_nothing() -> None:
    layer = scramble(batchnorm.BatchNorm1d(5))
    before = state(layer)
    layer.compile(backend="aot_eager")
    with pytest.raises(BatchNormError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 5))
    assert_identical(state(layer), before)


def vector(**options: Any) -> Tensor:
    return torch.rand(5, **options)


@pytest.mark.parametrize("given", [True, False], ids=["given", "batch"])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_operators_pass_torch_s_own_check(affine: bool, activation: str | None, given: bool) -> None:
    """Schema, fake tensors, autograd registration and tracing, by `torch.library.opcheck`."""
    x, residual, dy = (torch.randn(4, 5, 3, requires_grad=True) for _ in range(3))
    weight, bias = (vector(requires_grad=True) if affine else None for _ in range(2))
    wide = [vector(dtype=torch.float64).view(1, 5) for _ in range(2)]
    statistics = wide if given else [None, None]
    torch.library.opcheck(
        torch.ops.batchnorm.normalize.default,
        (x, weight, bias, residual, None, *statistics, activation, 1e-5, None, False),
    )
    tensors = [None if t is None else t.detach() for t in (x, dy, weight, bias, residual)]
    torch.library.opcheck(
        torch.ops.batchnorm.normalize_backward.default, (*tensors, None, *wide, activation, given, None)
    )


def test_row_28_a_second_derivative_of_a_compiled_layer_is_refused() -> None:
    """The compiler's own limit, for any layer; it must be an error, and no wrong number."""
    compiled, _ = pair(activation="silu")
    x = torch.randn(4, 5, 3, 7, requires_grad=True)
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.square().sum().backward()
