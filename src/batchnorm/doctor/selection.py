"""Selects the findings that a diagnosis shows: without those that data refutes, and those to be ignored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchnorm.errors import OptionError

from . import thresholds as t
from .findings import CHECKS, Finding, LayerGap, ordered


def check_ignored(ignore: Iterable[str]) -> frozenset[str]:
    """Return what to ignore as a set, or raise OptionError for a check that is not there."""
    given = frozenset([ignore] if isinstance(ignore, str) else ignore)
    for entry in sorted(given, key=str):
        if not isinstance(entry, str) or entry.partition(":")[0] not in CHECKS:
            raise OptionError(f"ignore: there is no check {entry!r}; there are {', '.join(CHECKS)}")
    return given


def selected(
    found: list[Finding], layers: Sequence[LayerGap], ignored: frozenset[str]
) -> tuple[Finding, ...]:
    """Return the findings to show, in order.

    A layer whose statistics are those of the data holds no initial values, however few its updates were. Of a
    check without and with data on one layer, the more severe stays.
    """
    fine = {of.layer for of in layers if of.mean_off < t.OFF_MEAN and of.std_ratio < 1 + t.PRIOR_LIKELY / 2}
    kept: dict[tuple[str, str | None, str], Finding] = {}
    for finding in ordered(found):
        is_refuted = finding.check == "prior" and finding.layer in fine
        is_ignored = {finding.check, f"{finding.check}:{finding.layer}"} & ignored
        # one layer may remove the biases of several, or have NaN in weight and bias
        told = (
            finding.message
            if finding.check in ("bias-before", "nonfinite-parameters", "weight-decay")
            else ""
        )
        if not is_refuted and not is_ignored:
            kept.setdefault((finding.check, finding.layer, told), finding)
    return tuple(kept.values())
