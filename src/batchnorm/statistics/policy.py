"""What a statistics policy is: a declaration of which mean and variance a layer normalizes by."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, NamedTuple

from batchnorm.errors import OptionError

from .moments import PooledMoments

# An array of any framework, `[C]` or `[G, C]`, wide; or a scalar that broadcasts against one.
Array = Any
# Where `sqrt`, `clip`, `where` and `stop_gradient` of such arrays are: keras.ops is one.
Namespace = Any


class Known(NamedTuple):
    """What a policy may know, besides the batch's moments, when it chooses.

    Attributes:
        mean, var: the running statistics, `[C]`; None where a layer tracks none.
        batches: number of batches that have moved them so far, a number or an array of one; None = many.
        samples: number of samples of the batch with a value that counts, `[G]` or a number.
        eps: added to var.
    """

    mean: Array | None
    var: Array | None
    batches: Array | None
    samples: Array
    eps: float


class Chosen(NamedTuple):
    """The mean and rstd that a call normalizes by, and how they follow the batch's own mean and var (biased).

    Attributes:
        mean, rstd: `[G, C]`; y = weight * (x - mean) * rstd + bias.
        mean_by_mean: ∂mean/∂(batch mean), as the other two an array or a number: 0 = constant.
        mean_by_var: ∂mean/∂(batch var).
        rstd_by_var: ∂rstd/∂(batch var).
    """

    mean: Array
    rstd: Array
    mean_by_mean: Array
    mean_by_var: Array
    rstd_by_var: Array


class Policy:
    """Which statistics a layer normalizes by, and whether its running ones move.

    A policy is a frozen dataclass of plain fields: equal where these are, and made again by
    `type(policy)(**fields)`. It holds no tensor and no state, so layers may share one, of any framework.

    Attributes:
        name: in a word, as tables show it.
        needs_running: it makes no sense for a layer that tracks no running statistics.
        group_size: samples that share statistics in training; None = all of the batch.
        counts_batches: what it chooses changes with the number of batches that the layer has seen.
        text: the policy as JSON.
        is_sequential: each such group moves the running statistics as a batch of its own, in order, instead
            of all together as one.
    """

    name: ClassVar[str]
    needs_running: ClassVar[bool] = False
    group_size: int | None = None
    is_sequential: bool = False
    counts_batches: bool = False
    text: str

    def __post_init__(self) -> None:
        # A string that is there is what a compiler can read, and guard by.
        object.__setattr__(self, "text", json.dumps(self.config()))

    def config(self) -> dict[str, Any]:
        """Return plain data: `{"policy": "Ghost", "size": 32, "sequential": False}`; see `serialized.py`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        plain = {n: v.config() if isinstance(v, Policy) else v for n, v in values.items()}
        return {"policy": type(self).__name__, **plain}

    def measures(self, training: bool) -> bool:
        """Whether a call takes the moments of its batch; if not, it normalizes by the running statistics.

        Args:
            training: the layer's mode.
        """
        return training

    def moves(self, training: bool) -> bool:
        """Whether those moments then move the running statistics."""
        return training and self.measures(training)

    def is_plain(self, training: bool) -> bool:
        """Whether a call that measures normalizes by the very moments of its groups: nothing to choose."""
        return self.measures(training)

    def groups(self, training: bool) -> int | None:
        """Return the samples per group of a call that measures; None = the batch is one group."""
        return self.group_size if training else None

    def choose(self, batch: PooledMoments, known: Known, training: bool, xp: Namespace) -> Chosen:  # noqa: ARG002
        """Return what a call normalizes by, for one that measures; differentiable operations in `batch`.

        Args:
            batch: moments of each group, `[G, C]`, count `[G, 1]` or a number.
            known: what else there is.
            training: the layer's mode.
            xp: where the arrays' functions are.
        """
        return by_batch(batch, known.eps, xp)


def by_batch(batch: PooledMoments, eps: float, xp: Namespace) -> Chosen:
    """Return the batch's own statistics: rstd = (var + eps)^(-1/2), so ∂rstd/∂var = -rstd³ / 2."""
    rstd = 1.0 / xp.sqrt(biased_var(batch) + eps)
    return Chosen(batch.mean, rstd, 1.0, 0.0, -0.5 * rstd * rstd * rstd)


def biased_var(batch: PooledMoments) -> Array:
    """Return var = m2 / count; 0 where nothing was counted."""
    return batch.m2 / (batch.count + (batch.count == 0))


def gradient_coefficients(
    weight: Array, chosen: Chosen, batch: PooledMoments, sum_dy: Array, sum_dy_xhat: Array
) -> tuple[Array, Array, Array]:
    """Return a, b, c of dx = a dy' + b x̂ + c, for mean and rstd that follow the batch's as `chosen` says.

    With x̂ = (x - mean) rstd and a = weight rstd, the loss follows mean and rstd by

        ∂L/∂mean = -a Σdy'            ∂L/∂rstd = weight Σ(dy' x̂) / rstd

    and these, through the batch's own mean m and var v over n values, follow x_i:

        ∂m/∂x_i = 1 / n               ∂v/∂x_i = 2 (x_i - m) / n,    x_i - m = x̂_i / rstd + (mean - m)

        dx_i = a dy'_i + ∂L/∂m / n + ∂L/∂v 2 (x_i - m) / n

    For the batch's own statistics: b = -a Σ(dy' x̂)/n, c = -a Σdy'/n; for constants, b = c = 0.

    Args:
        weight: `[C]`, or 1.
        chosen: what the call normalized by.
        batch: moments that it followed, `[G, C]`; of all ranks, where these share them.
        sum_dy, sum_dy_xhat: Σdy' and Σ(dy' x̂), `[G, C]`, over the same values.
    """
    count = batch.count + (batch.count == 0)
    a = weight * chosen.rstd
    by_mean = -a * sum_dy
    by_rstd = weight * sum_dy_xhat / chosen.rstd
    by_var = (by_mean * chosen.mean_by_var + by_rstd * chosen.rstd_by_var) * (2.0 / count)
    c = by_mean * chosen.mean_by_mean / count + by_var * (chosen.mean - batch.mean)
    return a, by_var / chosen.rstd, c


def check_number(what: str, value: object, low: float, high: float = float("inf")) -> float:
    """Return a policy's field as a finite float of a range, or raise OptionError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value == float("inf"):  # type: ignore[operator]
        limits = f"of {low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
        raise OptionError(f"{what} must be a finite number {limits}; got {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_count(what: str, value: object, low: int) -> int:
    """Return a policy's field as a whole number from `low` on, or raise OptionError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise OptionError(f"{what} must be a whole number of {low} or more; got {value!r}")
    return value
