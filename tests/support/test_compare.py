"""Tests of the tests' own tools: the comparison fails when it should, and the cases are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .cases import CASES, Case, every_case
from .compare import assert_close, reference_results
from .tolerances import TOLERANCES

every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@every_dtype
def test_accepts_the_expected_values_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    expected = torch.randn(1000, dtype=torch.float64)
    assert_close(expected.to(dtype), expected, dtype=dtype, what="y")


@every_dtype
def test_refuses_one_wrong_value_and_says_where(dtype: torch.dtype) -> None:
    expected = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    actual = expected.to(dtype).double().clone()
    row = TOLERANCES[dtype]
    actual[1, 2] = expected[1, 2] + 2.1 * row.bound + 1.1 * row.rounding * expected[1, 2].abs()
    with pytest.raises(AssertionError, match=r"(?s)^dx .*1 of 12 values.*Worst at \(1, 2\): .*, expected"):
        assert_close(actual, expected, dtype=dtype, what="dx")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(wrong: float) -> None:
    with pytest.raises(AssertionError, match=r"Worst at \(1,\)"):
        assert_close([1.0, wrong], [1.0, 2.0], dtype=torch.float32, what="y")


def test_refuses_an_expectation_that_is_not_finite() -> None:
    with pytest.raises(AssertionError, match="not finite"):
        assert_close([np.nan], [np.nan], dtype=torch.float32, what="y")


def test_refuses_another_shape_even_if_it_broadcasts() -> None:
    with pytest.raises(AssertionError, match=r"shape \(1, 3\), expected \(3,\)"):
        assert_close(np.ones((1, 3)), np.ones(3), dtype=torch.float32, what="y")
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.ones((0, 3)), np.ones((0, 4)), dtype=torch.float32, what="y")


def test_compares_after_scaling() -> None:
    ours, theirs = np.array([[1e-3], [1.0]]), np.array([[1.01e-3], [1.0]])
    with pytest.raises(AssertionError):
        assert_close(ours, theirs, dtype=torch.float32, scale=np.array([[1e3], [1.0]]), what="dx")
    assert_close(ours, theirs, dtype=torch.float32, scale=np.array([[1e-3], [1.0]]), what="dx")


@every_case
def test_case_is_what_it_says(case: Case) -> None:
    inputs = case.make(seed=3)
    x, weight, bias, residual, dy, mask = inputs
    assert x.shape == dy.shape == case.shape
    assert x.dtype == dy.dtype == case.dtype
    assert (residual is not None) == case.residual
    assert (weight is not None) == (bias is not None) == case.affine
    assert (mask is not None) == (case.masked or case.all_masked)
    if weight is not None:
        assert ((weight.abs() - 1).abs() > 0.1).all()
        assert (weight.abs() > 0.1).all()
        assert (weight < 0).any()
        assert (weight > 0).any() or case.shape[1] == 1
    if mask is not None:
        assert x.movedim(1, -1)[~mask].isnan().all()
        assert x.movedim(1, -1)[mask].isfinite().all()
        assert mask.any() != case.all_masked
    if case.layout == "contiguous":
        assert x.is_contiguous()
    elif x.shape[1] > 1:
        assert not x.is_contiguous()
    if case.layout in ("channels_last", "mixed") and x.ndim == 4:
        assert x.is_contiguous(memory_format=torch.channels_last)


@every_case
def test_case_is_reproducible_and_finite_in_the_reference(case: Case) -> None:
    inputs = case.make(seed=3)
    torch.rand(5)
    for once, again in zip(inputs, case.make(seed=3), strict=True):
        assert (once is None and again is None) or torch.equal(once.nan_to_num(), again.nan_to_num())
    results = reference_results(case, inputs)
    for name, value in results._asdict().items():
        assert value is None or np.isfinite(value).all(), name
    if case.offset and case.dtype is torch.float32:
        spread = np.sqrt(results.var[results.count > 0])
        assert (np.abs(results.mean[results.count > 0]) / spread > 0.3 * case.offset).all()


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_fresh_memory_is_poisoned() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(3, dtype=dtype)
        for fresh in (
            torch.empty(1000, dtype=dtype),
            torch.empty_like(x),
            x.new_empty(7),
            torch.empty_strided((2, 3), (1, 2), dtype=dtype),
            torch.empty((2, 3, 4, 5), dtype=dtype, memory_format=torch.channels_last),
        ):
            assert fresh.isnan().all()
