"""Corrects the mini-batch's statistics towards the running ones."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.errors import OptionError

from .moments import Array, PooledMoments
from .policy import Chosen, Known, Namespace, Policy, biased_var, check_count, check_number


@dataclass(frozen=True)
class Renorm(Policy):
    """Corrects the statistics of the batch towards the running ones: batch renormalization.

        training:    y = weight * ((x - mean) / std * r + d) + bias,    std = sqrt(var + eps), of the batch
                     r = std / running_std             within [1 / r_max, r_max]
                     d = (mean - running_mean) / running_std    within [-d_max, d_max]
                     running_std = sqrt(running_var + eps);  the running statistics move as by `Batch()`
        evaluation:  mean = running_mean,  var = running_var;  nothing moves

    Training then normalizes nearly as evaluation will, which helps with small batches and with batches of
    dependent samples. Gradients flow through mean and std; r and d are constants. The bounds open while the
    running statistics settle: until batch `start`, r = 1 and d = 0, which is `Batch()`; from batch `end` on
    they are r_max and d_max; in between they grow linearly.

    Args:
        r_max: largest r, 1 or more.
        d_max: largest |d|, 0 or more.
        r_steps, d_steps: (start, end) of either bound, in batches seen by the layer; (0, 0) = open at once.

    Raises:
        OptionError: (a ValueError) a value out of range; by the layer that gets the policy: it tracks no
            running statistics.

    Example:
        >>> norm = batchnorm.BatchNorm1d(8, statistics=batchnorm.Renorm(r_max=2, d_max=1, r_steps=(0, 100)))
        >>> y = norm(torch.randn(4, 8))

    Differs from Keras's `renorm=`: there r and d follow a third pair of averages of their own.

    Source: Ioffe 2017, arXiv:1702.03275, algorithm 1; the defaults are those of its experiments.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    r_steps: tuple[int, int] = (5000, 40000)
    d_steps: tuple[int, int] = (5000, 25000)

    name = "renorm"
    needs_running = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "r_max", check_number("Renorm: r_max", self.r_max, 1.0))
        object.__setattr__(self, "d_max", check_number("Renorm: d_max", self.d_max, 0.0))
        for field in ("r_steps", "d_steps"):
            object.__setattr__(self, field, _steps(field, getattr(self, field)))
        super().__post_init__()

    @property
    def counts_batches(self) -> bool:  # type: ignore[override]
        """Whether a bound opens with time."""
        return max(*self.r_steps, *self.d_steps) > 0

    def is_plain(self, training: bool) -> bool:  # noqa: ARG002
        """Return False: the number of batches, and so the bounds, may be known to the device only."""
        return False

    def choose(self, batch: PooledMoments, known: Known, training: bool, xp: Namespace) -> Chosen:  # noqa: ARG002
        """Return mean and rstd with r and d in them.

        (x - m) / std * r + d = (x - (m - std d / r)) r / std    m and std of the batch
        """
        std = xp.sqrt(biased_var(batch) + known.eps)
        r, d = self.corrections(xp.stop_gradient(batch.mean), xp.stop_gradient(std), known, xp)
        back = d / r
        return Chosen(
            batch.mean - back * std,
            r / std,
            1.0,
            -0.5 * back / std,
            -0.5 * r / (std * std * std),
        )

    def corrections(self, mean: Array, std: Array, known: Known, xp: Namespace) -> tuple[Array, Array]:
        """Return r and d, `[G, C]`."""
        assert known.mean is not None
        assert known.var is not None
        running_std = xp.sqrt(known.var + known.eps)
        r_max = 1.0 + (self.r_max - 1.0) * _opened(self.r_steps, known.batches, mean, xp)
        d_max = self.d_max * _opened(self.d_steps, known.batches, mean, xp)
        r = xp.clip(std / running_std, 1.0 / r_max, r_max)
        return r, xp.clip((mean - known.mean) / running_std, -d_max, d_max)


def _opened(steps: tuple[int, int], batches: Array | None, like: Array, xp: Namespace) -> Array:
    """Return how far a bound is open, 0 to 1, as an array that broadcasts against `like`."""
    one = like * 0 + 1
    if batches is None:
        return one
    start, end = steps
    return xp.clip((batches - end) * one / max(end - start, 1) + 1, 0 * one, one)


def _steps(field: str, steps: object) -> tuple[int, int]:
    if not isinstance(steps, list | tuple) or len(steps) != 2:
        raise OptionError(f"Renorm: {field} must be (start, end), two numbers of batches; got {steps!r}")
    start, end = (check_count(f"Renorm: {field}, a number of batches,", step, 0) for step in steps)
    if end < start:
        raise OptionError(f"Renorm: {field} must be (start, end) with start <= end; got {steps!r}")
    return start, end
