"""Perturbs neighbours and padding of samples, and finds the first layer whose output for them changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
# Cuts the values of two runs to what must be the same in both.
View = Callable[[Values, Values], tuple[Values, Values]]

SAMPLES = 8  # of the batch that is perturbed; half of them are looked at
MASKS = ("attention_mask", "mask", "padding_mask", "pixel_mask")


class Call(NamedTuple):
    """What one call of a layer received and returned."""

    name: str
    given: list[Values]
    made: list[Values]


@dataclass(frozen=True)
class Run:
    """One forward: its floating outputs, and the calls of its layers in order."""

    outputs: list[Values]
    calls: list[Call]


class Neighbours:
    """Changes the second half of a batch of samples.

    Args:
        size: samples of the batch.
    """

    def __init__(self, size: int) -> None:
        self.size, self.kept = size, size // 2

    def changed(self, values: Values) -> Values:
        """Return values of which the samples that are not looked at are others."""
        other = values.copy()
        if values.dtype.kind == "f":
            with np.errstate(all="ignore"):  # inf, or more than 16 bits hold
                new = 1.5 * values[self.kept :][::-1] + 0.5 * values.astype(np.float32).std()
                other[self.kept :] = new.astype(values.dtype)
        else:
            other[self.kept :] = values[:1]
        return other

    def view(self, a: Values, b: Values) -> tuple[Values, Values]:
        """Return the samples that are looked at; nothing of what is no batch."""
        is_batch = a.ndim > 0 and a.shape == b.shape and len(a) == self.size
        return (a[: self.kept], b[: self.kept]) if is_batch else (a.ravel()[:0], b.ravel()[:0])


class Padding:
    """Takes padding from a batch of samples, down to its longest, or adds some.

    Args:
        x: the input, `[N, ...]`.
        lengths: of each sample.
        axis: of x that has the lengths.
        is_given: whether the batch says them; otherwise zeros at the end of samples are taken for padding.
    """

    def __init__(self, x: Values, lengths: Sequence[int], axis: int, *, is_given: bool) -> None:
        self.lengths, self.axis, self.is_given = lengths, axis, is_given
        self._shape, self._size, self._least = x.shape, x.shape[axis], max(lengths)
        self._more = 16 * max(1, -(-self._size // 64))

    @property
    def is_least(self) -> bool:
        """Whether the longest sample has no padding."""
        return bool(self._least == self._size)

    def trimmed(self, values: Values) -> Values:
        """Return the input, or a mask of its length, with no padding behind the longest sample."""
        axis = self._axis(values)
        return values if axis is None else values.take(range(self._least), axis)

    def changed(self, values: Values) -> Values:
        """Return the input, or a mask of its length, with more padding; others as they are."""
        axis = self._axis(values)
        if axis is None:
            return values
        return np.pad(values, [(0, self._more if a == axis else 0) for a in range(values.ndim)])

    def _axis(self, values: Values) -> int | None:
        if values.shape == self._shape:
            return self.axis
        return next((a for a in range(1, values.ndim) if values.shape[a] == self._size), None)

    def view(self, a: Values, b: Values) -> tuple[Values, Values]:
        """Return what is not padding; nothing of what is no batch."""
        nothing = a.ravel()[:0], b.ravel()[:0]
        if a.ndim != b.ndim or not a.ndim or len(a) != len(self.lengths) or len(b) != len(a):
            return nothing
        places = [i for i in range(a.ndim) if a.shape[i] != b.shape[i]]
        if not places:
            return a.ravel(), b.ravel()
        if len(places) > 1:
            return nothing
        place = places[0] - 1
        sizes = [length * a.shape[places[0]] // self._least for length in self.lengths]
        rows = [
            (a[i].take(range(n), place).ravel(), b[i].take(range(n), place).ravel())
            for i, n in enumerate(sizes)
        ]
        return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def padding_of(x: Values, lengths: Values | None, mask: Values | None) -> Padding | None:
    """Return the padding of a batch; None where no sample is seen to have any.

    Args:
        x: the input, `[N, ...]`.
        lengths: of each sample, `[N]`; None = not given.
        mask: true where values are, `[N, L]`; None = not given.
    """
    size = None
    if mask is not None and mask.ndim == 2:
        lengths, size = mask.astype(bool).sum(1), mask.shape[1]
    if lengths is not None and lengths.ndim == 1 and len(lengths) == len(x):
        axes = [a for a in range(x.ndim - 1, 0, -1) if x.shape[a] == (size or x.shape[a])]
        fitting = [a for a in axes if x.shape[a] >= int(lengths.max())]
        # Of two axes that lengths may be of, the one that is zero behind them; else the last, torch's.
        fitting.sort(key=lambda axis: not _is_zero_behind(x, lengths, axis))
        if fitting and int(lengths.min()) < x.shape[fitting[0]]:
            return Padding(x, [int(length) for length in lengths], fitting[0], is_given=True)
    is_tokens = x.ndim == 2 and x.dtype.kind in "iu"
    for axis in (2, 1) if x.ndim == 3 else (1,) if is_tokens else ():
        used = (x != 0).any(3 - axis) if x.ndim == 3 else x != 0
        found = [int(n) for n in (used * np.arange(1, used.shape[1] + 1)).max(1)]
        if min(found) > 0 and len(set(found)) > 1 and sum(found) < 0.95 * used.size:
            return Padding(x, found, axis, is_given=False)
    return None


def _is_zero_behind(x: Values, lengths: Values, axis: int) -> bool:
    place = np.arange(x.shape[axis]).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    behind = place >= lengths.reshape(-1, *[1] * (x.ndim - 1))
    return not (np.where(behind, x, 0) != 0).any()


def compared(first: Run, second: Run, view: View) -> tuple[float, str | None]:
    """Return the largest change of outputs over their spread, and the first layer that makes it."""
    with np.errstate(all="ignore"):  # of what is not finite, every difference is NaN
        return _change(first, second, view), _first_reader(first, second, view)


def _change(first: Run, second: Run, view: View) -> float:
    change = 0.0
    for a, b in zip(first.outputs, second.outputs, strict=False):
        spread = float(a.std()) if a.size > 1 else float(np.abs(a).max(initial=0.0))
        kept_a, kept_b = view(a, b)
        change = max(change, float(np.abs(kept_a - kept_b).max(initial=0.0)) / (spread or 1.0))
    return change


def _first_reader(first: Run, second: Run, view: View) -> str | None:
    """Return the first layer with the same inputs and other outputs; None if it is in no layer."""
    for a, b in zip(first.calls, second.calls, strict=False):
        if a.name != b.name:
            return None
        if _are_same(a.given, b.given, view) and not _are_same(a.made, b.made, view):
            return a.name
    return None


def _are_same(first: list[Values], second: list[Values], view: View) -> bool:
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        kept_a, kept_b = (kept.astype(np.float32) for kept in view(a, b))
        if kept_a.shape != kept_b.shape:
            return False
        scale = float(np.abs(kept_a).max(initial=0.0)) or 1.0
        if kept_a.size and not float(np.abs(kept_a - kept_b).max()) <= 1e-4 * scale:
            return False
    return True
