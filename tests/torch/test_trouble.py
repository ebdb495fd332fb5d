"""Rows 3 and 19: batches with inf or NaN, and batches too small to have a variance."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm import kernels
from batchnorm.errors import InputShapeError, NonFiniteError, OptionError
from batchnorm.statistics.policy import Policy
from tests.support.covering import covering_array
from tests.torch.twins import assert_identical, scramble, state, step

POLICIES = [
    batchnorm.Batch(),
    batchnorm.Ghost(2),
    batchnorm.Ghost(2, sequential=True),
    batchnorm.Renorm(1.5, 0.5, (0, 9), (0, 0)),
    batchnorm.Adapted(),
    batchnorm.Synced(over=batchnorm.Ghost(3)),
]
EVERY_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=str)
PATHS = ["cpu", "eager", "compiled", "transformed"]
BAD = [float("inf"), float("-inf"), float("nan")]


def norm(**options: Any) -> nn.Module:
    return scramble(batchnorm.BatchNorm2d(5, **options))


def batch(bad: float | None = None) -> Tensor:
    x = torch.randn(6, 5, 3, 4) + 1
    if bad is not None:
        x[4, 2, 1, 1] = bad
    return x


def call(layer: nn.Module, path: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the output of a call that takes this path; the layer's buffers move."""
    if path == "compiled":
        torch.compiler.reset()
        return torch.compile(layer, backend="aot_eager", fullgraph=True)(x, None, mask)
    if path == "transformed":
        buffers = dict(layer.named_buffers())

        def pure(x: Tensor, buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            return torch.func.functional_call(layer, buffers, (x, None, mask)), buffers

        y, _, moved = torch.func.vjp(lambda x: pure(x, buffers), x, has_aux=True)
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(moved[name])
        return y
    with kernels.use(path):
        return layer(x, None, mask)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("policy", "path", "bad"), covering_array(POLICIES, PATHS, BAD), ids=str)
def test_row_3_a_bad_batch_leaves_no_trace_but_a_count(policy: Policy, path: str, bad: float) -> None:
    """Row 3: skipped and counted; the next batch moves the statistics as if there had been none."""
    layer = norm(statistics=policy, nonfinite="skip")
    twin, before, good = copy.deepcopy(layer), state(layer), batch()
    y = call(layer, path, batch(bad))
    assert not y[4, 2].isfinite().any()  # the output does not hide it: a scaler of gradients must see it
    assert y[:, [0, 1, 3, 4]].isfinite().all()
    assert_identical(state(layer), before)
    assert layer.skipped == 1
    call(layer, path, good)
    call(twin, path, good)
    assert_identical(state(layer), state(twin))
    assert layer.num_batches_tracked > before["num_batches_tracked"]
    assert (layer.skipped, twin.skipped) == (1, 0)


def test_row_3_without_it_one_bad_batch_is_in_the_statistics_for_ever() -> None:
    """Row 3: as in torch; the tests above would see it."""
    layer = norm()
    layer(batch(float("inf")))
    layer(batch())
    assert not layer.running_mean[2].isfinite()
    assert layer.skipped is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("policy", "bad", "path"), covering_array(POLICIES, BAD, PATHS[:3]), ids=str)
def test_row_3_a_layer_that_refuses_bad_batches_names_itself(policy: Policy, bad: float, path: str) -> None:
    """Row 3: with the channel; nothing has changed; no reason is what is masked, or evaluated."""
    layer = norm(statistics=policy, nonfinite="raise")
    model = nn.Sequential(nn.Identity(), nn.Sequential(layer))
    before, mask = state(layer), torch.ones(6, 3, 4, dtype=torch.bool)
    message = r"inf or NaN in channel 2 \(1 of 5\).*nonfinite=\"skip\""
    if path == "compiled":
        with pytest.raises(NonFiniteError, match=message):
            call(layer, path, batch(bad))
    else:
        with kernels.use(path), pytest.raises(NonFiniteError, match=rf"^1\.0 \(BatchNorm2d\): .*{message}"):
            model(batch(bad))
    assert_identical(state(layer), before)
    mask[4, 1, 1] = False
    assert call(layer, path, batch(bad), mask).isfinite().all()
    after = state(layer)
    call(layer.eval(), path, batch(bad))
    assert_identical(state(layer), after)


def test_row_3_a_layer_refuses_bad_batches_within_a_transform_too() -> None:
    """Row 3: of `torch.func`; a good batch goes through."""
    layer = norm(nonfinite="raise")
    with pytest.raises(NonFiniteError, match=r"inf or NaN in channel 2 \(1 of 5\)"):
        call(layer, "transformed", batch(float("nan")))
    assert call(layer, "transformed", batch()).isfinite().all()


