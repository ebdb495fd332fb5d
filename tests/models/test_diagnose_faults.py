"""Every check finds its fault in every strength that `benchmarks/doctor_faults.py` plants."""

from __future__ import annotations

import pytest

from batchnorm.doctor.findings import CHECKS
from benchmarks import doctor_faults

# A gap of a point may be chance; that the statistics of its layer are off is none.
BY_ANOTHER = {"gap": "statistics-off"}


def test_every_check_has_faults() -> None:
    """But for the one that takes two processes: tests/models/test_diagnose_ranks.py."""
    assert set(CHECKS) - set(doctor_faults.FAULTS) == {"different-ranks"}
    assert sum(len(made) == 3 for made in doctor_faults.FAULTS.values()) == len(CHECKS) - 3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("check", doctor_faults.FAULTS)
def test_faults_are_found_at_the_weakest_that_costs_a_point(check: str) -> None:
    healthy = doctor_faults.accuracy(doctor_faults.trained())
    for told, make in doctor_faults.FAULTS[check].items():
        found = doctor_faults.strength(check, told, make(), healthy)
        if found["found"] is None and check in BY_ANOTHER:
            found = doctor_faults.strength(BY_ANOTHER[check], told, make(), healthy)
        assert found["found"] is not None, found
