"""The per-channel mathematics against the reference, on NumPy arrays and on torch tensors."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch

from batchnorm import reference
from batchnorm.errors import OptionError
from batchnorm.statistics import batch
from batchnorm.statistics.adapted import Adapted
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.moments import PooledMoments, merge, pooled
from batchnorm.statistics.policy import Known, Policy, gradient_coefficients
from batchnorm.statistics.policy_config import from_config, from_text
from batchnorm.statistics.renorm import Renorm
from batchnorm.statistics.running import Running
from batchnorm.statistics.synced import Synced

KINDS = pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])


@KINDS
@pytest.mark.parametrize("sizes", [(5, 8), (1, 30), (0, 4), (4, 0), (0, 0)], ids=str)
def test_merge_gives_the_moments_of_the_union(kind: object, sizes: tuple[int, int]) -> None:
    a, b = (np.random.randn(size, 3) * 2 + 100 for size in sizes)
    parts = [reference.moments(part) for part in (a, b)]
    found = merge(*(PooledMoments(*(kind(field[0]) for field in part)) for part in parts))
    expected = reference.moments(np.concatenate([a, b]))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs[0], rtol=1e-12, atol=1e-12)


@KINDS
def test_running_update_is_torchs_convention(kind: object) -> None:
    old, new = kind(np.array([1.0, -2.0])), kind(np.array([3.0, 5.0]))
    np.testing.assert_allclose(np.asarray(batch.running_update(old, new, 0.1)), [1.2, -1.3], rtol=1e-15)
    np.testing.assert_allclose(np.asarray(batch.running_update(old, new, 1.0)), [3.0, 5.0], rtol=0)


@pytest.mark.parametrize("sizes", [(5, 8, 1), (0, 4, 3), (6,), (0, 0)], ids=str)
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_pooled_gives_the_moments_of_all_parts(xp: object, sizes: tuple[int, ...]) -> None:
    parts = [np.random.randn(size, 3) * 2 + 1e5 for size in sizes]
    found = [reference.moments(part) for part in parts]
    kind = np.asarray if xp is np else torch.as_tensor
    stacked = PooledMoments(
        kind(np.stack([f.count for f in found])),
        kind(np.stack([f.mean[0] for f in found])),
        kind(np.stack([f.m2[0] for f in found])),
    )
    expected = reference.moments(np.concatenate(parts))
    for ours, theirs in zip(pooled(stacked, xp), expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs[0] if len(theirs) == 1 else theirs, rtol=1e-9)


class Numbers:
    """The functions of NumPy arrays that policies take."""

    sqrt, clip, where = np.sqrt, np.clip, np.where

    @staticmethod
    def stop_gradient(values: object) -> object:
        return values


PAST = Known(np.array([3.0, 4.5, 4.0]), np.array([0.5, 1.0, 4.0]), 9, 11.0, 1e-5)


@pytest.mark.parametrize(
    "policy",
    [Batch(), Ghost(11), Synced(), Renorm(2.0, 0.5, r_steps=(0, 0), d_steps=(0, 9)), Adapted(4.0)],
    ids=str,
)
def test_gradient_coefficients(policy: Policy) -> None:
    """On plain arrays, against the reference's own derivation of each."""
    x, dy, weight = np.random.randn(11, 3) + 4, np.random.randn(11, 3), np.array([0.5, -2.0, 3.0])
    running = reference.Running(PAST.mean, PAST.var)
    training = not isinstance(policy, Adapted)
    expected = reference.backward(x, dy, weight)
    if isinstance(policy, Renorm):
        expected = reference.renorm(x, dy, weight, None, running, r_max=2.0, d_max=0.5).gradients
    elif isinstance(policy, Adapted):
        expected = reference.adapted(x, dy, weight, None, running, prior=4.0).gradients
    found = reference.moments(x)
    batch = PooledMoments(found.count[:, None], found.mean, found.m2)
    chosen = policy.choose(batch, PAST, training, Numbers)
    xhat = (x - chosen.mean) * chosen.rstd
    sums = dy.sum(0, keepdims=True), (dy * xhat).sum(0, keepdims=True)
    a, b, c = gradient_coefficients(weight, chosen, batch, *sums)
    np.testing.assert_allclose(a * dy + b * xhat + c, expected.dx, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(sums[1][0], expected.dweight, rtol=1e-11, atol=1e-11)


def test_bounds_of_renorm_open_with_the_batches() -> None:
    """Closed, it is plain; half open, half the bounds; then as they are."""
    policy = Renorm(r_max=3.0, d_max=5.0, r_steps=(10, 30), d_steps=(20, 20))
    far = np.array([100.0, 100.0, 100.0])
    for batches, r, d in (
        (0, 1, 0),
        (10, 1, 0),
        (19, 1.9, 0),
        (20, 2, 5),
        (30, 3, 5),
        (10**9, 3, 5),
        (None, 3, 5),
    ):
        found = policy.corrections(far, far, PAST._replace(batches=batches), Numbers)
        np.testing.assert_allclose(found[0], np.full(3, float(r)))
        np.testing.assert_allclose(found[1], np.full(3, float(d)))


@pytest.mark.parametrize(
    "policy",
    [
        Batch(),
        Running(),
        Ghost(32),
        Ghost(4, sequential=True),
        Synced(),
        Synced([2, 0], over=Ghost(3), timeout=5),
        Synced(over=Renorm(r_steps=(1, 2))),
        Renorm(2, 1.5, r_steps=[0, 4]),
        Adapted(8),
    ],
    ids=str,
)
def test_a_policy_is_plain_data(policy: Policy) -> None:
    """Equal by its fields, hashable, frozen, and again from repr, pickle, its own fields or JSON."""
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    again = [
        type(policy)(**fields),
        eval(repr(policy)),
        pickle.loads(pickle.dumps(policy)),
        copy.deepcopy(policy),
        from_text(policy.text),
        from_config(json.loads(json.dumps(policy.config()))),
        dataclasses.replace(policy),
    ]
    for one in again:
        assert one == policy
        assert hash(one) == hash(policy)
        assert one.text == policy.text
        assert repr(one) == repr(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.name = "other"
    assert len({Batch(), Running(), Ghost(1), Ghost(2), Synced(), Adapted(), Renorm()}) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ghost(0), "size.* whole number of 1 or more; got 0"),
        (lambda: Ghost(2.5), "got 2.5"),
        (lambda: Ghost(True), "got True"),
        (lambda: Renorm(r_max=0.9), "r_max must be a finite number of 1 or more; got 0.9"),
        (lambda: Renorm(d_max=-1), "d_max must be .* 0 or more; got -1"),
        (lambda: Renorm(r_max=float("inf")), "finite"),
        (lambda: Renorm(r_max=float("nan")), "finite"),
        (lambda: Renorm(r_steps=(3, 2)), r"start <= end; got \(3, 2\)"),
        (lambda: Renorm(d_steps=5), r"\(start, end\)"),
        (lambda: Renorm(d_steps=(0, 1.5)), "whole number"),
        (lambda: Adapted(-1), "prior"),
        (lambda: Adapted("16"), "got '16'"),
        (lambda: Synced(()), r"such as \(0, 1\); got \(\)"),
        (lambda: Synced((0, 0)), "global ranks"),
        (lambda: Synced(object()), "get_process_group_ranks"),
        (lambda: Synced(timeout=0), "timeout"),
        (lambda: Synced(over=Running()), "over must be"),
        (lambda: Synced(over=Synced()), "over must be"),
        (lambda: from_config({"policy": "Ghost"}), "size"),
        (lambda: from_config({"policy": "Ghost", "size": 2, "colour": 1}), "no colour"),
        (lambda: from_config({"policy": "os.system"}), "known are"),
        (lambda: from_config(None), "known are"),
    ],
)
def test_what_cannot_be_is_refused(make: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()
