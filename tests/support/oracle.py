"""The expected results of a layer's call under any policy: output, gradients, and its state afterwards.

It puts the pieces of `batchnorm.reference` together as the documentation of layers and policies says, group
by group, and shares no code with what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm import reference
from batchnorm.statistics.adapted import Adapted
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.renorm import Renorm
from batchnorm.statistics.running import Running
from batchnorm.statistics.synced import Synced

from .compare import Array

Mask = NDArray[np.bool_] | None


class Values(NamedTuple):
    """The tensors of a call, float64; shapes as in `Inputs`."""

    x: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None
    dy: Array
    mask: Mask


class Past(NamedTuple):
    """The state of a layer before a call.

    Attributes:
        running: None = it tracks none.
        batches: None = it counts none.
    """

    running: reference.Running | None
    batches: int | None = 0


@dataclass(frozen=True)
class Options:
    """The options of a layer and its mode."""

    policy: Policy
    training: bool = True
    eps: float = 1e-5
    momentum: float | None = 0.1
    activation: str | None = None
    nonfinite: str = "propagate"
    small_batch: str = "raise"


class Expected(NamedTuple):
    """Expected results of a call.

    Attributes:
        y, dx, dweight, dbias, dresidual: as in `Results`.
        z: `[N, C, *S]`, the input of the activation.
        xhat: `[N, C, *S]`, (x - mean) rstd for the mean and rstd that were used.
        std: `[N, C, 1, ...]`, 1 / rstd of the same: puts dx in units of 1/std.
        running: after the call.
        batches, skipped: increments of the counters.
    """

    y: Array
    dx: Array
    dweight: Array
    dbias: Array
    dresidual: Array | None
    z: Array
    xhat: Array
    std: Array
    running: reference.Running | None
    batches: int
    skipped: int


class _Part(NamedTuple):
    """One group's share."""

    y: Array
    z: Array
    xhat: Array
    rstd: Array
    gradients: reference.Gradients


def expected_of(values: Values, past: Past, options: Options) -> Expected:
    """Return the expected results of a call that is not refused."""
    policy = options.policy.over if isinstance(options.policy, Synced) else options.policy
    training = options.training
    if past.running is None and not training:
        policy, training = Batch(), True
    x = values.x
    measures = not isinstance(policy, Running) and (training or isinstance(policy, Adapted))
    size = policy.size if isinstance(policy, Ghost) and training else max(1, len(x))
    parts = [
        _part(values, slice(start, start + size), past, policy, training, measures, options)
        for start in range(0, max(1, len(x)), size)
    ]

    def along(pieces: list[Array]) -> Array:
        return np.concatenate(pieces, axis=0)

    gradients = [part.gradients for part in parts]
    lengths = [min(size, len(x) - start) for start in range(0, max(1, len(x)), size)]
    spread = (len(x), x.shape[1], *[1] * (x.ndim - 2))
    std = [np.broadcast_to(1 / p.rstd, (n, x.shape[1])) for p, n in zip(parts, lengths, strict=True)]
    dresidual = None if values.residual is None else along([g.dresidual for g in gradients])  # type: ignore[misc]
    is_tracked = past.running is not None or past.batches is not None
    moves = measures and training and is_tracked
    running, batches, skipped = past.running, 0, 0
    if moves:
        running, batches, skipped = _moved(values, past, options, policy)
    return Expected(
        along([p.y for p in parts]),
        along([g.dx for g in gradients]),
        np.sum([g.dweight for g in gradients], axis=0),
        np.sum([g.dbias for g in gradients], axis=0),
        dresidual,
        along([p.z for p in parts]),
        along([p.xhat for p in parts]),
        along(std).reshape(spread),
        running,
        batches,
        skipped,
    )


