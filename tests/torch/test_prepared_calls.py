"""Plain calls on a CPU, which run launches that earlier calls of the same kind have prepared.

What is kept between calls depends on shapes, strides, dtypes and options alone. These tests change all else
between two calls, and compare each call with a float64 stock layer of the values that hold at that moment.
"""

from __future__ import annotations

import contextvars
import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import functional
from batchnorm.errors import BatchNormError
from tests.support.cases import Case
from tests.support.compare import assert_close, case_results
from tests.support.programs import run_python
from tests.torch.prepared import (
    MODES,
    SHAPE,
    Change,
    assert_exact,
    assert_values,
    batch,
    exact_twin,
    norm,
    nothing_new_prepared,
)
from tests.torch.twins import assert_identical, relaid, scramble, state, step


def data_of(name: str, change: Callable[[Tensor], object]) -> Change:
    return lambda layer: change(getattr(layer, name).data)


CHANGES: dict[str, Change] = {
    "weight": data_of("weight", lambda data: data.mul_(1.7)),
    "bias": data_of("bias", lambda data: data.sub_(2)),
    "running_mean": data_of("running_mean", lambda data: data.add_(3)),
    "running_var": data_of("running_var", lambda data: data.mul_(5)),
    "count": data_of("num_batches_tracked", lambda data: data.fill_(41)),
    "momentum": lambda layer: setattr(layer, "momentum", 0.7),
    "eps": lambda layer: setattr(layer, "eps", 0.5),
    "mode": lambda layer: layer.train(not layer.training),
    "optimizer": lambda layer: torch.optim.SGD(layer.parameters(), lr=0.5).step(),
}


@MODES
@pytest.mark.parametrize("change", CHANGES)
def test_a_value_changed_between_two_calls_is_seen_by_the_second(change: str, training: bool) -> None:
    """Changes that autograd does not see count too: by `.data`, and by an optimizer."""
    layer, (x, dy) = norm().train(training), batch()
    for mode in (not training, training):
        assert_exact(layer.train(mode), x, dy)
    before = state(layer)
    CHANGES[change](layer)
    if change in ("momentum", "eps", "mode"):
        assert_exact(layer, x, dy)
        return
    assert any(not torch.equal(value, before[name]) for name, value in state(layer).items())
    with nothing_new_prepared():
        assert_exact(layer, *batch())


@MODES
def test_two_graphs_of_one_shape_do_not_mix(training: bool) -> None:
    """All changes between the forwards; each backward is by the statistics of its own forward.

    As with the stock layer, a weight that `.data` changes behind autograd's back enters both gradients.
    """
    layer = norm().train(training)
    (x, dy), (other_x, other_dy) = batch(), batch()
    assert_exact(layer, x, dy)
    first = exact_twin(layer)
    leaf, other_leaf = x.clone().requires_grad_(), other_x.clone().requires_grad_()
    with nothing_new_prepared():
        y = layer(leaf)
        for name in ("weight", "bias", "running_mean", "running_var"):
            CHANGES[name](layer)
        second = exact_twin(layer)
        other_y = layer(other_leaf)
        other = torch.autograd.grad(other_y, [other_leaf, layer.weight, layer.bias], other_dy)
        gradients = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)
    names = ("y", "dx", "dweight", "dbias")
    expected = step(second, other_x.double(), other_dy.double())
    assert_values(dict(zip(names, (other_y, *other), strict=True)), expected, names)
    assert_close(y, step(first, x.double(), dy.double())["y"], dtype=y.dtype, what="first y")
    first.weight.data.copy_(layer.weight.data)
    expected = step(first, x.double(), dy.double())
    assert_values(dict(zip(names[1:], gradients, strict=True)), expected, names[1:])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_evaluation_sees_parameters_and_statistics_changed_in_place(mode: type) -> None:
    layer, (x, _) = norm().eval(), batch()
    changes: list[Change] = [
        lambda layer: layer.weight.mul_(1.7),
        lambda layer: layer.bias.sub_(2),
        lambda layer: layer.running_mean.add_(3),
        lambda layer: layer.running_var.mul_(5),
        lambda _: None,
    ]
    with mode():
        layer(x)
        for change in changes:
            expected = exact_twin(layer)(x.double())
            with nothing_new_prepared():
                assert_close(layer(x), expected, dtype=x.dtype, what="y")
            with torch.no_grad():
                change(layer)


