"""Decides which forwards a diagnosis takes of the samples, and scores their outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from batchnorm.statistics.moments import PooledMoments

from .measurements import Array, Measured, Score, scored

# Layers whose statistics are replaced alone, at most: those that are furthest off.
MOST_ALONE = 16


class Passes(ABC):
    """The forwards of one diagnosis, as the model is deployed and by other statistics, in any framework.

    Args:
        measured: takes what they show.
        labels: of the samples; None without any.
    """

    def __init__(self, measured: Measured, labels: NDArray[np.generic] | None) -> None:
        self.measured, self.labels = measured, labels
        self._kept: dict[str, Array] = {}

    def take(self) -> None:
        """Take all forwards."""
        with self.watching():
            self.score("running")
        if self.measured.broken is not None or self.measured.is_data_broken:
            return
        self.by_batch()
        if not self.measured.population:
            return
        with self.replaced(self.measured.population):
            self.score("population")
        if self.measured.measure == "difference of outputs":
            for name in ("running", "batch"):
                _, self.measured.scores[name] = scored(self._kept[name], None, self._kept["population"])
        self._alone()
        if self.measured.measure != "difference of outputs":
            with self.adapting():
                self.score("adapted")

    def _alone(self) -> None:
        """Replace the statistics of one layer at a time, of those that are furthest off."""
        off = {name: self._distance(name) for name in self.measured.population}
        for name in [n for n in sorted(off, key=lambda n: -off[n])[:MOST_ALONE] if off[n] > 0.1]:
            with self.replaced({name: self.measured.population[name]}):
                self.measured.alone[name] = self.score(name, keep=False)

    def _distance(self, name: str) -> float:
        """Return how far the running statistics are off, in standard deviations and logs of them."""
        mean, var, eps = self.statistics(name)
        found = self.measured.population[name]
        new = found.m2 / max(found.count, 1) + eps
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.sqrt(np.mean((found.mean - mean) ** 2 / new)) + np.sqrt(
                np.mean((0.5 * np.log(new / (var + eps))) ** 2)
            )
        return float(off) if np.isfinite(off) else float("inf")

    def score(self, name: str, *, keep: bool = True) -> Score:
        """Run all samples and return how well the outputs fit; kept by a name, or compared only."""
        outputs = self.outputs(name)
        self.measured.forwards += 1
        is_alike = len({output.shape[1:] for output in outputs}) == 1  # else of several lengths
        parts = outputs if is_alike else [output.reshape(-1) for output in outputs]
        whole, labels = self.aligned(np.concatenate(parts) if parts else np.zeros(0))
        measure, found = scored(whole, labels, self._kept.get("population"))
        if keep:
            self._kept[name] = whole
            self.measured.measure = measure
            self.measured.scores[name] = found
        return found

    def aligned(self, outputs: Array) -> tuple[Array, NDArray[np.generic] | None]:
        """Return outputs and labels as `scored` takes them, classes on the second axis."""
        return outputs, self.labels

    @abstractmethod
    def outputs(self, name: str) -> list[Array]:
        """Return the first floating output on each batch; `name` is for progress."""

    @abstractmethod
    def watching(self) -> AbstractContextManager[None]:
        """Record, within the block, what norms receive, and which layer is not finite first."""

    @abstractmethod
    def by_batch(self) -> None:
        """Score as every norm normalizes by its batch; keep the moments of all batches as the population."""

    @abstractmethod
    def replaced(self, found: Mapping[str, PooledMoments]) -> AbstractContextManager[None]:
        """Use these statistics within the block."""

    @abstractmethod
    def adapting(self) -> AbstractContextManager[None]:
        """Normalize by `Adapted()` within the block."""

    @abstractmethod
    def statistics(self, name: str) -> tuple[Array, Array, float]:
        """Return the running mean and variance of a norm, and its eps."""
