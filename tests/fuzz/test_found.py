"""Regressions that the fuzzer found, each shrunk by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import batchnorm
from batchnorm import functional, kernels, reference
from batchnorm.errors import InputShapeError, OptionError
from batchnorm.statistics.policy import Policy
from tests.torch.twins import assert_identical, scramble, state

ENGINES = pytest.mark.parametrize("engine", ["cpu", "eager"])


def test_row_19_a_batch_of_one_value_counts_as_an_empty_one_does() -> None:
    """Row 19: with small_batch="running" it leaves the statistics alone, masked or not, and is counted."""
    one, masked = torch.randn(1, 3), torch.tensor([True, False])
    layer = scramble(batchnorm.BatchNorm1d(3, small_batch="running"))
    before = state(layer)
    for seen, (x, mask) in enumerate([(one, None), (one.repeat(2, 1), masked), (one[:0], None)], start=4):
        y = layer(x, mask=mask)
        assert layer.num_batches_tracked == seen
        assert_identical(state(layer) | {"num_batches_tracked": before["num_batches_tracked"]}, before)
        if len(x):
            torch.testing.assert_close(y[:1], layer.eval()(one))
        layer.train()


def test_an_empty_batch_has_an_empty_mask_within_a_transform() -> None:
    x, mask = torch.zeros(0, 3, 2), torch.zeros(0, 2, dtype=torch.bool)
    y, vjp = torch.func.vjp(
        lambda x: functional.pure_batch_norm(x, None, None, training=True, mask=mask)[0], x
    )
    assert y.shape == vjp(y)[0].shape == x.shape


@ENGINES
@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 5, 4)], ids=str)
def test_one_inf_spoils_no_other_gradient_of_given_statistics(shape: tuple[int, ...], engine: str) -> None:
    """dx = weight rstd dy, wherever x is finite: nothing there depends on another value."""
    layer = scramble(batchnorm.BatchNorm1d(2) if len(shape) == 2 else batchnorm.BatchNorm2d(2)).eval()
    x, dy = torch.randn(shape), torch.randn(shape)
    clean = x.clone().requires_grad_()
    layer(clean).backward(dy)
    x.view(-1)[0] = torch.inf
    x.requires_grad_()
    with kernels.use(engine):
        layer(x).backward(dy)
    torch.testing.assert_close(x.grad.view(-1)[1:], clean.grad.view(-1)[1:])


def test_the_share_of_a_masked_batch_is_as_exact_as_the_rest() -> None:
    """Samples are counted in integers there, and integers divide to float32."""
    layer = scramble(batchnorm.BatchNorm1d(3, statistics=batchnorm.Adapted(0.5), dtype=torch.float64)).eval()
    x = torch.randn(7, 3, dtype=torch.float64)
    assert torch.equal(layer(x, mask=torch.ones(7, dtype=torch.bool)), layer(x))


def test_a_momentum_in_a_tensor_is_as_exact_as_its_number() -> None:
    """1 - momentum is taken in the statistics' dtype, not in the momentum's."""
    x, momentum = torch.randn(7, 3, dtype=torch.float64), torch.tensor(0.1)
    found = []
    for value in (momentum, momentum.item()):
        running = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        functional.batch_norm(x, *running, training=True, momentum=value)
        found.append(torch.stack(running))
    torch.testing.assert_close(*found, rtol=1e-15, atol=1e-15)


def test_the_reference_takes_an_empty_mask_and_masks_what_is_not_finite() -> None:
    running = reference.Running(np.zeros(2), np.ones(2))
    nothing = np.zeros((0, 2, 3))
    found = reference.adapted(
        nothing, nothing, None, None, running, prior=0.0, mask=np.zeros((0, 3), dtype=bool)
    )
    assert found.y.shape == (0, 2, 3)
    x, mask = np.array([[np.inf], [1.0]]), np.array([True, False])
    with np.errstate(invalid="ignore"):
        gradients = reference.backward(x, x * 0 + 1, residual=x, activation="silu", mask=mask)
    assert gradients.dx[1] == gradients.dresidual[1] == 0


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@ENGINES
def test_a_vector_in_another_shape_is_refused(name: str, engine: str) -> None:
    """Of two channels and two samples, eager operations would have spread a column along the samples."""
    layer = scramble(batchnorm.BatchNorm1d(2))
    tensors = layer._buffers if name.startswith("running") else layer._parameters
    tensors[name] = tensors[name].detach().unsqueeze(1).clone()
    with (
        kernels.use(engine),
        pytest.raises(InputShapeError, match=rf"BatchNorm1d: {name} has shape \[2, 1\]"),
    ):
        layer(torch.randn(2, 2))


@pytest.mark.parametrize("policy", [batchnorm.Renorm(), batchnorm.Running(), batchnorm.Adapted()], ids=str)
def test_a_policy_whose_statistics_have_gone_is_refused(policy: Policy) -> None:
    layer = batchnorm.BatchNorm1d(2, statistics=policy)
    layer.running_var = None
    with pytest.raises(OptionError, match=r"BatchNorm1d: statistics=.* uses running statistics"):
        layer(torch.randn(4, 2))


def test_counters_move_with_the_statistics_or_not_at_all() -> None:
    """The last to be written cannot be; what torch raises names the layer."""
    layer = scramble(batchnorm.BatchNorm1d(2, nonfinite="skip"))
    layer._buffers["skipped"] = layer.skipped.expand(2)
    before = state(layer)
    with pytest.raises(RuntimeError, match="single memory location") as caught:
        layer(torch.randn(4, 2))
    assert "the layer BatchNorm1d" in caught.value.__notes__[0]
    assert_identical(state(layer), before)


def test_statistics_of_inference_mode_are_refused_before_torch_writes_to_them() -> None:
    with torch.inference_mode():
        layer = scramble(batchnorm.BatchNorm1d(2, momentum=None, affine=False))
    x, before = torch.randn(4, 2), state(layer)
    for _ in range(2):
        with pytest.raises(OptionError, match=r"BatchNorm1d: .*made under torch\.inference_mode"):
            layer(x)
        assert_identical(state(layer), before)
    with torch.inference_mode():
        layer(x)
    assert layer.num_batches_tracked == 4
