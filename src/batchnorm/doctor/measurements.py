"""Records what the samples show: what each norm receives, and how well the model does by which statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchnorm.statistics.moments import PooledMoments, merge, pooled

Array = NDArray[np.float64]


@dataclass
class Received:
    """Accumulates what one norm receives, batch by batch; several calls in one forward count as one batch.

    Attributes:
        batches: count, mean and m2 of each batch.
        calls: the same of each call within a forward, over all batches.
        sample_means: mean of each sample and channel, `[N, C]` per batch.
        peak: largest |value|.
        dtype: of the values.
    """

    batches: list[PooledMoments] = field(default_factory=list)
    calls: list[PooledMoments] = field(default_factory=list)
    sample_means: list[Array] = field(default_factory=list)
    peak: float = 0.0
    dtype: str = "float32"

    def add(self, call: int, found: PooledMoments, sample_means: Array, peak: float, dtype: str) -> None:
        """Add the moments of one call, the first of its forward having number 0."""
        if call == 0:
            self.batches.append(found)
            self.sample_means.append(sample_means)
        else:
            self.batches[-1] = merge(self.batches[-1], found)
        if call == len(self.calls):
            self.calls.append(found)
        else:
            self.calls[call] = merge(self.calls[call], found)
        self.peak, self.dtype = max(self.peak, peak), dtype

    @property
    def whole(self) -> PooledMoments:
        """The moments of all values."""
        count = np.array([[part.count] for part in self.batches])
        means, m2s = (np.stack([part[i] for part in self.batches]) for i in (1, 2))
        found = pooled(PooledMoments(count, means, m2s), np)
        return found._replace(count=float(found.count[0]))

    def var(self) -> Array:
        """Return the biased variance of all values, `[C]`."""
        found = self.whole
        var: Array = found.m2 / max(found.count, 1)
        return var

    def noise(self, eps: float) -> tuple[float, float] | None:
        """Return the noise of batch means, standard deviations, and F of batches against samples.

        F is the variance of batch means over that which samples drawn at random would give; NaN where every
        batch is one sample. None where batches are few.
        """
        sizes = np.array([len(part) for part in self.sample_means], float)
        if len(sizes) < 4 or sizes.min() < 1:
            return None
        kept = sizes == sizes[0]  # a ragged last batch has another noise
        means = np.stack([part.mean for part, keep in zip(self.batches, kept, strict=True) if keep])
        noise = (
            float(np.sqrt(np.mean(means.var(0, ddof=1) / (self.var() + eps)))) if len(means) > 1 else math.nan
        )
        samples = np.concatenate(self.sample_means)
        group = np.stack([part.mean(0) for part in self.sample_means])
        between = (sizes[:, None] * (group - samples.mean(0)) ** 2).sum(0) / (len(sizes) - 1)
        freedom = len(samples) - len(sizes)
        if freedom < 1:
            return noise, math.nan
        parts = zip(self.sample_means, group, strict=True)
        within = sum(((part - mean) ** 2).sum(0) for part, mean in parts) / freedom
        usable = within > 1e-12 * (self.var() + eps)
        return noise, float(np.mean(between[usable] / within[usable])) if usable.any() else math.nan


def distance_of_statistics(
    mean: Array, var: Array, running: tuple[Array, Array], eps: float
) -> tuple[float, float]:
    """Return how far running statistics are from those of data, over the channels.

        mean_off  = sqrt(mean((mean - running_mean)² / (var + eps)))
        std_ratio = exp(sqrt(mean(log(std / running_std)²))),    1 or more

    Args:
        mean: of the data, `[C]`.
        var: of the data, `[C]`.
        running: mean and variance, `[C]` each.
        eps: added to both variances, as the layer does.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        mean_off = float(np.sqrt(np.mean((mean - running[0]) ** 2 / (var + eps))))
        logs = 0.5 * np.log((var + eps) / (running[1] + eps))
        return mean_off, float(np.exp(min(np.sqrt(np.mean(logs**2)), 700.0)))


@dataclass(frozen=True)
class Score:
    """How well outputs fit.

    Attributes:
        value: accuracy (1 is best), loss (0 is best) or difference to reference outputs (0 is best).
        correct: whether each prediction is right; None where there are no classes.
    """

    value: float
    correct: NDArray[np.bool_] | None = None


def scored(outputs: Array, labels: NDArray[np.generic] | None, reference: Array | None) -> tuple[str, Score]:
    """Return the measure and the score of outputs `[N, K, ...]` or of any shape.

    Args:
        outputs: of the model.
        labels: classes `[N, ...]`, or targets of the outputs' shape; None = none.
        reference: outputs to compare with where labels do not fit.
    """
    if labels is not None and _are_classes(labels, outputs):
        correct = outputs.argmax(1) == labels
        return "accuracy", Score(float(correct.mean()), correct.reshape(-1))
    if labels is not None and labels.dtype.kind == "f" and labels.shape == outputs.shape:
        return "loss", Score(float(np.mean((outputs - labels.astype(np.float64)) ** 2)))
    if reference is None or reference.shape != outputs.shape:  # a length may depend on the data
        return "difference of outputs", Score(0.0)
    return "difference of outputs", Score(difference(outputs, reference))


def _are_classes(labels: NDArray[np.generic], outputs: Array) -> bool:
    """Whether labels number the second axis of the outputs."""
    if outputs.ndim < 2 or outputs.shape[1] < 2 or labels.dtype.kind not in "iu" or not labels.size:
        return False
    is_alike = labels.shape == outputs.shape[:1] + outputs.shape[2:]
    return is_alike and int(labels.min()) >= 0 and int(labels.max()) < outputs.shape[1]


def difference(outputs: Array, reference: Array) -> float:
    """Return the root mean square difference of outputs, over the spread of the reference."""
    spread = float(np.std(reference)) or float(np.abs(reference).max(initial=0.0)) or 1.0
    return float(np.sqrt(np.mean((outputs - reference) ** 2))) / spread


@dataclass
class Measured:
    """What the samples show.

    Attributes:
        received: by the name of the norm, in the order of first calls, by running statistics upstream.
        population: moments by the name of the norm, as all norms before normalize by their batch.
        measure: what the scores are.
        scores: by "running", "batch", "population", "adapted".
        alone: by the name of the norm, with the statistics of that norm replaced alone.
        broken: the first layer whose output is not finite; "" = the model.
        is_data_broken: whether the samples themselves are not finite.
        mates: the largest change of predictions with their neighbours, and the first layer that mixes.
        padding: the same with more padding; and whether lengths were given.
        samples, forwards: what it has cost.
        unchecked: what could not be looked at, and why.
    """

    received: dict[str, Received] = field(default_factory=dict)
    population: dict[str, PooledMoments] = field(default_factory=dict)
    measure: str = ""
    scores: dict[str, Score] = field(default_factory=dict)
    alone: dict[str, Score] = field(default_factory=dict)
    broken: str | None = None
    is_data_broken: bool = False
    mates: tuple[float, str | None] | None = None
    padding: tuple[float, str | None, bool] | None = None
    samples: int = 0
    forwards: float = 0.0
    unchecked: list[str] = field(default_factory=list)
