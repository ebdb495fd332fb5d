"""The affine map of a batch normalization in evaluation, y = scale x + shift per channel, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """Scale and shift, `[C]` each."""

    scale: Array
    shift: Array

    @property
    def is_finite(self) -> bool:
        """Whether there is no NaN and no inf in it."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    def part(self, start: int, channels: int, shift: int) -> Affine:
        """Return the map of some of the channels, with `shift` times the shift."""
        chosen = slice(start, start + channels)
        return Affine(self.scale[chosen], shift * self.shift[chosen])

    def within(self, start: int, channels: int) -> Affine:
        """Return the map of more channels, which leaves those before `start` and behind these as they are."""
        scale, shift = np.ones(channels), np.zeros(channels)
        chosen = slice(start, start + len(self.scale))
        scale[chosen], shift[chosen] = self.scale, self.shift
        return Affine(scale, shift)


def affine(mean: Array, var: Array, eps: float, weight: Array | None, bias: Array | None) -> Affine:
    """Return scale = weight / sqrt(var + eps) and shift = bias - scale mean.

    Args:
        mean: `[C]`, as are the others.
        var: biased.
        eps: added to it.
        weight: None = 1.
        bias: None = 0.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # callers refuse NaN and inf
        scale = 1 / np.sqrt(var + eps)
        if weight is not None:
            scale = scale * weight
        shift = -scale * mean
        return Affine(scale, shift if bias is None else shift + bias)
