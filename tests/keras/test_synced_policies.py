"""`statistics=Synced(over=...)`: the moments of all replicas, then the policy; row 22 of the user pains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.keras import BatchNormalization
from tests.support.compare import assert_close

from .gradients import Array
from .policy_cases import CASES, Case, Expected, expected, made_for
from .replicas import step_on

F32 = torch.float32
OVER = {
    "batch": batchnorm.Synced(),
    "ghost": batchnorm.Synced(over=batchnorm.Ghost(2)),
    "ghost-in-turn": batchnorm.Synced(over=batchnorm.Ghost(2, sequential=True)),
    "renorm": CASES["synced-renorm"].policy,
    "adapted": batchnorm.Synced(over=batchnorm.Adapted(4.0)),
}
# Samples 0 and 1 of both replicas are one ghost batch, and their last ones another: [3, 4, 5] each.
ORDER = np.array([0, 1, 3, 4, 2, 5])


def inputs(masked: bool) -> tuple[list[Array], list[Array], list[Array] | None]:
    """x, dy and mask of two replicas, of very different means."""
    random = np.random.default_rng(1)
    xs = [(random.standard_normal((3, 4, 5)) + apart).astype("float32") for apart in (0, 3)]
    dys = [random.standard_normal((3, 4, 5)).astype("float32") for _ in range(2)]
    if not masked:
        return xs, dys, None
    masks = [random.random((3, 4)) < 0.7, random.random((3, 4)) < 0.3]
    return (
        xs,
        [np.where(m[..., None], dy, 0).astype("float32") for m, dy in zip(masks, dys, strict=True)],
        masks,
    )


def one_process(policy: Any, parts: Any, weights: list[Array]) -> Expected:
    """Return the answer of one process for all samples, with ghost batches twice as large."""
    over = policy.over
    if isinstance(over, batchnorm.Ghost):
        over = batchnorm.Ghost(2 * over.size, over.sequential)
    x, dy, mask = (None if part is None else np.concatenate(part)[ORDER] for part in parts)
    found = expected(Case(over), np.moveaxis(x, -1, 1), np.moveaxis(dy, -1, 1), weights, mask=mask)
    back = np.argsort(ORDER)
    y, dx, std = (
        v if v.ndim < 3 or len(v) == 1 else np.moveaxis(v, 1, -1)[back]
        for v in (found.y, found.dx, found.std)
    )
    return found._replace(y=y, dx=dx, std=np.moveaxis(std, 0, -1) if std.ndim < 3 else std)


def check(found: list[dict[str, Array]], wanted: Expected, masks: list[Array] | None) -> None:
    keep = 1.0 if masks is None else np.concatenate(masks)[..., None]
    y, dx = (np.concatenate([part[name] for part in found]) for name in ("y", "dx"))
    assert_close(y * keep, wanted.y * keep, dtype=F32, what="y")
    assert_close(dx, wanted.dx, dtype=F32, what="dx")
    assert_close(sum(part["dgamma"] for part in found), wanted.dgamma, dtype=F32, what="dgamma")
    assert_close(sum(part["dbeta"] for part in found), wanted.dbeta, dtype=F32, what="dbeta")
    for part in found:
        assert_close(part["moving_mean"], wanted.mean, dtype=F32, what="moving_mean")
        assert_close(part["moving_variance"], wanted.var, dtype=F32, what="moving_variance")


@pytest.mark.on_every_backend
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("over", OVER)
def test_row_22_on_tensorflows_strategies(strategy: Any, over: str, masked: bool) -> None:
    xs, dys, masks = inputs(masked)
    with strategy.scope():
        layer = made_for(Case(OVER[over]), 5, -1, 3)
    wanted = one_process(OVER[over], (xs, dys, masks), layer.get_weights())

    names = ("y", "dx", "dgamma", "dbeta")
    local = step_on(strategy, layer, xs, dys, masks)
    moving = {name: getattr(layer, name).numpy() for name in ("moving_mean", "moving_variance")}
    check([dict(zip(names, part, strict=True)) | moving for part in zip(*local, strict=True)], wanted, masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": batchnorm.Synced(group=(0, 1))}, r"group=\(0, 1\) is for torch layers"),
        ({"statistics": batchnorm.Synced(timeout=5)}, "timeout=5 is for torch layers"),
        ({"statistics": batchnorm.Synced(), "synchronized": True}, "say the same thing twice"),
        (
            {"statistics": batchnorm.Renorm(), "renorm": True},
            r"renorm=True and statistics=Renorm\(.* two policies",
        ),
        ({"statistics": batchnorm.Ghost(3), "renorm": True}, "two policies"),
        ({"statistics": "ghost"}, r"statistics must be one of batchnorm.Batch\(\.\.\.\), .* got 'ghost'"),
        ({"statistics": batchnorm.Ghost}, "got <class"),
        ({"statistics": {"policy": "Ghostly"}}, "no statistics policy: .*Ghostly.*; known are Batch, Ghost"),
        ({"statistics": {"policy": "Ghost", "sizes": 3}}, "Ghost has no sizes"),
        ({"nonfinite": "raise"}, 'use nonfinite="skip"'),
        ({"nonfinite": "ignore"}, "nonfinite must be one of 'propagate', 'skip'; got 'ignore'"),
        ({"small_batch": "raise"}, 'use small_batch="running"'),
        ({"small_batch": 2}, "small_batch must be one of 'allow', 'running'; got 2"),
    ],
)
def test_what_cannot_be_is_refused_by_the_layers_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=rf"^one \(BatchNormalization\): .*{message}"):
        BatchNormalization(name="one", **options)
