"""The terminal shows names as they are."""

from __future__ import annotations

import pytest

from batchnorm.studies.arms import KNOWN
from batchnorm.studies.data import SOURCES
from batchnorm.studies.networks import NETWORKS
from batchnorm.studies.terminal import TerminalDisplay, print_choices, print_results
from tests.study.test_summary import record, summary

NAME = "[red]x.py:f[/] :warning: [link=file:///etc]y[/link]"


def test_a_name_is_no_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    results = summary()
    results["networks"] = {f"{NAME}\x1b[2J": results["networks"]["mlp"]}
    print_results(results)
    with TerminalDisplay() as display:
        display.stage(NAME)
        display.run_ended(f"{NAME}\x1b[2J", "mlp", record("mlp", "none", 0.1, 0, None))
        display.notice(f"{NAME}\nand more")
    told = capsys.readouterr()
    assert f"{NAME}\\x1b[2J on own, each arm" in " ".join(told.out.split())
    assert told.err.splitlines() == [
        NAME,
        f"{NAME}\\x1b[2J: diverged, its loss is no longer finite; kept as a result",
        f"{NAME} and more",
    ]
    assert "\x1b" not in told.out + told.err


def test_two_rates_are_two_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    results = summary()
    results["networks"]["mlp"]["none"]["best_learning_rate"] = 1.0000001e-3
    print_results(results)
    assert "0.0010000001" in capsys.readouterr().out


def test_choices_have_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    print_choices()
    *lines, _ = capsys.readouterr().out.splitlines()
    assert {tuple(line.split()[:2]) for line in lines} == {
        *(("--data", name) for name in SOURCES),
        *(("--network", name) for name in NETWORKS),
        *(("--arms", name) for name in KNOWN),
    }
    assert all(len(line.split()) > 3 for line in lines)