def test_row_3_the_counter_is_no_part_of_the_state() -> None:
    """Row 3: stock's state_dict; but copies have it, and it goes where the layer goes."""
    layer = norm()
    layer.register_buffer("users", torch.zeros(2), persistent=False)  # it stays out of the state, too
    layer.nonfinite = "skip"
    layer(batch(float("nan")))
    assert list(layer.state_dict()) == list(batchnorm.BatchNorm2d(5).state_dict())
    assert copy.deepcopy(layer).skipped == 1
    assert copy.deepcopy(layer).to("meta").skipped.device.type == "meta"
    layer.nonfinite = "propagate"
    layer.nonfinite = "skip"
    assert layer.skipped == 1
    with pytest.raises(OptionError, match=r"nonfinite must be 'propagate', 'skip' or 'raise'; got 'ignore'"):
        layer.nonfinite = "ignore"


class Unread(TorchDispatchMode):
    """Raise where the host reads a value of a tensor, which it would wait for a device to compute."""

    READERS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        assert not name.startswith(self.READERS), f"{name} reads a value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("small_batch", ["raise", "running"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY_POLICY
def test_row_3_the_host_never_waits(
    policy: Policy, training: bool, momentum: float | None, masked: bool, small_batch: str
) -> None:
    """Row 3: no value is read by the host, neither to skip, nor to count, nor for a mask or a policy."""
    layer = norm(statistics=policy, nonfinite="skip", momentum=momentum, small_batch=small_batch)
    layer.train(training)
    x = batch(float("inf")).requires_grad_()
    mask = torch.rand(6, 3, 4) > 0.3 if masked else None
    with kernels.use("eager"), Unread():
        layer(x, x.detach(), mask).backward(torch.ones(6, 5, 3, 4))
    with pytest.raises(AssertionError, match="reads a value"), Unread():  # it does watch
        bool(torch.ones(()) > 0)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY_POLICY
def test_row_3_tensors_without_values_pass(policy: Policy, training: bool, masked: bool) -> None:
    """Row 3: fake tensors have no values that anybody could read, and every shape comes out."""
    with FakeTensorMode() as mode:
        layer = batchnorm.BatchNorm2d(5, statistics=policy, nonfinite="skip", momentum=None).train(training)
        x = mode.from_tensor(torch.zeros(6, 5, 3, 4)).requires_grad_()
        mask = torch.ones(6, 3, 4, dtype=torch.bool) if masked else None
        y = layer(x, None, mask)
        y.backward(y.detach())
        assert y.shape == x.grad.shape == (6, 5, 3, 4)


@pytest.mark.parametrize("engine", ["cpu", "eager"])
@pytest.mark.parametrize(
    "policy",
    [batchnorm.Batch(), batchnorm.Ghost(4), batchnorm.Renorm(2, 2, (0, 0), (0, 0)), batchnorm.Adapted()],
    ids=str,
)
def test_row_19_a_batch_of_one(policy: Policy, engine: str) -> None:
    """Row 19: refused with the layer's name and the remedies; small_batch="running": as in evaluation."""
    layer = scramble(batchnorm.BatchNorm1d(5, statistics=policy, activation="tanh"))
    model, x, dy = nn.Sequential(nn.Identity(), layer), torch.randn(1, 5), torch.randn(1, 5)
    before = state(layer)
    with kernels.use(engine):
        with pytest.raises(
            InputShapeError,
            match=r"^1 \(BatchNorm1d\): Expected more than 1 value.*drop_last=True.*small_batch=.*\.eval",
        ):
            model(x)
        assert_identical(state(layer), before)
        layer.small_batch = "running"
        found = step(layer, x, dy)
        twin = copy.deepcopy(layer).eval()
        twin.statistics = batchnorm.Batch()
        twin.load_state_dict(before)
        expected = step(twin, x, dy)
    expected["num_batches_tracked"] += 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    with pytest.raises(OptionError, match="small_batch must be 'raise' or 'running'; got 'ignore'"):
        batchnorm.BatchNorm1d(5, small_batch="ignore")


@pytest.mark.parametrize("engine", ["cpu", "eager"])
@pytest.mark.parametrize("policy", [batchnorm.Batch(), batchnorm.Ghost(4), batchnorm.Synced()], ids=str)
def test_row_19_one_value_that_counts_under_a_mask_is_beta(policy: Policy, engine: str) -> None:
    """small_batch="raise" looks at sizes, as the host would wait for a mask: y = β, and nothing moves."""
    layer = scramble(batchnorm.BatchNorm1d(5, statistics=policy, activation="tanh"))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, 2] = True
    before, x, dy = state(layer), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    with kernels.use(engine):
        found = step(layer, x, dy, mask=mask)
    expected = torch.zeros(3, 5, 4)
    expected[1, :, 2] = layer.bias.detach().tanh()
    torch.testing.assert_close(found["y"], expected, rtol=1e-6, atol=1e-6)
    assert found["dx"].abs().max() < 1e-5  # rounding, times 1 / sqrt(eps)
    for name in ("running_mean", "running_var"):
        assert torch.equal(found[name], before[name])
    layer.small_batch = "running"
    with kernels.use(engine):
        y = layer(x, mask=mask)
    twin = copy.deepcopy(layer).eval()
    torch.testing.assert_close(y[1, :, 2], twin(x, mask=mask)[1, :, 2], rtol=1e-6, atol=1e-6)