def _part(
    values: Values,
    samples: slice,
    past: Past,
    policy: Policy,
    training: bool,
    measures: bool,
    options: Options,
) -> _Part:
    x, weight, bias, residual, dy, mask = values
    x, dy = x[samples], dy[samples]
    mask = None if mask is None else mask[samples]
    given: dict[str, Any] = {
        "eps": options.eps,
        "residual": None if residual is None else residual[samples],
        "mask": mask,
    }
    act = {"activation": options.activation}
    count = x.shape[0] * int(np.prod(x.shape[2:])) if mask is None else int(mask.sum())
    is_small = options.small_batch == "running" and training and past.running is not None and count < 2
    if measures and not is_small and isinstance(policy, Renorm):
        r_max, d_max = _bounds(policy, past.batches)
        bounds = {"r_max": r_max, "d_max": d_max, "running": past.running}
        found = reference.renorm(x, dy, weight, bias, **bounds, **given, **act)
        z = reference.renorm(x, dy, weight, bias, **bounds, **given).y
        unit = {"eps": options.eps, "mask": mask}
        xhat = reference.renorm(x, dy, None, None, **bounds, **unit).y
        own = reference.forward(x, **unit)
        running_std = np.sqrt(np.asarray(past.running.var) + options.eps)  # type: ignore[union-attr]
        r = np.clip(1 / own.rstd[0] / running_std, 1 / r_max, r_max)
        return _Part(found.y, z, xhat, r * own.rstd, found.gradients)
    if measures and not is_small and isinstance(policy, Adapted) and not training:
        mixed = {"prior": policy.prior, "running": past.running}
        found = reference.adapted(x, dy, weight, bias, **mixed, **given, **act)
        z = reference.adapted(x, dy, weight, bias, **mixed, **given).y
        xhat = reference.adapted(x, dy, None, None, **mixed, eps=options.eps, mask=mask).y
        n = float(len(x) if mask is None else mask.any(axis=tuple(range(1, mask.ndim))).sum())
        s = n / (n + policy.prior) if n + policy.prior > 0 else 0.0
        var = (1 - s) * np.asarray(past.running.var) + s * found.var  # type: ignore[union-attr]
        return _Part(found.y, z, xhat, ((var + options.eps) ** -0.5)[None], found.gradients)
    if not measures or is_small:
        assert past.running is not None
        given |= {"mean": past.running.mean, "var": past.running.var}
    plain = reference.forward(x, weight, bias, **given, **act)
    z = reference.forward(x, weight, bias, **given).y
    xhat = reference.forward(x, **{n: v for n, v in given.items() if n != "residual"}).y
    gradients = reference.backward(x, dy, weight, bias, **given, **act)
    return _Part(plain.y, z, xhat, plain.rstd, gradients)


def _bounds(policy: Renorm, batches: int | None) -> tuple[float, float]:
    """Return r_max and d_max as far as they are open after so many batches."""

    def opened(steps: tuple[int, int]) -> float:
        start, end = steps
        if batches is None or batches >= end:
            return 1.0
        return 0.0 if batches <= start else (batches - start) / (end - start)

    return 1 + (policy.r_max - 1) * opened(policy.r_steps), policy.d_max * opened(policy.d_steps)


def _moved(
    values: Values, past: Past, options: Options, policy: Policy
) -> tuple[reference.Running | None, int, int]:
    """Return the running statistics, and what is added to the counters."""
    size = policy.size if isinstance(policy, Ghost) and policy.sequential else None
    found = reference.moments(values.x, values.mask, size)
    number = len(found.count)
    if options.nonfinite == "skip" and not (np.isfinite(found.mean).all() and np.isfinite(found.m2).all()):
        return past.running, 0, 1
    running = past.running
    for group in range(number):
        if running is None or found.count[group] < 2:
            continue
        momentum = 0.0 if options.momentum is None and past.batches is None else options.momentum
        running = reference.update_running_torch(
            running,
            found.mean[group],
            found.var[group],
            float(found.count[group]),
            momentum=momentum,
            batches=(past.batches or 0) + group + 1,
        )
    return running, number, 0
