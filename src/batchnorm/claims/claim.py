"""Defines a claim of the literature: its sentence, its figure, its experiment, the rule of its verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from batchnorm.studies.records import NAN, Number

from .rules import Part

# Told how much of an experiment is done, as a fraction of all of it.
Report = Callable[[float], None]


@dataclass(frozen=True)
class Curve:
    """A line of a picture, from one seed."""

    x: Sequence[Number]
    y: Sequence[Number]


@dataclass(frozen=True)
class Findings:
    """What an experiment measures with one seed.

    Attributes:
        numbers: by name; a part of a claim is judged by one of them, pictures show others.
        curves: by picture and line.
        grids: rows of values, by picture.
    """

    numbers: Mapping[str, Number]
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    grids: Mapping[str, Sequence[Sequence[Number]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Record(Findings):
    """What a seed of an experiment leaves on disk: its findings, and the seconds that it took."""

    seconds: Number = NAN


@dataclass(frozen=True)
class Lines:
    """A picture of curves: mean over seeds and their range.

    Attributes:
        key: of `Findings.curves`.
        title: of the picture, with the unit of its vertical axis.
        x: what the horizontal axis shows.
        log_x, log_y: whether the axes are logarithmic.
        percent: whether values are fractions to show in percent.
        references: straight or given lines to compare with, by name, as (x, y) points.
    """

    key: str
    title: str
    x: str
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    references: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bars:
    """A picture of numbers: a row each, a dot per seed, a mark at the mean.

    Attributes:
        title: of the picture.
        rows: name of the row and name of the number.
        unit: how the numbers are shown.
    """

    title: str
    rows: Mapping[str, str]
    unit: Literal["percent", "number"] = "number"


@dataclass(frozen=True)
class Grid:
    """A picture of a grid of values: mean over seeds.

    Attributes:
        key: of `Findings.grids`.
        title: of the picture.
        x, y: what columns and rows are.
        columns, rows: their labels; for None, numbers from 0 with `step` between columns.
        unit: how the values are shown.
        step: between columns without labels.
    """

    key: str
    title: str
    x: str
    y: str
    columns: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    unit: Literal["percent", "number", "log10"] = "number"
    step: float = 1.0


Drawing = Lines | Bars | Grid


@dataclass(frozen=True)
class Source:
    """Where a claim was published.

    Attributes:
        paper: authors and year, with an address.
        figure: what was published, in numbers where there are any.
        read: how far the source was read for this: what is not verified is said.
    """

    paper: str
    figure: str
    read: str = "read in the source"


@dataclass(frozen=True, eq=False)
class Claim:
    """A claim of the literature with the experiment that tests it.

    Attributes:
        name: on the command line and in files.
        number: in the list of claims.
        sentence: the claim.
        source: where it was published.
        setting: the experiment in words: data, network, optimizer, steps, arms.
        parts: what is measured, with the rule of the verdict.
        experiment: measures with one seed.
        drawings: the pictures of it.
        known: what is known of why the result differs from the published one, written after the run.
        seconds: that one seed takes on one core, about.
    """

    name: str
    number: int
    sentence: str
    source: Source
    setting: str
    parts: tuple[Part, ...]
    experiment: Callable[[int, Report], Findings]
    drawings: tuple[Drawing, ...] = ()
    known: str = ""
    seconds: float = 20.0
