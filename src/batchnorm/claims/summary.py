"""Sums up what experiments found, for `claims.json`, the committed results and the page of the docs."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import batchnorm
from batchnorm.studies.verdicts import formatting as q

from .claim import Claim, Record
from .rules import RULE, Judged, Part, Verdict, judge, worst

Records = Mapping[Claim, Sequence[Record]]


@dataclass(frozen=True)
class Outcome:
    """A claim after its run.

    Attributes:
        claim: what was tested.
        parts: judged by their rules.
        seconds: that a seed took, in the middle.
    """

    claim: Claim
    parts: tuple[Judged, ...]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """That of the worst part."""
        return worst(judged.verdict for judged in self.parts)

    @property
    def deciding(self) -> Judged:
        """The first part that has this verdict: where there is room for one, it is shown."""
        return next(judged for judged in self.parts if judged.verdict is self.verdict)


def judge_claim(claim: Claim, records: Sequence[Record]) -> Outcome:
    """Judges a claim by the records of its seeds."""
    parts = tuple(
        judge(part, [record.numbers.get(part.name, math.nan) for record in records]) for part in claim.parts
    )
    seconds = sorted(record.seconds for record in records)
    return Outcome(claim, parts, seconds[len(seconds) // 2])


def summarize(records: Records) -> dict[str, Any]:
    """Returns everything that was measured, as `claims.json` holds it."""
    return {
        "claims": [row(judge_claim(claim, found)) for claim, found in records.items()],
        "rule": RULE,
        "provenance": {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": {
                "python": platform.python_version(),
                "torch": version("torch"),
                "numpy": version("numpy"),
                "batchnorm": batchnorm.__version__,
            },
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": 1,
            "seeds": max(len(found) for found in records.values()),
        },
        "findings": {claim.name: list(found) for claim, found in records.items()},
    }


def row(outcome: Outcome) -> dict[str, Any]:
    """Returns a claim as the results have it: published, measured, interval and verdict, and its parts."""
    claim = outcome.claim
    deciding = outcome.deciding
    return {
        "name": claim.name,
        "number": claim.number,
        "claim": claim.sentence,
        "source": claim.source.paper,
        "published": claim.source.figure,
        "read": claim.source.read,
        "setting": claim.setting,
        "measure": deciding.part.measure,
        "measured": measured_in_words(deciding),
        "interval": list(deciding.interval),
        "verdict": outcome.verdict.value,
        "known": claim.known,
        "seeds": len(deciding.values),
        "seconds": outcome.seconds,
        "parts": [
            {
                "measure": judged.part.measure,
                "published": judged.part.published,
                "unit": judged.part.unit,
                "band": [end if math.isfinite(end) else None for end in judged.part.band],
                "no effect": judged.part.none,
                "values": list(judged.values),
                "mean": judged.mean,
                "interval": list(judged.interval),
                "smallest effect": judged.part.smallest(len(judged.values)),
                "verdict": judged.verdict.value,
            }
            for judged in outcome.parts
        ],
    }


def shown(part: Part, value: float) -> str:
    """Returns a value of a part's measure as people read it."""
    if part.unit == "ratio":
        digits = 4 if 0.5 < value < 2 else 2
        return f"× {q.significant(value, digits)}" if math.isfinite(value) else q.MISSING
    if part.unit == "points":
        return q.points(value)
    if part.unit == "percent":
        return q.percent(value)
    return q.significant(value, 3)


def measured_in_words(judged: Judged) -> str:
    """Returns the mean with its interval: "× 33 (95 % interval × 29 to 38)"."""
    mean, (low, high) = shown(judged.part, judged.mean), judged.interval
    if math.isnan(low):
        return mean
    ends = q.span(shown(judged.part, low), shown(judged.part, high), " to ")
    return f"{mean} ({ends})"


def band_in_words(part: Part) -> str:
    """Returns which values count as the published effect: "at least × 2", "from × 1.18 to × 1.24"."""
    low, high = part.band
    is_share = part.unit in ("points", "percent")  # of which 1 is all
    if math.isinf(high) or (is_share and high == 1.0):
        return f"at least {shown(part, low)}"
    if math.isinf(low) or (is_share and low == -1.0):
        return f"at most {shown(part, high)}"
    return f"from {shown(part, low)} to {shown(part, high)}"
