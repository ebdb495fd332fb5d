"""Accumulates and reports what a calibration finds, for the verbs of both frameworks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import DataError, OptionError
from batchnorm.text_table import aligned, as_html

from .moments import PooledMoments, merge

_Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]


def check_repeatable(data: object) -> None:
    """Raise DataError for data that serves one calibration only, before the first of several."""
    if isinstance(data, Iterator):
        raise DataError(f"a {type(data).__name__} is used up by one calibration: pass a list or a DataLoader")


@dataclass
class Accumulator:
    """Accumulates the moments of what the layers of a model receive, over batches.

    Attributes:
        samples: number of samples that went through the model.
        batches: number of batches.
        moments: moments of the received values, by the name of the layer; a layer without any is missing.
        dependent: names of the layers whose input came through a layer that had no statistics of all the
            data yet.
        arrivals: number of values per channel that came to a layer, counted also where their moments are not
            taken; for methods that need it.
    """

    samples: int = 0
    batches: int = 0
    moments: dict[str, PooledMoments] = field(default_factory=dict)
    dependent: set[str] = field(default_factory=set)
    arrivals: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, found: PooledMoments) -> None:
        """Add the moments of one call of a layer."""
        self.moments[name] = merge(self.moments[name], found) if name in self.moments else found

    def merged(self, other: Accumulator) -> Accumulator:
        """Return the union of two parts of the data, as a new accumulator."""
        both = Accumulator(
            self.samples + other.samples,
            self.batches + other.batches,
            self.moments.copy(),
            self.dependent | other.dependent,
            self.arrivals + other.arrivals,
        )
        for name, found in other.moments.items():
            both.add(name, found)
        return both

    def check_batches(self) -> None:
        """Raise DataError if there was no batch."""
        if not self.batches:
            raise DataError(
                "calibrate received no batch: data is empty, or an iterator that was used up before"
            )


@dataclass(frozen=True)
class LayerChange:
    """Compares the running statistics of one layer before and after a calibration.

    Attributes:
        name: qualified name in the model.
        values: number of values per channel that the statistics rest on.
        mean_shift: largest |new mean - old mean| over the channels, in standard deviations of the data.
        std_ratio: new standard deviation over old, of the channel where they differ most.
        exact: whether the statistics are independent of how the data was split into batches: no other
            normalization ran before this one, or all that did had their new statistics.
        mean_shifts: |new mean - old mean| of each channel, in standard deviations of the data.
        std_ratios: new standard deviation over old of each channel.
    """

    name: str
    values: int
    mean_shift: float
    std_ratio: float
    exact: bool
    mean_shifts: tuple[float, ...] = field(default=(), repr=False)
    std_ratios: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def between(
        cls, name: str, values: int, old: _Statistics, new: _Statistics, eps: float, exact: bool
    ) -> Self:
        """Return the change between two (mean, var), `[C]` each; eps is added to var, as the layer does."""
        new_std = np.sqrt(new[1] + eps)
        shifts = np.abs(new[0] - old[0]) / new_std
        with np.errstate(invalid="ignore", divide="ignore"):  # the old variance may have been negative or inf
            ratios = new_std / np.sqrt(old[1] + eps)
            widest = float(ratios[np.argmax(np.abs(np.log(ratios)))])
        per_channel = tuple(shifts.tolist()), tuple(ratios.tolist())
        return cls(name, values, float(shifts.max()), widest, exact, *per_channel)


@dataclass(frozen=True)
class CalibrationReport:
    """Reports what `calibrate` did; `print` and notebooks show it as a table.

    Attributes:
        samples: number of samples that went through the model, on all ranks, in each pass.
        batches: number of batches, on all ranks, in each pass.
        layers: the layers whose running statistics were set, in the order of the model.
        unreached: names of the layers that no sample reached; their statistics are as before.
        frozen: names of the layers that are frozen (`Running()`; in Keras `trainable=False`): as before.
        method: how the inputs of deeper layers were normalized: by the statistics of each "batch", or
            "layerwise" by the new statistics.
        passes: number of passes over the data.
        ranks: number of processes.
    """

    samples: int
    batches: int
    layers: tuple[LayerChange, ...]
    unreached: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    method: str = "batch"
    passes: int = 1
    ranks: int = 1

    def warn_of_unreached(self, stacklevel: int) -> None:
        """Warn of the layers that no sample reached, with the caller's `stacklevel`."""
        if self.unreached:
            message = f"calibrate: no sample reached {', '.join(self.unreached)}; left as before"
            warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)

    def __str__(self) -> str:
        return "\n".join([self._title(), *aligned(self._cells()), *self._notes()])

    def _repr_html_(self) -> str:
        return as_html(self._title(), self._cells(), self._notes())

    def _title(self) -> str:
        done = f"{self.samples:,} samples in {self.batches:,} batches"
        done += f", {self.passes} passes" if self.passes > 1 else ""
        done += f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"Calibrated {len(self.layers)} layers on {done}."

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            ("layer", "values per channel", "mean moved by", "median", "std became", "median"),
            *(
                (
                    layer.name + ("" if layer.exact else " *"),
                    f"{layer.values:,}",
                    f"{layer.mean_shift:.3g} std",
                    _median(layer.mean_shifts, " std"),
                    f"{layer.std_ratio:.3g}×",
                    _median(layer.std_ratios, "×"),
                )
                for layer in self.layers
            ),
        ]

    def _notes(self) -> list[str]:
        notes = []
        if any(not layer.exact for layer in self.layers):
            notes.append(
                "* normalized inputs: depends on how the data was split into batches; larger is closer."
            )
        if self.unreached:
            notes.append(f"Not reached, left as before: {', '.join(self.unreached)}.")
        if self.frozen:
            notes.append(f"Frozen, left as before: {', '.join(self.frozen)}.")
        return notes


def _median(values: tuple[float, ...], unit: str) -> str:
    return f"{np.median(values):.3g}{unit}" if values else ""


# Numbers of values per channel behind a model's statistics: one for all layers, by name, or as calibrated.
Count = float | Mapping[str, float] | CalibrationReport


def count_of(counts: Count, layer: str, buffer: str, label: str) -> float:
    """Return the number of values per channel behind the statistics of one layer.

    Args:
        counts: of one model.
        layer: the layer's name.
        buffer: the name of its mean; a count by this name comes first.
        label: names the model in errors.

    Raises:
        OptionError: there is none, or it is no finite number of 0 or more.
    """
    if isinstance(counts, CalibrationReport):
        counts = {of_layer.name: of_layer.values for of_layer in counts.layers}
    if isinstance(counts, Mapping):
        found = counts.get(buffer, counts.get(layer))
        if found is None:
            known = ", ".join(map(str, list(counts)[:3])) or "no layer"
            raise OptionError(f"the counts of {label} lack {layer or buffer!r}; they have {known}, ...")
        counts = found
    value: object = counts
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 <= float(counts) < float("inf"):
        raise OptionError(f"a count is a number of values per channel, 0 or more; got {value!r} for {label}")
    return float(counts)
