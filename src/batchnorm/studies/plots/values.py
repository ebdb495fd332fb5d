"""The values behind a picture: what a reader saves, and what the page draws when arms or seeds are chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from batchnorm.studies.verdicts.results import Sample

_DIGITS = 5  # of a value in the page

Label = str | int
Band = dict[float, Sample]  # a curve: values over seeds, by x


@dataclass(frozen=True)
class Style:
    """The look of a series.

    Attributes:
        color: the name of a colour of the page, such as `subject`.
        alpha: from 0, invisible, to 1.
        dash: lengths of ink and gap; empty for a solid line.
    """

    color: str
    alpha: float = 1.0
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Curve:
    """Values that share their labels, such as an arm and a seed.

    Attributes:
        labels: one for each name in `Values.labels`.
        y: the values.
        x: where each of them stands; empty for values that stand in a row.
        spread: the standard deviation around each value, where it is shown.
        style: the look of the line; the same for all curves that are averaged.
    """

    labels: tuple[Label, ...]
    y: Sequence[float]
    x: Sequence[float] = ()
    spread: Sequence[float] = ()
    style: Style = Style("ink")


@dataclass(frozen=True)
class Values:
    """All values of a picture.

    Attributes:
        labels: names of the labels of a curve; one of them may be "seed".
        y: name of the values, with their unit.
        curves: the values.
        x: name of the horizontal axis; None for rows of values, which have none.
        series: the label that tells lines of one panel apart.
        panel: the label that tells panels apart, if there are several.
        band: what is drawn around the mean over seeds.
        percent: whether the values are fractions, shown in percent.
        log_x, log_y: whether an axis is logarithmic at first.
        geometric: whether the mean over seeds is the geometric one.
    """

    labels: tuple[str, ...]
    y: str
    curves: Sequence[Curve]
    x: str | None = None
    series: str = "arm"
    panel: str | None = None
    band: Literal["std", "range", "spread"] = "std"
    percent: bool = False
    log_x: bool = False
    log_y: bool = False
    geometric: bool = False

    def bands(self) -> dict[str, Band]:
        """Returns the values over seeds by x, for each series that has a finite one."""
        place = self.labels.index(self.series)
        found: dict[str, dict[float, list[float]]] = {}
        for curve in self.curves:
            of_series = found.setdefault(str(curve.labels[place]), {})
            for x, y in zip(curve.x, curve.y, strict=True):
                of_series.setdefault(x, []).append(y)
        bands = {
            name: {x: Sample(of[x]) for x in sorted(of) if math.isfinite(x)} for name, of in found.items()
        }
        kept = {
            name: {x: sample for x, sample in band.items() if sample.finite} for name, band in bands.items()
        }
        return {name: band for name, band in kept.items() if band}

    def content(self) -> dict[str, object]:
        """Returns all of it as JSON holds it: NaN and infinity are null, numbers have 5 digits."""
        return {
            "labels": self.labels,
            "x": self.x,
            "y": self.y,
            "series": self.labels.index(self.series),
            "panel": None if self.panel is None else self.labels.index(self.panel),
            "seed": self.labels.index("seed") if "seed" in self.labels else None,
            "band": self.band,
            "percent": self.percent,
            "logX": self.log_x,
            "logY": self.log_y,
            "geometric": self.geometric,
            "curves": [_content(curve) for curve in self.curves],
        }


def _content(curve: Curve) -> dict[str, object]:
    style = curve.style
    return {
        "of": curve.labels,
        "x": list(_rounded(curve.x)),
        "y": list(_rounded(curve.y)),
        **({"spread": list(_rounded(curve.spread))} if curve.spread else {}),
        "color": style.color,
        **({"alpha": round(style.alpha, 3)} if style.alpha != 1 else {}),
        **({"dash": style.dash} if style.dash else {}),
    }


def _rounded(values: Sequence[float]) -> Iterator[float | None]:
    for value in values:
        yield float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
