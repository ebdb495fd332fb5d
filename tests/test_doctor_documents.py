"""docs/doctor.md tells of every check and every threshold, and of the case as it was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from batchnorm.doctor import findings, remedies, thresholds
from benchmarks import doctor_case, results_file

PAGE = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")


def test_every_check_has_its_place() -> None:
    assert set(re.findall(r'<a id="([\w-]+)"></a>', PAGE)) == set(findings.CHECKS)


def test_every_threshold_is_there_with_its_reason() -> None:
    assert thresholds.markdown() in PAGE
    assert len(thresholds.ALL) > 20
    for limit in thresholds.ALL:
        assert limit.reason
        assert set(limit.check.split(", ")) <= set(findings.CHECKS)


def test_names_in_remedies_are_quoted() -> None:
    code = remedies.remedies_of("torch").freeze('a"); import os; ("')
    assert code == 'batchnorm.freeze(model.get_submodule("a\\"); import os; (\\""))'
    keras = remedies.remedies_of("keras").freeze('base/a"b')
    assert keras == 'batchnorm.keras.freeze(model.get_layer("base").get_layer("a\\"b"))'


@pytest.mark.parametrize("measured", ["committed", pytest.param("again", marks=pytest.mark.slow)])
def test_the_case_is_found_and_mended(measured: str) -> None:
    """Each mend makes the network better where it is used, until the doctor finds nothing."""
    committed = results_file.load("doctor-case")["rows"]
    before, shuffled, masked, calibrated = (
        committed if measured == "committed" else doctor_case.measure(quick=True)
    )
    assert before["accuracy"] + 0.4 < shuffled["accuracy"]
    assert shuffled["accuracy"] + 0.1 < masked["accuracy"]
    assert masked["accuracy"] - 0.01 < calibrated["accuracy"]
    assert {"serious: gap", "likely: padding", "likely: ordered-batches"} <= set(before["findings"])
    assert "likely: padding" in shuffled["findings"]
    assert "likely: ordered-batches" not in shuffled["findings"]
    assert masked["findings"] == calibrated["findings"] == []