# Of one shape and different in one thing each; twice over, so that each runs behind each other's launch.
KINDS_OF_CALL = [
    Case("prepared-plain", SHAPE),
    Case("prepared-relu", SHAPE, activation="relu"),
    Case("prepared-relu6", SHAPE, activation="relu6"),
    Case("prepared-silu", SHAPE, activation="silu"),
    Case("prepared-masked", SHAPE, masked=True),
    Case("prepared-groups", SHAPE, group_size=2),
    Case("prepared-other-groups", SHAPE, group_size=3),
    Case("prepared-channels-last", SHAPE, "channels_last"),
    Case("prepared-strided", SHAPE, "strided"),
    Case("prepared-float64", SHAPE, dtype=torch.float64),
    Case("prepared-bfloat16", SHAPE, dtype=torch.bfloat16),
    Case("prepared-residual", SHAPE, residual=True, activation="relu"),
    Case("prepared-no-affine", SHAPE, affine=False),
]


def test_calls_that_differ_in_one_option_have_launches_of_their_own() -> None:
    for case in KINDS_OF_CALL * 2:
        inputs, expected = case.make(), case_results(case)
        x, weight, bias, residual, dy, mask = inputs
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        policy = batchnorm.Batch() if case.group_size is None else batchnorm.Ghost(case.group_size)
        y = functional.batch_norm(
            leaves[0],
            None,
            None,
            *leaves[1:3],
            training=True,
            residual=leaves[3],
            activation=case.activation,
            mask=mask,
            statistics=policy,
        )
        y.backward(dy)
        assert_close(y, expected.y, dtype=y.dtype, what=f"{case} y")
        for leaf, name in zip(leaves, ("dx", "dweight", "dbias", "dresidual"), strict=True):
            if leaf is not None:
                scale = expected.std if name == "dx" else 1.0
                what = f"{case} {name}"
                assert_close(leaf.grad, getattr(expected, name), dtype=leaf.dtype, scale=scale, what=what)


def trained(seed: int, shape: tuple[int, ...], layout: str, activation: str | None) -> dict[str, Any]:
    """Return what the last of some steps of a layer on its own data gave."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layer = batchnorm.BatchNorm2d(shape[1], activation=activation)
    with torch.no_grad():
        layer.weight.add_(noise(shape[1]) / 4)
        layer.bias.add_(noise(shape[1]))
    found = {}
    for _ in range(25):
        x, dy = (relaid(noise(*shape), layout) for _ in range(2))
        found = step(layer, x + 1, dy)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(parameter.grad, alpha=1e-3)
    return found


def test_layers_in_eight_threads_give_the_bits_of_one_after_the_other() -> None:
    """Of equal and of different shapes and options, small ones and one that torch's own threads share."""
    large = (8, 16, 16, 17)
    jobs: list[tuple[Any, ...]] = [(seed, SHAPE, "contiguous", None) for seed in range(4)]
    jobs += [(4, SHAPE, "channels_last", None), (5, SHAPE, "contiguous", "silu")]
    jobs += [(6, (3, 7, 5, 5), "contiguous", "relu"), (7, large, "contiguous", "relu")]
    expected = [trained(*job) for job in jobs]
    start = threading.Barrier(len(jobs))

    def together(job: tuple[Any, ...]) -> dict[str, Any]:
        start.wait()
        return trained(*job)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            for found, wanted in zip(pool.map(together, jobs), expected, strict=True):
                assert_identical(found, wanted)
    finally:
        sys.setswitchinterval(interval)


