"""Drop-in, by torch's own recorded samples of `nn.functional.batch_norm`: ours against stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as stock

from batchnorm import functional as ours
from tests.torch.recorded import FUNCTION_CASES, LEFT_IN_ENVIRONMENT, function_samples
from tests.torch.twins import TOLERANCES, assert_same

CASES = pytest.mark.parametrize("index", FUNCTION_CASES)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def evaluated(function: Any, sample: Any, dy: Tensor, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return output, gradients and running statistics of `function`, computed in `dtype`, in the sample's."""
    original = sample.input.dtype

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype or original, copy=True)

    x, *rest = (leaf(tensor) for tensor in (sample.input, *sample.args))
    inputs = {"x": x.requires_grad_()}
    for name, tensor in zip(("running_mean", "running_var", "weight", "bias"), rest, strict=False):
        inputs[name] = tensor
        if tensor is not None and name in ("weight", "bias"):
            tensor.requires_grad_()
    y = function(*inputs.values(), **sample.kwargs)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach()}
    for name, tensor in inputs.items():
        found[name] = None if tensor is None else (tensor.grad if tensor.requires_grad else tensor)
    return {name: None if t is None else t.to(original) for name, t in found.items()}


def test_the_recorded_samples_leave_torch_as_it_was() -> None:
    assert torch.get_default_dtype() is torch.float32
    assert torch.backends.__allow_nonbracketed_mutation_flag
    assert set() == LEFT_IN_ENVIRONMENT
    assert len(FUNCTION_CASES) >= 12
    assert any(sample.input.dim() == 1 for sample in function_samples(torch.float32))
    assert any(sample.kwargs.get("momentum") == -1.2 for sample in function_samples(torch.float32))


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_output_gradients_and_statistics(index: int, dtype: torch.dtype) -> None:
    sample = function_samples(dtype)[index]
    dy = torch.randn_like(sample.input)
    found = [evaluated(f.batch_norm, sample, dy) for f in (ours, stock)]
    scale = max(1.0, float(found[1]["y"].abs().max())) if dy.numel() else 1.0
    rtol, atol = TOLERANCES[dtype]
    assert_same(*found, tolerance=(rtol, atol * scale))


@pytest.mark.one_in(5)
@CASES
@HALVES
def test_16_bit_is_stock_in_float64_rounded_once(index: int, dtype: torch.dtype) -> None:
    sample = function_samples(dtype)[index]
    dy = torch.randn_like(sample.input)
    found = evaluated(ours.batch_norm, sample, dy)
    expected = evaluated(stock.batch_norm, sample, dy, torch.float64)
    # Where two float64 results straddle the middle of two 16-bit numbers, they round one unit apart.
    assert_same(found, expected, tolerance=(torch.finfo(dtype).eps, 1e-7))


@pytest.mark.one_in(5)
@CASES
@HALVES
def test_16_bit_input_with_float32_parameters(index: int, dtype: torch.dtype) -> None:
    """Row 32: float32 statistics and parameters serve a 16-bit input, and stay float32."""
    sample = function_samples(torch.float32)[index]
    x, tensors = sample.input.to(dtype), [None if t is None else t.clone() for t in sample.args]
    y = ours.batch_norm(x, *tensors, **sample.kwargs)
    wide = [None if t is None else t.double() for t in sample.args]
    expected = stock.batch_norm(x.double(), *wide, **sample.kwargs)
    assert y.dtype is dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    for found, reference in zip(tensors[:2], wide[:2], strict=True):
        if found is not None:
            assert found.dtype is torch.float32
            torch.testing.assert_close(found, reference.float(), rtol=1e-6, atol=1e-6)


def differentiable(sample: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the sample as a function of those of its tensors that are differentiated."""
    everything = [sample.input, *sample.args]
    places = [i for i, t in enumerate(everything) if t is not None and i not in (1, 2)]

    def function(*tensors: Tensor) -> Tensor:
        arguments = [None if t is None else t.detach().clone() for t in everything]
        for place, tensor in zip(places, tensors, strict=True):
            arguments[place] = tensor
        return ours.batch_norm(*arguments, **sample.kwargs)

    return function, tuple(everything[i].detach().requires_grad_() for i in places)


@pytest.mark.one_in(2)
@CASES
def test_gradcheck(index: int) -> None:
    function, inputs = differentiable(function_samples(torch.float64)[index])
    assert gradcheck(
        function,
        inputs,
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.one_in(2)
@CASES
def test_gradgradcheck(index: int) -> None:
    function, inputs = differentiable(function_samples(torch.float64)[index])
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@CASES
def test_forward_mode(index: int) -> None:
    sample = function_samples(torch.float64)[index]
    tangent = torch.randn_like(sample.input)
    found = []
    for function in (ours.batch_norm, stock.batch_norm):
        running = [None if t is None else t.clone() for t in sample.args]
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(sample.input, tangent), *running, **sample.kwargs)
            found.append(dict(zip(("y", "tangent"), forward_ad.unpack_dual(y), strict=True)))
    assert_same(*found, tolerance=(1e-11, 1e-11))
