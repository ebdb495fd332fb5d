"""Defines what a diagnosis is made of: findings with evidence and remedy, and what it has cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Literal

from batchnorm.errors import in_one_line
from batchnorm.text_table import escaped

_COLORS = {"serious": "#a33f00", "likely": "#5b5200", "note": "#57606a"}
_MONO = "font-family: ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap"

Severity = Literal["serious", "likely", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "likely", "note")
Evidence = Mapping[str, float | int | str]
PAGE = "docs/doctor.md"

# Every check, in the order in which findings of one severity are listed, with its heading.
CHECKS = {
    "nonfinite-statistics": "Running statistics that are NaN or inf",
    "nonfinite-parameters": "Weight or bias that is NaN or inf",
    "nonfinite-output": "The first layer whose output is not finite",
    "negative-variance": "Negative running variance",
    "never-updated": "Running statistics that were never updated",
    "batch-mates": "A prediction depends on its neighbours in the batch",
    "training-graph": "An exported graph whose norms are fixed in training",
    "gap": "Running statistics cost accuracy",
    "statistics-off": "Running statistics of one layer are off",
    "frozen-parameters": "Frozen parameters whose statistics move",
    "mixed-modes": "Norms of one model in different modes",
    "momentum": "Momentum so large that only the last batch counts",
    "prior": "The initial 0 and 1 in the running statistics",
    "padding": "A prediction depends on padding",
    "ordered-batches": "Batches that differ systematically",
    "small-batches": "Batches too small for their statistics",
    "one-value": "One value per channel",
    "untracked": "Norms without running statistics",
    "mixed-synchronization": "Plain and synchronized norms in one model",
    "different-ranks": "Running statistics that differ between processes",
    "half-statistics": "Running statistics in half precision",
    "huge-variance": "A running variance out of all proportion",
    "zero-variance": "Running variance of zero",
    "offset": "A mean far above the standard deviation",
    "half-overflow": "Values beyond float16",
    "repeated-calls": "A norm that is called more than once",
    "dropout-before": "Dropout right before a norm",
    "weight-decay": "Weight decay on weight and bias",
    "dead-channels": "Dead channels",
    "frozen-statistics": "Frozen statistics under weights that learn",
    "bias-before": "A bias that a norm removes",
    "training-mode": "A model in training mode",
    "unreadable": "A norm without values",
}


@dataclass(frozen=True)
class Finding:
    """Reports one defect, or one fact to know, of a model or of one of its norms.

    Attributes:
        severity: "serious" = outputs are wrong, or will be; "likely" = probably costs accuracy; "note".
        check: name of the check, such as "never-updated".
        layer: qualified name; None for the whole model.
        message: what was found, with its numbers.
        why: why it matters, in one sentence.
        remedy: code to paste, in which `model`, `data` and `optimizer` are what `diagnose` was given.
        evidence: the numbers, by name.
        short: the finding in a few words, as `inspect` shows it.
    """

    severity: Severity
    check: str
    layer: str | None
    message: str
    why: str
    remedy: str
    evidence: Evidence = field(default_factory=dict)
    short: str = ""

    @property
    def page(self) -> str:
        """Where the documentation tells of the check."""
        return f"{PAGE}#{self.check}"


@dataclass(frozen=True)
class Cost:
    """What a diagnosis has cost.

    Attributes:
        forwards: number of passes over the samples, as a fraction where a pass took fewer of them.
        samples: number of samples; 0 without data.
        seconds: in all.
    """

    forwards: float = 0.0
    samples: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if not self.samples:
            return f"{self.seconds:.1f} s, without data"
        return f"{self.forwards:.3g} forwards of {self.samples:,} samples, {self.seconds:.1f} s"


@dataclass(frozen=True)
class LayerGap:
    """Compares the running statistics of a layer with those of the data.

    Attributes:
        layer: qualified name.
        mean_off: root mean square over channels of (running mean − mean of the data), standard deviations.
        std_ratio: standard deviation of the data over the running one, or the inverse, 1 or more, typical
            over channels.
        cost: what the layer's running statistics cost alone: accuracy, or share of the loss, that replacing
            them gains; None where it was not tried.
        noise: standard deviation of its batch means, in standard deviations; None for few batches.
        values: number of values per channel and batch, on average.
    """

    layer: str
    mean_off: float
    std_ratio: float
    cost: float | None
    noise: float | None
    values: float


@dataclass(frozen=True)
class Diagnosis:
    """Reports what is wrong with the norms of a model; `print` shows it, notebooks show it as HTML.

    Attributes:
        model: the model's class.
        norms: number of its batch normalizations.
        findings: what was found: the most severe first, then in the order of `CHECKS`.
        scores: by "running", "batch", "population" and "adapted" statistics; {} without data.
        measure: what the scores are: "accuracy", "loss" or "difference of outputs".
        layers: a comparison per norm; () without data.
        cost: what the diagnosis has cost.
        unchecked: what could not be looked at, and why.
    """

    model: str
    norms: int
    findings: tuple[Finding, ...]
    scores: Mapping[str, float] = field(default_factory=dict)
    measure: str = ""
    layers: tuple[LayerGap, ...] = ()
    cost: Cost = Cost()
    unchecked: tuple[str, ...] = ()

    @property
    def is_serious(self) -> bool:
        """Whether any finding is serious."""
        return any(finding.severity == "serious" for finding in self.findings)

    @property
    def title(self) -> str:
        """The result in one line."""
        count = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        told = [
            f"{count[s]} {word}" for s, word in zip(SEVERITIES, ("serious", "likely", "to know"), strict=True)
        ]
        norms = "1 batch normalization" if self.norms == 1 else f"{self.norms} batch normalizations"
        return f"{self.model}: {norms}, {', '.join(told)} ({self.cost})"

    def groups(self) -> list[tuple[Finding, list[Finding]]]:
        """Return the findings by severity and check: the first of each, and the others."""
        found: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            found.setdefault((finding.severity, finding.check), []).append(finding)
        return [(first, others) for first, *others in found.values()]

    def scores_in_words(self) -> str:
        """Return the scores by each statistics, in one line; "" where there are none."""
        shown = [f"{name} {_score(value, self.measure)}" for name, value in self.scores.items()]
        return f"{self.measure} by statistics: {', '.join(shown)}" if shown else ""

    def __str__(self) -> str:
        lines = [self.title]
        if self.scores:
            lines.append(self.scores_in_words())
        for first, others in self.groups():
            lines += ["", f"{first.severity}: {first.check}" + (f", {first.layer}" if first.layer else "")]
            lines += [f"  {first.message}", f"  {first.why}"]
            lines += [f"  > {line}" for line in first.remedy.splitlines()]
            if others:
                lines.append(f"  also: {listed([other.layer or 'the model' for other in others])}")
            lines.append(f"  {first.page}")
        lines += [f"\nnot looked at: {why}" for why in self.unchecked]
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        return _html(self)

    def to_dict(self) -> dict[str, object]:
        """Return plain data, for JSON: numbers that are not finite are strings."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        for finding, given in zip(plain["findings"], self.findings, strict=True):
            finding["page"] = given.page
        return {"title": self.title, "is_serious": self.is_serious, **plain}

    def to_json(self) -> str:
        """Return the same as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def ordered(findings: list[Finding]) -> tuple[Finding, ...]:
    """Return findings, the most severe first, then by check; otherwise in the order of the model."""
    checks = list(CHECKS)
    return tuple(sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), checks.index(f.check))))


def listed(names: list[str], most: int = 6) -> str:
    """Return names with commas, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def printable(text: str) -> str:
    """Return text of several lines as a terminal or a page only shows it, whatever a name put into it."""
    return "\n".join(map(in_one_line, text.split("\n")))


