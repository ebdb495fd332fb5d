"""Whole layers on the engine for GPUs: on a GPU, or in Triton's interpreter; against the other engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.kernels import explain, use
from tests.support.interpreted import DEVICE, HAS_TRITON
from tests.torch.lean_nets import Residual, gradients, small_net
from tests.torch.twins import assert_identical, assert_same, relaid, scramble, state, step

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here: what is compiled, or captured, needs one")

# float32 within 2e-6 of the reference each, of values up to about 4.
CLOSE = (4e-6, 8e-6)


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """Return a layer on the device and one on the CPU, in the same state."""
    ours = scramble(batchnorm.BatchNorm2d(5, **options))
    other = batchnorm.BatchNorm2d(5, **options)
    other.load_state_dict(ours.state_dict())
    return ours.to(DEVICE), other


def tensors(number: int, layout: str = "contiguous") -> list[Tensor]:
    return [relaid(torch.randn(7, 5, 3, 4) + 2, layout) for _ in range(number)]


def on_the_cpu(found: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.cpu() for name, tensor in found.items()}


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum-none": {"momentum": None},
    "no-affine": {"affine": False},
    "relu": {"activation": "relu"},
    "ghost": {"statistics": batchnorm.Ghost(3), "activation": "silu"},
    "ghost-sequential": {"statistics": batchnorm.Ghost(3, sequential=True)},
    "renorm": {"statistics": batchnorm.Renorm()},
    "adapted": {"statistics": batchnorm.Adapted(4)},
    "running": {"statistics": batchnorm.Running(), "activation": "gelu"},
    "skip": {"nonfinite": "skip"},
    "warm-start": {"warm_start": True},
    "lenient": {"small_batch": "running", "statistics": batchnorm.Ghost(3)},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_row_27_layers_in_every_layout(
    options: dict[str, Any], with_residual: bool, training: bool, layout: str
) -> None:
    """Row 27: output, gradients, running statistics and counters, as other engines have them."""
    ours, other = (layer.train(training) for layer in pair(**options))
    given = tensors(2 + with_residual, layout)
    with use("gpu"):
        assert explain(given[0].to(DEVICE)).startswith("gpu")
        found = step(ours, *(t.to(DEVICE) for t in given))
    assert_same(on_the_cpu(found), step(other, *given), CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_masks_leave_out_whatever_is_there(training: bool) -> None:
    ours, other = (layer.train(training) for layer in pair(activation="hardswish"))
    x, residual, dy = tensors(3)
    mask = torch.rand(7, 3, 4) > 0.3
    x.masked_fill_(~mask.unsqueeze(1), torch.nan)
    results = []
    for layer, device, engine in ((ours, DEVICE, "gpu"), (other, "cpu", "eager")):
        with use(engine):
            leaves = [t.detach().to(device).requires_grad_() for t in (x, residual)]
            y = layer(*leaves, mask=mask.to(device))
            y.backward(dy.to(device))
        found = {"y": y.detach(), "dx": leaves[0].grad, "dresidual": leaves[1].grad}
        results.append(on_the_cpu(found | state(layer)))
    assert_same(*results, CLOSE)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_is_skipped(bad: float) -> None:
    layer, _ = pair(nonfinite="skip")
    before = state(layer)
    x = torch.randn(7, 5, 3, 4)
    x[3, 2, 1, 1] = bad
    with use("gpu"):
        layer(x.to(DEVICE))
    assert layer.skipped == 1
    assert_identical({n: t for n, t in state(layer).items() if n in before}, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(dtype: torch.dtype) -> None:
    """As autocast gives them to a layer: parameters stay float32."""
    ours, other = pair(activation="relu6")
    x, dy = (t.to(dtype) for t in tensors(2))
    with use("gpu"):
        found = step(ours, x.to(DEVICE), dy.to(DEVICE))
    assert found["y"].dtype == dtype
    assert_same(on_the_cpu(found), step(other, x, dy), (2**-7, 2**-7))


def test_functions_of_their_own() -> None:
    x, mean, var = torch.randn(6, 5, 4), torch.randn(5), torch.rand(5) + 0.5
    results = []
    for device, engine in ((DEVICE, "gpu"), ("cpu", "eager")):
        running = [mean.clone().to(device), var.clone().to(device)]
        with use(engine):
            y = batchnorm.functional.batch_norm(x.to(device), *running, training=True, momentum=0.3)
            given = batchnorm.functional.batch_norm(x.to(device), *running)
            pure = batchnorm.functional.pure_batch_norm(x.to(device), *running, training=True)
            found = batchnorm.functional.moments(x.to(device))
        results.append([t.cpu() for t in (y, given, *running, *pure, *found) if isinstance(t, Tensor)])
    for ours, others in zip(*results, strict=True):
        torch.testing.assert_close(ours, others, rtol=4e-6, atol=4e-6)


def test_row_23_lean_gives_the_same_gradients_bit_for_bit() -> None:
    """Row 23: a chain of norms with residuals; what is recomputed for the backward is what was there."""
    net = nn.Sequential(small_net(1)[:2], Residual(4, (4, 4)), Residual(4, (4, 4))).to(DEVICE)
    x = torch.randn(2, 4, 6, 6, device=DEVICE)
    with use("gpu"):
        assert_identical(gradients(net, x, batchnorm.lean, steps=1), gradients(net, x, steps=1))


class _Watch(TorchDispatchMode):
    """Notes what would make the host wait for a device, or let it branch by data."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if any(name.startswith(wait) for wait in self.WAITS):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_row_14_the_host_never_waits(options: dict[str, Any]) -> None:
    """Row 14: no step of training reads a number back; so a CUDA graph can hold it."""
    if "statistics" in options and not options["statistics"].is_plain(True) and DEVICE == "cpu":
        pytest.skip("on a CPU, policies between the halves compute in NumPy")
    layer, _ = pair(**options)
    x, dy = (t.to(DEVICE) for t in tensors(2))
    with use("gpu"), _Watch() as watch:
        step(layer, x, dy)
    assert watch.waits == []