# A process of its own: the threads of other libraries that tests have loaded do not survive a fork. Only our
# kernels touch the larger tensors in the child, where torch's operators would wait for the parent's threads.
FORK = """
import copy, multiprocessing, sys, numpy, torch
import batchnorm

torch.set_num_threads(2)
calls = []
for shape in ((6, 5, 4, 3), (8, 16, 16, 17)):
    layer = batchnorm.BatchNorm2d(shape[1])
    calls.append((layer, copy.deepcopy(layer), torch.randn(shape).requires_grad_(), torch.randn(shape)))

def results(layer, x, dy):
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    return [t.detach().numpy() for t in (y, *gradients, layer.running_mean, layer.running_var)]

def child():
    for (_, twin, x, dy), wanted in zip(calls, expected):
        for mine, parents in zip(results(twin, x, dy), wanted):
            assert numpy.array_equal(mine, parents), x.shape

if __name__ == "__main__":
    expected = [results(layer, x, dy) for layer, _, x, dy in calls]
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(30)
    process.kill()  # one that waits for threads that it does not have
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a fork of a process with threads is safe on Linux only")
def test_a_forked_child_computes_what_its_parent_did() -> None:
    run_python("-c", FORK)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_number_of_threads_changed_between_two_calls_changes_no_bit(layout: str) -> None:
    shape = (9, 16, 61, 47)  # several tasks in both layouts
    layer = scramble(batchnorm.BatchNorm2d(16, dtype=torch.float64))
    x, dy = (relaid(t, layout) for t in batch(torch.float64, shape))
    start = state(layer)
    assert_exact(layer, x, dy)
    found = []
    for count in (1, 2, 3, 1, 3, 2):
        torch.set_num_threads(count)
        layer.load_state_dict(start)
        found.append(step(layer, x, dy))
    for other in found[1:]:
        assert_identical(other, found[0])


# The layer that takes the input: kind, channels, dtype. The input's shape. What a layer of 5 channels says.
REFUSED = {
    "channels": (batchnorm.BatchNorm1d, 6, None, (4, 6), "running_mean should contain 6 elements not 5"),
    "one-value": (batchnorm.BatchNorm1d, 5, None, (1, 5), "Expected more than 1 value per channel"),
    "one-value-4d": (batchnorm.BatchNorm2d, 5, None, (1, 5, 1, 1), "Expected more than 1 value per channel"),
    "dtype": (batchnorm.BatchNorm1d, 5, torch.float64, (4, 5), "weight is float32 and the input is float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_is_refused_where_another_layers_of_its_shape_was_not(case: str) -> None:
    """Its state stays, its error is the one of a layer that was never called, and it goes on as before."""
    kind, channels, dtype, shape, message = REFUSED[case]
    x, dy = batch(dtype or torch.float32, shape)
    willing, layer, fresh = scramble(kind(channels, dtype=dtype)).eval(), scramble(kind(5)), kind(5)
    for training in (False, True)[: 1 if case.startswith("one-value") else 2]:
        assert_exact(willing.train(training), x, dy)
    fine = batch(shape=(4, 5, *shape[2:]))
    assert_exact(layer, *fine)
    before, errors = state(layer), []
    with nothing_new_prepared():
        for one in (layer, fresh, layer):
            with pytest.raises(BatchNormError, match=message) as caught:
                one(x)
            errors.append((caught.type, str(caught.value)))
        assert errors[1:] == errors[:1] * 2
        assert_identical(state(layer), before)
        assert_exact(layer, *fine)


def changed(layer: nn.Module, name: str, value: object) -> nn.Module:
    setattr(layer, name, value)
    return layer


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "no-count": lambda: changed(norm(), "num_batches_tracked", None),
    "no-count-nor-momentum": lambda: changed(norm(momentum=None), "num_batches_tracked", None),
    "momentum-none": lambda: norm(momentum=None),
    "momentum-1": lambda: norm(momentum=1),
    "momentum-0": lambda: norm(momentum=0),
    "momentum-0.0": lambda: norm(momentum=0.0),
    "momentum-1.0": lambda: norm(momentum=1.0),
    "untracked": lambda: norm(track_running_stats=False),
    "untracked-later": lambda: changed(norm(), "track_running_stats", False),
}


@MODES
@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_running_statistics_move_as_in_stock(kind: str, training: bool) -> None:
    """Behind calls of an ordinary layer with the same launches."""
    assert_exact(norm().train(training), *batch())
    layer = UNUSUAL[kind]().train(training)
    for _ in range(3):
        assert_exact(layer, *batch())


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_transform_takes_no_plain_call(activation: str | None) -> None:
    """Neither one of the input, nor of something else, nor of a cotangent, nor forward mode."""
    warm = batchnorm.BatchNorm1d(3, activation=activation).eval()
    with torch.no_grad():
        warm.running_mean.normal_()
        warm.weight.uniform_(0.5, 2)
    fresh = copy.deepcopy(warm)
    x, scale, dy = torch.randn(4, 5, 3).unbind(1)[0], torch.randn(4, 3), torch.randn(4, 3)
    many = torch.randn(6, 4, 3)

    def found(layer: nn.Module, again: bool) -> list[Tensor]:
        def call(t: Tensor) -> Tensor:
            if again:
                layer(x)  # so that the layer has a plain call of this kind
            return layer(t)

        y = call(leaf := x.clone().requires_grad_())
        return [
            torch.func.grad(lambda t: (call(t) * dy).sum())(x),
            torch.func.grad(lambda t: (call(x) * t * dy).sum())(scale),
            torch.func.jvp(call, (x,), (scale,))[1],
            torch.func.vmap(call)(many),
            torch.func.vmap(lambda t: call(x) * t)(many),
            torch.autograd.grad(y, leaf, many, is_grads_batched=True)[0],
            torch.autograd.functional.hessian(lambda t: call(t).pow(3).sum(), x),
        ]

    for ours, expected in zip(found(warm, True), found(fresh, False), strict=True):
        torch.testing.assert_close(ours, expected)


def test_within_a_transform_that_cannot_write_a_warm_layer_refuses_as_a_fresh_one() -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(5, 3)
    layer(x)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(batchnorm.errors.OptionError, match=r"torch\.func cannot write"):
        torch.func.grad(lambda t: layer(t).pow(3).sum())(x)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_jit_trace_records_torchs_own_operators_after_plain_calls() -> None:
    layer, x = batchnorm.BatchNorm1d(3).eval(), torch.randn(5, 3)
    expected = layer(x)
    traced = torch.jit.trace(layer, (x,))
    assert "aten::batch_norm" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)


def test_parameters_of_16_bits_are_read_anew_and_have_gradients_of_16_bits() -> None:
    layer = batchnorm.BatchNorm1d(3, activation="relu").to(torch.bfloat16)
    x, dy = torch.randn(6, 3).bfloat16(), torch.randn(6, 3).bfloat16()
    for scale in (1.0, 2.0):
        layer.weight.data.fill_(scale)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        with batchnorm.kernels.use("cpu"):  # the general path, of the same kernels
            other = copy.deepcopy(layer)
            other.zero_grad()
            again = x.clone().requires_grad_()
            expected = other(again)
            expected.backward(dy)
        assert torch.equal(y, expected)
        assert torch.equal(leaf.grad, again.grad)
        assert layer.weight.grad.dtype == torch.bfloat16
        assert torch.equal(layer.weight.grad, other.weight.grad)
        assert torch.equal(layer.bias.grad, other.bias.grad)


class _Hooks:
    """Hooks that return another tensor than was saved."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __enter__(self) -> None:
        self._context = torch.autograd.graph.saved_tensors_hooks(self.change, lambda t: t)
        self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.contiguous() if t.dim() == 4 else t,
        lambda t: torch.empty(t.size(), dtype=t.dtype).copy_(t),  # as `save_on_cpu(pin_memory=True)`
        lambda t: t.clone().as_strided(t.shape, t.stride()) if t.dim() != 1 else t.repeat_interleave(2)[::2],
    ],
    ids=["another layout", "copied", "strided vectors"],
)
def test_saved_tensors_that_hooks_have_changed_give_the_same_gradients(
    change: Callable[[Tensor], Tensor],
) -> None:
    layer = batchnorm.BatchNorm2d(3, activation="gelu")
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    found = []
    for hooks in (_Hooks(lambda t: t), _Hooks(change)):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        with hooks:
            y = layer(*leaves)
        found.append(torch.autograd.grad(y, (*leaves, layer.weight, layer.bias), dy))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected)