def _score(value: float, measure: str) -> str:
    return f"{100 * value:.1f} %" if measure == "accuracy" else f"{value:.4g}"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value


def _html(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as a fragment of HTML with its own style; every text is escaped."""
    parts = [f"<p><strong>{escaped(diagnosis.title)}</strong></p>"]
    if diagnosis.scores:
        parts.append(f"<p>{escaped(diagnosis.scores_in_words())}</p>")
    if diagnosis.findings:
        rows = "".join(_row(first, others) for first, others in diagnosis.groups())
        parts.append(f'<table style="text-align: left"><tbody>{rows}</tbody></table>')
    parts += [f"<p>not looked at: {escaped(why)}</p>" for why in diagnosis.unchecked]
    return f"<div>{''.join(parts)}</div>"


def _row(first: Finding, others: list[Finding]) -> str:
    layers = listed([found.layer for found in (first, *others) if found.layer])
    left, style = (
        "text-align: left; vertical-align: top",
        f"color: {_COLORS[first.severity]}; font-weight: 600",
    )
    return (
        f'<tr><td style="{left}"><span style="{style}">{first.severity}</span><br>{escaped(first.check)}</td>'
        f'<td style="{left}">{escaped(layers)}</td>'
        f'<td style="{left}">{escaped(first.message)} {escaped(first.why)}'
        f'<pre style="{_MONO}; margin: .3em 0">{escape(printable(first.remedy))}</pre></td></tr>'
    )
