"""Claims from the experiment to the report: measured, stored, resumed, judged and shown."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from batchnorm.claims import CLAIMS, Claim, ClaimsOptions, measure, run_claims
from batchnorm.claims.experiments import statistics
from batchnorm.claims.runner import Progress, finished
from batchnorm.cli.commands import app
from batchnorm.errors import DataError, OptionError
from batchnorm.studies import schedule
from batchnorm.studies.errors import StudyInterrupted
from benchmarks import results_file

ROOT = Path(__file__).parents[2]
TINY = "dropout-before-norm"


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_SHIFT_STEPS", 4)


class _Heard(Progress):
    def __init__(self, stop_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.stop_at, self.seconds, self.total = stop_at, 0.0, 0.0

    def begin(self, seconds: float, *_: int) -> None:
        self.total = seconds

    def advance(self, _: Claim, seed: int, seconds: float) -> None:
        self.seconds += seconds
        if seed == self.stop_at:
            raise KeyboardInterrupt

    def ended(self, _: Claim, seed: int) -> None:
        self.seeds.append(seed)


def test_a_claim_is_measured_stored_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_SECONDS", 0.0)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with pytest.raises(StudyInterrupted, match="1 of 2"):
        run_claims(ClaimsOptions((TINY,), seeds=2, out=tmp_path), _Heard(stop_at=1))
    so_far = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 experiment is still to come." in so_far
    assert 'http-equiv="refresh"' in so_far
    first = (tmp_path / "records" / f"{TINY}-0.json").read_bytes()
    heard = _Heard()
    result = run_claims(ClaimsOptions(("14",), seeds=2, out=tmp_path), heard)
    assert heard.seeds == [1]
    assert finished(ClaimsOptions(seeds=2, out=tmp_path)) == (TINY,)
    assert finished(ClaimsOptions(seeds=3, out=tmp_path)) == ()
    assert heard.seconds == pytest.approx(heard.total)
    assert (tmp_path / "records" / f"{TINY}-0.json").read_bytes() == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    (row,) = result.results["claims"]
    assert row["verdict"] == "not decided here"  # two seeds
    assert len(row["parts"][0]["values"]) == 2
    # Dropout of half behind a mean of 0 doubles the variance; behind all norms it changes none.
    found = json.loads((tmp_path / "claims.json").read_text())["findings"][TINY][0]["numbers"]
    assert found["shift, before"] > 1.9
    assert found["shift, after all"] == pytest.approx(1, abs=0.01)
    page = result.report.read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert row["measured"] in page
    assert "still to come" not in page
    assert 'http-equiv="refresh"' not in page
    assert page in unescape(result._repr_html_())
    assert page.count("<script>") == 2  # those that the policy knows
    assert "1 claim of the literature" in page


def test_the_same_seed_finds_the_same() -> None:
    (claim,) = ClaimsOptions((TINY,)).claims()
    both = [measure(claim, 3) for _ in range(2)]
    assert both[0] == both[1]
    assert both[0].numbers != measure(claim, 4).numbers


def test_records_of_other_code_are_refused_and_damaged_ones_measured_again(tmp_path: Path) -> None:
    options = ClaimsOptions((TINY,), 1, tmp_path)
    folder = tmp_path / "records"
    folder.mkdir()
    path = folder / f"{TINY}-0.json"
    settings = {"format": 1, "claim": TINY, "seed": 0, "experiment": "other"}
    path.write_text(json.dumps({"settings": settings, "numbers": {}}))
    with pytest.raises(DataError, match=r"experiment 'other'.*--out"):
        run_claims(options)
    path.write_text("{")
    with pytest.raises(StudyInterrupted, match="0 of 1"):
        run_claims(options, _Heard(stop_at=0))
    assert path.read_text() == "{"


def test_wrong_options_are_refused() -> None:
    with pytest.raises(OptionError, match=r"'nonsense'.*--list"):
        ClaimsOptions(("nonsense",))
    with pytest.raises(OptionError, match="--seeds 0"):
        ClaimsOptions(seeds=0)


def test_the_command_lists_claims_and_names_wrong_ones(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["claims", "--list"])
    assert listed.exit_code == 0
    assert [line.split()[1] for line in listed.output.splitlines()] == [claim.name for claim in CLAIMS]
    wrong = CliRunner().invoke(app, ["claims", "nonsense", "--out", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "unknown claim 'nonsense'" in wrong.output


def test_every_claim_is_whole() -> None:
    assert [claim.number for claim in CLAIMS] == list(range(1, 19))
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.seconds * 5 < 180 for claim in CLAIMS)
    assert sum(claim.seconds * 5 for claim in CLAIMS) < 3600
    for part in (part for claim in CLAIMS for part in claim.parts):
        low, high = part.band
        assert low < high
        assert math.isfinite(low) or math.isfinite(high)
        # No effect is outside the band, or the claim is that there is none.
        assert part.none is None or not low <= part.none <= high, part.name


def test_the_results_are_those_of_the_registered_claims() -> None:
    stored = json.loads((results_file.FOLDER / "claims-cpu.json").read_text(encoding="utf-8"))
    assert stored["provenance"]["commit"]
    registered = {claim.name: claim for claim in CLAIMS}
    for row in stored["claims"]:
        claim = registered[row["name"]]
        assert row["seeds"] >= 5
        assert row["published"] == claim.source.figure
        assert [part["measure"] for part in row["parts"]] == [part.measure for part in claim.parts]
        bands = [[end if math.isfinite(end) else None for end in part.band] for part in claim.parts]
        assert [part["band"] for part in row["parts"]] == bands
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert re.findall(r"^### \d+\. (.*)$", page, re.MULTILINE) == [row["name"] for row in stored["claims"]]
