"""What tests ask of a diagnosis, and its remedies, which are run; of a small network with planted faults."""

from __future__ import annotations

import torch

import batchnorm
from batchnorm.doctor.findings import Diagnosis, Finding
from benchmarks.doctor_faults import accuracy, batches, network, samples, trained

__all__ = ["accuracy", "applied", "batches", "checks", "network", "only", "samples", "trained"]


def checks(diagnosis: Diagnosis) -> set[tuple[str, str, str | None]]:
    """Return severity, check and layer of each finding."""
    return {(found.severity, found.check, found.layer) for found in diagnosis.findings}


def only(diagnosis: Diagnosis, check: str) -> Finding:
    """Return the first finding of a check."""
    found = [finding for finding in diagnosis.findings if finding.check == check]
    assert found, f"no {check}: {diagnosis}"
    return found[0]


def applied(finding: Finding, **names: object) -> dict[str, object]:
    """Run the remedy of a finding as it is printed, and return what its names hold afterwards."""
    scope: dict[str, object] = {"batchnorm": batchnorm, "torch": torch, **names}
    exec(compile(finding.remedy, finding.check, "exec"), scope)
    return scope