@on_a_gpu
def test_row_14_a_cuda_graph_captures_a_step() -> None:
    """Row 14: replayed, it does what a step does, running statistics included."""
    captured, eager = (layer.to(DEVICE) for layer in pair(activation="relu", nonfinite="skip"))
    x, dy = (t.to(DEVICE) for t in tensors(2))
    leaf = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured(leaf).backward(dy)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    captured.load_state_dict(eager.state_dict())
    captured.zero_grad()
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(leaf)
        y.backward(dy)
    captured.load_state_dict(eager.state_dict())
    for number in range(2):
        with torch.no_grad():
            leaf.copy_(x + number)
        graph.replay()
        expected = step(eager, x + number, dy)
        assert torch.equal(y, expected["y"])
        assert torch.equal(leaf.grad, expected["dx"])
    assert_identical(state(captured), state(eager))


@pytest.fixture
def no_earlier_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@on_a_gpu
@pytest.mark.usefixtures("no_earlier_graphs")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"statistics": batchnorm.Ghost(3)}], ids=str)
def test_row_28_compiled_is_eager(options: dict[str, Any], training: bool, backend: str) -> None:
    """Row 28: in one graph, on a GPU."""
    compiled, eager = (layer.to(DEVICE).train(training) for layer in pair(**options))
    compiled.compile(backend=backend, fullgraph=True)
    for _ in range(2):
        given = [t.to(DEVICE) for t in tensors(3)]
        assert_same(step(compiled, *given), step(eager, *given), CLOSE)


@on_a_gpu
@pytest.mark.usefixtures("no_earlier_graphs")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_row_28_compiled_is_eager_where_kernels_take_parts(layout: str) -> None:
    """Row 28: Inductor launches the kernels itself, behind and before operations of its own."""
    compiled, eager = (layer.to(DEVICE) for layer in pair(activation="relu"))
    x, dy, residual = (relaid(torch.randn(16, 5, 64, 60) + 2, layout).to(DEVICE) for _ in range(3))
    found = []
    for layer in (compiled, eager):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]

        def run(x: Tensor, residual: Tensor, layer: nn.Module = layer) -> Tensor:
            return layer(x.exp(), residual.sin()).cos()

        y = (torch.compile(run, fullgraph=True) if layer is compiled else run)(*leaves)
        y.backward(dy)
        found.append({"y": y.detach(), "dx": leaves[0].grad, "dresidual": leaves[1].grad} | state(layer))
    assert_same(*found, (1e-4, 1e-4))


def test_a_layer_on_a_gpu_is_on_this_engine_unasked() -> None:
    if DEVICE == "cpu":
        assert explain(torch.zeros(2, 3)).startswith("cpu")  # nobody is given an interpreter unasked
    else:
        assert explain(torch.zeros(2, 3, device=DEVICE)).startswith("gpu")
