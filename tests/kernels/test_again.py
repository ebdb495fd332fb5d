"""`normalize` with the statistics that `forward` found gives the output of `forward` again, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchnorm.kernels.choose import load
from tests.support.cases import ACTIVATIONS
from tests.torch.twins import relaid

SMALL = [(6, 5), (300, 33), (4, 5, 7), (3, 20, 9, 8), (2, 16, 16, 16), (5, 7, 13, 11), (2, 3, 4, 5, 6)]
LARGE = [(4099, 200), (4, 16, 160, 160), (16, 128, 28, 29), (2, 3, 9, 200, 97)]
LAYOUTS = ["contiguous", "channels_last", "strided", "batch_last"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def differing(name: str, x: Tensor, residual: Tensor | None, activation: str | None, affine: bool) -> int:
    """Return how many values of the output differ between the two ways."""
    engine = load(name)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameters = [torch.randn(x.shape[1], dtype=real) if affine else None for _ in range(2)]
    options = {"residual": residual, "activation": activation}
    y, found, rstd = engine.forward(x, 1e-5, *parameters, **options)
    again = engine.normalize(x, found.mean, rstd, *parameters, **options)
    assert again.stride() == y.stride()
    assert again.storage_offset() == y.storage_offset()
    return int((again != y).sum())


@pytest.mark.parametrize("name", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_small_tensors_in_every_layout(activation: str | None, dtype: torch.dtype, name: str) -> None:
    for shape in SMALL:
        for layout in LAYOUTS:
            x, residual = (relaid(torch.randn(shape, dtype=dtype) + 2, layout) for _ in range(2))
            for added in (None, residual, residual.contiguous()):
                assert differing(name, x, added, activation, affine=added is not None) == 0, (shape, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_tensors(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """In parts, whose statistics are merged; written past the caches."""
    x, residual = (relaid(torch.randn(shape, dtype=dtype) + 2, layout) for _ in range(2))
    for added, activation in ((None, None), (None, "relu"), (residual, "relu"), (residual, "silu")):
        assert differing("cpu", x, added, activation, affine=True) == 0, activation
