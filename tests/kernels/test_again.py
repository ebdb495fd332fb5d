"""`normalize` with the statistics that `forward` found gives the output of `forward` again, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchnorm.kernels.choose import load
from tests.support.cases import ACTIVATIONS
from tests.support.primitives import Primitives
from tests.torch.twins import relaid

SMALL = [(6, 5), (300, 33), (4, 5, 7), (3, 20, 9, 8), (2, 16, 16, 16), (5, 7, 13, 11), (2, 3, 4, 5, 6)]
LARGE = [(4099, 200), (4, 16, 160, 160), (16, 128, 28, 29), (2, 3, 9, 200, 97)]
LARGE_GROUPS = dict(zip(LARGE, ((16, 100, 1000), (1, 3), (2, 4, 7), (1,)), strict=True))
LAYOUTS = ["contiguous", "channels_last", "strided", "batch_last"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def differing(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    affine: bool,
    mask: Tensor | None = None,
    group_size: int | None = None,
) -> int:
    """Return how many values of the output differ between the two ways."""
    engine = Primitives(load(name))
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    parameters = [torch.randn(x.shape[1], dtype=real) if affine else None for _ in range(2)]
    options = {"residual": residual, "activation": activation, "mask": mask, "group_size": group_size}
    y, found, rstd = engine.forward(x, 1e-5, *parameters, **options)
    again = engine.normalize(x, found.mean, rstd, *parameters, **options)
    assert again.stride() == y.stride()
    assert again.storage_offset() == y.storage_offset()
    assert y.isfinite().all()
    return int((again != y).sum())


def masked(x: Tensor, residual: Tensor) -> Tensor:
    """Return a mask, of the last sample all; what it leaves out becomes NaN."""
    mask = torch.rand(x.shape[0], *x.shape[2:]) > 0.3
    mask[-1] = False
    for values in (x, residual):
        values.masked_fill_(~mask.unsqueeze(1), torch.nan)
    return mask


def group_sizes(samples: int) -> set[int]:
    """Return sizes of groups: some that divide the samples, some that leave a smaller group at the end."""
    return {1, 2, max(1, samples // 2 - 1), samples // 2, samples - 1} - {0}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_small_tensors_in_every_layout(activation: str | None, dtype: torch.dtype, name: str) -> None:
    for shape in SMALL:
        for layout in LAYOUTS:
            x, residual = (relaid(torch.randn(shape, dtype=dtype) + 2, layout) for _ in range(2))
            for added in (None, residual, residual.contiguous()):
                assert differing(name, x, added, activation, affine=added is not None) == 0, (shape, layout)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_small_tensors_with_masks_and_groups(
    activation: str | None, is_masked: bool, dtype: torch.dtype, name: str
) -> None:
    for shape in SMALL:
        for layout in LAYOUTS:
            x, residual = (relaid(torch.randn(shape, dtype=dtype) + 2, layout) for _ in range(2))
            mask = masked(x, residual) if is_masked else None
            for group_size in (None, *group_sizes(shape[0])) if is_masked else group_sizes(shape[0]):
                for added in (None, residual):
                    found = differing(name, x, added, activation, added is not None, mask, group_size)
                    assert found == 0, (shape, layout, group_size)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("is_masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_tensors_with_masks_and_groups(
    shape: tuple[int, ...], is_masked: bool, layout: str, dtype: torch.dtype
) -> None:
    x, residual = (relaid(torch.randn(shape, dtype=dtype) + 2, layout) for _ in range(2))
    mask = masked(x, residual) if is_masked else None
    for group_size in {None, *LARGE_GROUPS[shape]} if is_masked else LARGE_GROUPS[shape]:
        for added, activation in ((None, None), (residual, "relu")):
            found = differing("cpu", x, added, activation, True, mask, group_size)
            assert found == 0, (group_size, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_tensors(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """In parts, whose statistics are merged; written past the caches."""
    x, residual = (relaid(torch.randn(shape, dtype=dtype) + 2, layout) for _ in range(2))
    for added, activation in ((None, None), (None, "relu"), (residual, "relu"), (residual, "silu")):
        assert differing("cpu", x, added, activation, affine=True) == 0, activation