def test_an_engine_asked_for_by_a_context_that_outlives_its_block_is_heeded() -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(5, 3, requires_grad=True)
    layer(x)
    with batchnorm.kernels.use("eager"):
        context = contextvars.copy_context()
    assert "Plain" in type(layer(x).grad_fn).__name__
    assert "Plain" not in type(context.run(layer, x).grad_fn).__name__


def test_a_backward_keeps_the_engine_of_its_forward() -> None:
    layer, x = batchnorm.BatchNorm1d(3).eval(), torch.randn(5, 3, requires_grad=True)
    y = layer(x)
    with batchnorm.kernels.use("eager"):
        (found,) = torch.autograd.grad(y.pow(2).sum(), layer.weight, create_graph=True)
    (expected,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_of_a_model_that_calls_forward_records_torchs_own_operators() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(3).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm.forward(x)

    model, x = Model(), torch.randn(5, 3)
    model(x)
    assert "aten::batch_norm" in str(torch.jit.trace(model, (x,)).inlined_graph)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_residual_is_named_as_one() -> None:
    layer, x = batchnorm.BatchNorm2d(3), torch.randn(4, 3, 8, 8)
    nested = torch.nested.nested_tensor([torch.randn(3, 8, 8) for _ in range(4)])
    for _ in range(2):
        with pytest.raises(batchnorm.errors.InputTypeError, match="residual is a nested tensor"):
            layer(x, nested)
        layer(x)


def test_a_layer_keeps_no_graph_of_a_computed_weight() -> None:
    layer, x = batchnorm.BatchNorm1d(3), torch.randn(5, 3)
    base = torch.ones(3, requires_grad=True)
    torch.func.functional_call(layer, {"weight": base * 2, "bias": torch.zeros(3)}, (x,))
    assert layer._plain is None or layer._plain.tensors[0].grad_fn is None


def test_a_tensor_of_a_transform_that_is_over_is_normalized() -> None:
    layer, kept = batchnorm.BatchNorm1d(3).eval(), []
    x = torch.randn(5, 3)

    def leak(t: Tensor) -> Tensor:
        kept.append(t)
        return t.sum()

    torch.func.grad(leak)(x)
    for _ in range(2):
        torch.testing.assert_close(layer(kept[0]), layer(x))
