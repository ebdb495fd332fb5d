"""Bit for bit the same from run to run, and for any number of threads."""

from __future__ import annotations

import pytest
import torch

import batchnorm
from tests.torch.twins import assert_identical, relaid, scramble, step

# Large enough for torch to share the work between threads; odd, so that nothing divides evenly.
# float64 results show the last bit of every sum, which rounding to float32 nearly always hides.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SHAPES = [(4099, 20), (50021, 3), (40009, 1), (7, 5, 113, 97), (5, 1, 211, 203), (3, 37, 67, 61), (257, 300)]


def layer_and_tensors(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> tuple[torch.nn.Module | torch.Tensor, ...]:
    kind = batchnorm.BatchNorm1d if len(shape) == 2 else batchnorm.BatchNorm2d
    layer = scramble(kind(shape[1], activation="silu", dtype=dtype))
    x, dy, residual = (relaid(torch.randn(shape, dtype=dtype) + 3, layout) for _ in range(3))
    return layer, x, dy, residual


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@DTYPES
def test_any_number_of_threads_gives_the_same_bits(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    layer, *tensors = layer_and_tensors(shape, layout, dtype)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        layer.load_state_dict(start)
        found.append(step(layer, *tensors))
    assert_identical(found[1], found[0])
    assert_identical(found[2], found[0])


@pytest.mark.parametrize("shape", [(13, 5), (3, 5, 7, 9)], ids=str)
@DTYPES
def test_every_run_gives_the_same_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, *tensors = layer_and_tensors(shape, "contiguous", dtype)
    start = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    first = step(layer, *tensors)
    for _ in range(3):
        layer.load_state_dict(start)
        assert_identical(step(layer, *tensors), first)
