"""`batchnorm doctor` on a user's model and files, and the page that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchnorm.doctor.findings import CHECKS, Cost, Diagnosis, Finding, LayerGap
from batchnorm.studies.doctor_page import render
from tests.support.commands import assert_fails, folder, run

_TRAINED = """

def trained():
    model = net()
    torch.nn.init.uniform_(model[0].weight, 0.5, 1.5)
    torch.nn.init.normal_(model[0].bias)
    return model


def fine():
    import batchnorm
    x, *_ = data()
    model = trained()
    batchnorm.calibrate(model, [torch.from_numpy(x).float()])
    return model


class Sequences(nn.Module):
    # of spoken vowels: frames [N, L, 12]

    def __init__(self, is_masked=False):
        super().__init__()
        import batchnorm
        self.is_masked = is_masked
        self.first, self.second = nn.Conv1d(12, 8, 3, padding=1), nn.Conv1d(8, 9, 3, padding=1)
        self.norm = batchnorm.BatchNorm1d(8)
        nn.init.uniform_(self.norm.bias, 0.5, 1.5)

    def forward(self, x, lengths):
        import batchnorm
        valid = (torch.arange(x.shape[1]) < lengths[:, None])[:, None]
        with batchnorm.mask(self.norm, valid[:, 0] if self.is_masked else None):
            x = self.norm(self.first(x.transpose(1, 2)))
        x = self.second(x * valid if self.is_masked else x)
        return (x * valid).sum(2) / lengths[:, None]


def masked():
    return Sequences(is_masked=True)
"""


@pytest.fixture
def doctored(own: Path) -> Path:
    own.write_text(own.read_text() + _TRAINED)
    return own


def test_serious_findings_fail_a_strict_run(doctored: Path) -> None:
    done = run("doctor", f"{doctored}:trained")
    assert done.exit_code == 0, done.output
    assert "serious: never-updated, 0" in done.stdout
    assert "> batchnorm.calibrate(model, data)" in done.stdout
    assert run("doctor", f"{doctored}:trained", "--strict").exit_code == 1
    assert run("doctor", f"{doctored}:net", "--strict").exit_code == 0  # untrained: notes
    assert run("doctor", f"{doctored}:trained", "--strict", "--ignore", "never-updated").exit_code == 0
    assert folder(doctored) == {"own.py"}


def test_data_page_and_json(doctored: Path) -> None:
    page = doctored.with_name("doctor.html")
    options = ["--data", f"{doctored}:data", "--batch-size", 8, "--out", page, "--strict"]
    done = run("doctor", f"{doctored}:fine", *options)
    assert done.exit_code == 0, done.output
    assert "forwards of 40 samples" in done.stdout
    assert "accuracy by statistics: running" in done.stdout
    assert f"written: {page}" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert "The norms of Sequential" in text
    assert "<svg" in text
    assert_fails(run("doctor", f"{doctored}:fine", *options), 2, "is there already")
    done = run("doctor", f"{doctored}:fine", *options, "--json", "--force")
    found = json.loads(done.stdout)
    assert found["cost"]["samples"] == 40
    assert found["is_serious"] is False
    assert [layer["layer"] for layer in found["layers"]] == ["0", "2"]


def test_data_with_lengths(doctored: Path) -> None:
    """Row 54: `model(x, lengths)` is asked whether it reads the padding of spoken vowels."""
    found = {}
    for model in ("Sequences", "masked"):
        options = ["--data", "vowels", "--samples", 64, "--json"]
        done = run("doctor", f"{doctored}:{model}", *options)
        assert done.exit_code == 0, done.output
        found[model] = json.loads(done.stdout)
        assert found[model]["cost"]["samples"] == 64
        assert found[model]["measure"] == "accuracy"
        assert found[model]["unchecked"] == []
        assert [f["layer"] for f in found[model]["findings"] if f["check"] == "bias-before"] == ["norm"]
    padding = [f for f in found["Sequences"]["findings"] if f["check"] == "padding"]
    assert [f["layer"] for f in padding] == ["second"]
    assert "taken for padding" not in padding[0]["message"]  # the lengths were given
    assert "padding" not in {f["check"] for f in found["masked"]["findings"]}
    done = run("doctor", f"{doctored}:masked", "--data", "vowels", "--input", "1x29x12")
    assert_fails(done, 2, "its shape is told by the data, not by --input")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--out", "page.txt"], ["its name must end in .html"]),
        (["--ignore", "bias"], ["there is no check 'bias'"]),
        (["--samples", "1"], ["samples is a number of 2 or more"]),
    ],
)
def test_what_a_user_does_wrong_is_one_line(doctored: Path, options: list[str], parts: list[str]) -> None:
    assert_fails(run("doctor", f"{doctored}:fine", *options), 2, *parts)
    assert folder(doctored) == {"own.py"}


def test_a_page_escapes_what_it_prints() -> None:
    nasty = "<script>x</script>\x1b[2J"
    findings = tuple(
        Finding("likely", check, nasty, nasty, nasty, nasty, {"number": 1.0}) for check in CHECKS
    )
    layers = (LayerGap(nasty, 0.3, 2.0, 0.1, None, 32.0),)
    page = render(
        Diagnosis(nasty, 3, findings, {"running": 0.5}, "accuracy", layers, Cost(5, 64, 1.0), (nasty,))
    )
    assert page.count("<script>") == 2  # those that the policy of the page knows by hash
    assert "\x1b" not in page.replace(f"<code>{nasty}", "")
    assert page.count("<article") == len(CHECKS)
    assert "Nothing was found" in render(Diagnosis("Net", 0, ()))
