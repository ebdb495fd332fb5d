"""Moments and Chan's merge against scikit-learn, exact rational arithmetic, and their own algebra."""

from __future__ import annotations

from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.utils.extmath import _incremental_mean_and_var

from batchnorm.reference import Moments, merge, moments
from tests.support.cases import Case, every_case
from tests.support.compare import as_array

values = st.floats(-1e3, 1e3, width=32)


def batches(samples: int | st.SearchStrategy[int] = 8) -> st.SearchStrategy[np.ndarray]:
    """x `[N, 2, 3]` with N from 0 to `samples`."""
    return st.integers(0, samples).flatmap(lambda n: hnp.arrays(np.float64, (n, 2, 3), elements=values))


def assert_moments_close(ours: Moments, theirs: Moments) -> None:
    """Raise unless both agree to roundings relative to the size of values up to 1e3."""
    np.testing.assert_array_equal(ours.count, theirs.count)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(ours.m2, theirs.m2, rtol=1e-11, atol=1e-7)


def by_sklearn(x: np.ndarray, mask: np.ndarray | None) -> Moments:
    """Moments of one group by scikit-learn, to which a masked value is a missing one."""
    x = x if mask is None else np.where(mask[:, None], x, np.nan)
    rows = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
    zero = np.zeros(x.shape[1])
    mean, var, count = _incremental_mean_and_var(rows, zero, zero, zero)
    return Moments(count[:1], mean[None], (var * count)[None])


@every_case
def test_moments_are_those_of_sklearn(case: Case) -> None:
    inputs = case.make()
    x = as_array(inputs.x)
    mask = None if inputs.mask is None else inputs.mask.numpy()
    ours = moments(x, mask, case.group_size)
    size = case.group_size or max(len(x), 1)
    groups = max(1, -(-len(x) // size))
    assert ours.count.shape == (groups,)
    assert ours.mean.shape == ours.m2.shape == (groups, x.shape[1])
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        if ours.count[group] == 0:
            assert mask is None or not mask[rows].any()
            assert not ours.mean[group].any()
            assert not ours.m2[group].any()
            continue
        theirs = by_sklearn(x[rows], None if mask is None else mask[rows])
        assert ours.count[group] == theirs.count[0]
        np.testing.assert_allclose(ours.mean[group], theirs.mean[0], rtol=1e-14)
        # scikit-learn does not correct its mean, and holds m2 to the same precision by the same correction.
        np.testing.assert_allclose(ours.m2[group], theirs.m2[0], rtol=1e-11)


@pytest.mark.parametrize("offset", [0, 10**6, 10**12, 2**52], ids=str)
def test_moments_are_exact_far_from_zero(offset: int) -> None:
    spread = np.random.default_rng(0).integers(-20, 20, size=(31, 1, 7))
    x = (spread + offset).astype(np.float64)
    exact = [Fraction(int(value)) for value in x.ravel()]
    mean = sum(exact) / len(exact)
    m2 = sum((value - mean) ** 2 for value in exact)
    ours = moments(x)
    assert abs(Fraction(float(ours.mean[0, 0])) - mean) <= Fraction(float(np.spacing(np.abs(x).max())))
    np.testing.assert_allclose(ours.m2[0, 0], float(m2), rtol=1e-13)


def test_variances_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).normal(3, 2, size=(5, 4, 3))
    ours = moments(x)
    np.testing.assert_allclose(ours.var[0], x.var(axis=(0, 2)), rtol=1e-13)
    np.testing.assert_allclose(ours.var_unbiased[0], x.var(axis=(0, 2), ddof=1), rtol=1e-13)


@pytest.mark.parametrize("samples", [0, 1])
def test_variances_of_less_than_two_values_are_zero(samples: int) -> None:
    ours = moments(np.ones((samples, 3)))
    assert not ours.var.any()
    assert not ours.var_unbiased.any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e300])
def test_nothing_leaks_from_masked_positions(garbage: float) -> None:
    x = np.random.default_rng(0).normal(size=(5, 4, 3))
    mask = np.random.default_rng(1).random((5, 3)) < 0.6
    clean = moments(x, mask, 2)
    dirty = moments(np.where(mask[:, None], x, garbage), mask, 2)
    for ours, theirs in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mask_of_the_wrong_shape_is_refused() -> None:
    x = np.ones((4, 3, 5))
    for mask in (np.ones((4, 3, 5), dtype=bool), np.ones(4, dtype=bool), np.ones((1, 5), dtype=bool)):
        with pytest.raises(ValueError, match=r"mask must be bool \(4, 5\)"):
            moments(x, mask)
    with pytest.raises(ValueError, match="float64"):
        moments(x, np.ones((4, 5)))


@given(x=batches(), data=st.data())
def test_masked_moments_are_those_of_the_compressed_values(x: np.ndarray, data: st.DataObject) -> None:
    mask = data.draw(hnp.arrays(np.bool_, (len(x), 3)))
    compressed = np.moveaxis(x, 1, -1)[mask]
    assert_moments_close(moments(x, mask), moments(compressed))


@given(x=batches(), size=st.integers(1, 9))
def test_groups_are_the_moments_of_their_slices(x: np.ndarray, size: int) -> None:
    ours = moments(x, group_size=size)
    slices = [moments(x[start : start + size]) for start in range(0, max(1, len(x)), size)]
    assert len(ours.count) == len(slices)
    for group, theirs in enumerate(slices):
        assert_moments_close(Moments(*(value[group : group + 1] for value in ours)), theirs)


@given(x=batches(12), cuts=st.lists(st.integers(0, 12), max_size=5))
def test_any_split_merges_to_the_same_moments(x: np.ndarray, cuts: list[int]) -> None:
    parts = [moments(part) for part in np.split(x, sorted(min(cut, len(x)) for cut in cuts))]
    assert_moments_close(reduce(merge, parts), moments(x))


@given(batches(), batches())
def test_merge_is_commutative(x: np.ndarray, y: np.ndarray) -> None:
    a, b = moments(x), moments(y)
    assert_moments_close(merge(a, b), merge(b, a))


@given(batches(), batches(), batches())
def test_merge_is_associative(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    a, b, c = moments(x), moments(y), moments(z)
    assert_moments_close(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(batches())
def test_merge_with_nothing_changes_nothing(x: np.ndarray) -> None:
    some, nothing = moments(x), moments(np.ones((0, 2, 3)))
    for merged in (merge(some, nothing), merge(nothing, some)):
        for ours, theirs in zip(merged, some, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_merge_is_that_of_sklearn() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(4, 2, size=(7, 5)), rng.normal(-1, 3, size=(12, 5))
    a, b = moments(first), moments(second)
    mean, var, count = _incremental_mean_and_var(second, a.mean[0], a.var[0], np.full(5, 7.0))
    ours = merge(a, b)
    assert ours.count == count[0]
    np.testing.assert_allclose(ours.mean[0], mean, rtol=1e-13)
    np.testing.assert_allclose(ours.var[0], var, rtol=1e-13)


def test_merge_goes_group_by_group() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 2)), rng.normal(3, size=(6, 2))
    a, b = moments(x, group_size=2), moments(y, group_size=2)
    for group, ours in enumerate(zip(*merge(a, b), strict=True)):
        rows = slice(2 * group, 2 * group + 2)
        theirs = moments(np.concatenate([x[rows], y[rows]]))
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other[0], rtol=1e-13)
