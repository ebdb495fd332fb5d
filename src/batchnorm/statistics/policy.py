"""Defines a statistics policy: which mean and variance a layer normalizes by."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, NamedTuple, Protocol

from batchnorm.errors import OptionError

from .moments import A, Array, PooledMoments


class Namespace(Protocol):
    """The functions of arrays that policies use; keras.ops has them."""

    def sqrt(self, x: Array, /) -> Array: ...
    def clip(self, x: Array, low: Array | float, high: Array | float, /) -> Array: ...
    def stop_gradient(self, x: Array, /) -> Array: ...


class Known(NamedTuple):
    """The values that a policy chooses by, besides the moments of the batch.

    Attributes:
        mean, var: the running statistics, `[C]`; None where a layer tracks none.
        batches: number of batches that have moved them so far, a number or an array of one; None = many.
        samples: number of samples of the batch with a value that counts, `[G]` or a number.
        eps: added to var.
    """

    mean: Any
    var: Any
    batches: Any
    samples: Any
    eps: float


class Chosen(NamedTuple):
    """The mean and rstd that a call normalizes by, and their derivatives by the batch's mean and biased var.

    Attributes:
        mean, rstd: `[G, C]`; y = weight * (x - mean) * rstd + bias.
        mean_by_mean: ∂mean/∂(batch mean), like the other two an array or a number: 0 = constant.
        mean_by_var: ∂mean/∂(batch var).
        rstd_by_var: ∂rstd/∂(batch var).
    """

    mean: Any
    rstd: Any
    mean_by_mean: Any
    mean_by_var: Any
    rstd_by_var: Any


class Policy:
    """Decides which statistics a layer normalizes by, and whether its running statistics move.

    A policy is a frozen dataclass of plain fields: equal where these are, and made again by
    `type(policy)(**fields)`. It holds no tensor and no state, so layers of any framework may share one.

    Attributes:
        name: in a word, for tables.
        needs_running: it needs a layer that tracks running statistics.
        group_size: number of samples that share statistics in training; None = the whole batch.
        is_sequential: each such group moves the running statistics as a batch of its own, in order, instead
            of all groups together as one.
        is_shuffled: the samples of each group are drawn at random in every call.
        counts_batches: its choice changes with the number of batches that the layer has seen.
        text: the policy as JSON.
    """

    name: ClassVar[str]
    needs_running: ClassVar[bool] = False
    group_size: int | None = None
    is_sequential: bool = False
    is_shuffled: bool = False
    counts_batches: bool = False
    text: str

    def __post_init__(self) -> None:
        # A string attribute is something that a compiler can read, and guard on.
        object.__setattr__(self, "text", json.dumps(self.config()))

    def config(self) -> dict[str, Any]:
        """Return plain data: `{"policy": "Ghost", "size": 32, "sequential": False}`, for `policy_config`."""
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
        """Whether a call that measures normalizes by just the moments of its groups."""
        return self.measures(training)

    def groups(self, training: bool) -> int | None:
        """Return the samples per group of a call that measures; None = the batch is one group."""
        return self.group_size if training else None

    def in_order(self) -> Policy:
        """Return the policy with groups of consecutive samples."""
        return self

    def choose(self, batch: PooledMoments, known: Known, training: bool, xp: Namespace) -> Chosen:  # noqa: ARG002
        """Return what a call that measures normalizes by, differentiable in `batch`.

        Args:
            batch: moments of each group, `[G, C]`, count `[G, 1]` or a number.
            known: further statistics.
            training: the layer's mode.
            xp: the functions of the arrays.
        """
        return by_batch(batch, known.eps, xp)


def by_batch(batch: PooledMoments, eps: float, xp: Namespace) -> Chosen:
    """Return the batch's own statistics: rstd = (var + eps)^(-1/2), so ∂rstd/∂var = -rstd³ / 2."""
    rstd = 1.0 / xp.sqrt(biased_var(batch) + eps)
    return Chosen(batch.mean, rstd, 1.0, 0.0, -0.5 * rstd * rstd * rstd)


def biased_var(batch: PooledMoments) -> Array:
    """Return var = m2 / count; 0 where nothing was counted."""
    var: Array = batch.m2 / (batch.count + (batch.count == 0))
    return var


def gradient_coefficients(
    weight: Array | float, chosen: Chosen, batch: PooledMoments, sum_dy: A, sum_dy_xhat: A
) -> tuple[A, A, A]:
    """Return a, b, c of dx = a dy' + b x̂ + c, for mean and rstd that depend on the batch's as `chosen` says.

    With x̂ = (x - mean) rstd and a = weight rstd, the derivatives of the loss by mean and rstd are

        ∂L/∂mean = -a Σdy'            ∂L/∂rstd = weight Σ(dy' x̂) / rstd

    and x_i enters through the batch's own mean m and var v over n values:

        ∂m/∂x_i = 1 / n               ∂v/∂x_i = 2 (x_i - m) / n,    x_i - m = x̂_i / rstd + (mean - m)

        dx_i = a dy'_i + ∂L/∂m / n + ∂L/∂v 2 (x_i - m) / n

    For the batch's own statistics: b = -a Σ(dy' x̂)/n, c = -a Σdy'/n; for constants, b = c = 0.

    Args:
        weight: `[C]`, or 1.
        chosen: what the call normalized by.
        batch: moments that it depends on, `[G, C]`; of all ranks, where these share them.
        sum_dy, sum_dy_xhat: Σdy' and Σ(dy' x̂), `[G, C]`, over the same values.
    """
    count = batch.count + (batch.count == 0)
    a = weight * chosen.rstd
    by_mean = -a * sum_dy
    by_rstd = weight * sum_dy_xhat / chosen.rstd
    by_var = (by_mean * chosen.mean_by_var + by_rstd * chosen.rstd_by_var) * (2.0 / count)
    c = by_mean * chosen.mean_by_mean / count + by_var * (chosen.mean - batch.mean)
    return a, by_var / chosen.rstd, c


def check_number(what: str, value: object, low: float) -> float:
    """Return a policy's field as a finite float from `low` on, or raise OptionError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value < float("inf"):  # type: ignore[operator]
        raise OptionError(f"{what} must be a finite number of {low:g} or more; got {value!r}")
    return float(value)  # type: ignore[arg-type]


def check_count(what: str, value: object, low: int) -> int:
    """Return a policy's field as a whole number from `low` on, or raise OptionError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise OptionError(f"{what} must be a whole number of {low} or more; got {value!r}")
    return value
