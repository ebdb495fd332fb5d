"""Verdicts follow from the numbers, and are given only where the numbers are there."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchnorm.errors import DataError
from batchnorm.studies.records import Drift, Moments
from batchnorm.studies.verdicts import Claim, Comparison, Grade, judge, read
from batchnorm.studies.verdicts import formatting as q
from batchnorm.studies.verdicts.internals import layer_drift, total_drift
from batchnorm.studies.verdicts.results import Network, Sample
from tests.study.results_fixture import Record, each_seed, record, results, usual, write


def _network(folder: Path, runs: Sequence[Record]) -> Network:
    return read(write(folder, results(runs)) / "results.json").networks[0]


def _claims(folder: Path, runs: Sequence[Record]) -> dict[str, Claim]:
    return {claim.key: _plain(claim) for claim in judge(_network(folder, runs))}


def _plain(claim: Claim) -> Claim:
    """With spaces that can be typed."""
    texts = {name: getattr(claim, name).replace(q.SPACE, " ") for name in ("answer", "figure", "phrase")}
    return replace(claim, **texts, details=tuple(line.replace(q.SPACE, " ") for line in claim.details))


def _arms(seeds: int = 3, **per_arm: dict[str, Any]) -> list[Record]:
    """Runs of several arms, with a little noise over seeds that differs from arm to arm."""
    runs = []
    for i, (arm, fields) in enumerate(per_arm.items()):
        for seed in range(seeds):
            wobble = 0.001 * ((seed * (i + 2)) % 3 - 1)
            made = {**fields, "accuracy": fields.get("accuracy", 0.95) + wobble}
            if made.get("steps"):
                made["steps"] += (seed + i) % 2
            runs.append(record(arm=arm.replace("_plus_", "+"), seed=seed, **made))
    return runs


def test_a_clear_win_is_supported(tmp_path: Path) -> None:
    runs = _arms(none={"accuracy": 0.90, "steps": 400}, batchnorm={"accuracy": 0.95, "steps": 100})
    claims = _claims(tmp_path, runs)
    assert claims["speed"].grade is Grade.SUPPORTED
    assert claims["speed"].figure == "4.0× fewer steps"
    assert claims["accuracy"].grade is Grade.SUPPORTED
    assert "+4.9" in claims["accuracy"].details[0]
    assert "3 seeds" in claims["accuracy"].details[0]


def test_a_clear_loss_is_said_in_plain_words(tmp_path: Path) -> None:
    runs = _arms(none={"accuracy": 0.95, "steps": 100}, batchnorm={"accuracy": 0.90, "steps": 400})
    claims = _claims(tmp_path, runs)
    assert claims["speed"].grade is Grade.AGAINST
    assert claims["speed"].phrase == "trains slower"
    assert "4.0 times more" in claims["speed"].answer
    assert claims["accuracy"].grade is Grade.AGAINST
    assert "Worse than no normalization" in claims["accuracy"].answer


def test_a_difference_within_the_spread_is_no_difference(tmp_path: Path) -> None:
    scattered = [
        record(arm=arm, seed=seed, accuracy=accuracy, steps=steps)
        for arm, accuracies in (("none", (0.90, 0.94, 0.95)), ("batchnorm", (0.95, 0.93, 0.97)))
        for seed, (accuracy, steps) in enumerate(zip(accuracies, (200, 210, 220), strict=True))
    ]
    claims = _claims(tmp_path, scattered)
    assert claims["accuracy"].grade is Grade.UNCLEAR
    assert claims["speed"].grade is Grade.UNCLEAR


def test_a_certain_difference_below_the_minimal_effect_is_no_difference() -> None:
    assert Comparison((0.004, 0.004, 0.004), minimal=0.005).grade is Grade.UNCLEAR
    assert Comparison((0.006, 0.006, 0.006), minimal=0.005).grade is Grade.SUPPORTED


def test_the_interval_is_students() -> None:
    # 1, 2, 3: mean 2, standard error 1/√3, and 4.303 of them on either side with two degrees of freedom.
    comparison = Comparison((1.0, 2.0, 3.0), minimal=0.0)
    assert comparison.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert comparison.grade is Grade.UNCLEAR
    assert Comparison((2.0, 2.5, 3.0), minimal=0.0).grade is Grade.SUPPORTED
    assert Comparison(tuple([1.0, 1.1] * 40), minimal=0.0).half_width == pytest.approx(0.01133, rel=0.05)


def test_what_is_not_clear_says_how_large_a_difference_would_have_shown() -> None:
    unclear = Comparison((0.01, 0.02, 0.03), minimal=0.005)
    assert unclear.visible == unclear.half_width == pytest.approx(0.01 * 4.303 / math.sqrt(3))
    assert unclear.basis(q.points).endswith(
        "3 seeds; 2.5 points or more would have shown".replace(" points", "\N{NO-BREAK SPACE}points")
    )
    assert Comparison((0.001, 0.001), minimal=0.005).visible == 0.005
    for mean, grade in ((0.0247, Grade.UNCLEAR), (0.0249, Grade.SUPPORTED)):
        assert Comparison((mean - 0.01, mean, mean + 0.01), minimal=0.005).grade is grade
    assert "would have shown" not in Comparison((0.02, 0.021), minimal=0.005).basis(q.points)


def test_arms_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Seeds differ by far more than the arms do; the arms differ by the same everywhere."""
    runs = [
        record(arm=arm, seed=seed, accuracy=base + gain)
        for arm, gain in (("none", 0.0), ("batchnorm", 0.01))
        for seed, base in enumerate((0.80, 0.85, 0.90))
    ]
    assert _claims(tmp_path, runs)["accuracy"].grade is Grade.SUPPORTED
    swapped = [{**run, "seed": 2 - run["seed"]} if run["arm"] == "none" else run for run in runs]
    assert _claims(tmp_path, swapped)["accuracy"].grade is Grade.UNCLEAR


def test_one_seed_gives_indications_only(tmp_path: Path) -> None:
    content = usual(seeds=1)
    study = read(write(tmp_path, content) / "results.json")
    for network in study.networks:
        claims = judge(network)
        assert claims
        assert {claim.grade for claim in claims} <= {Grade.INDICATION, Grade.MEASURED}
        assert all("spread unknown" in " ".join((c.answer, *c.details)) for c in claims if c.key != "cost")


@pytest.mark.parametrize(
    ("arms", "claimed"), [(["batchnorm"], {"statistics"}), (["none"], set()), (["dropout", "l1"], set())]
)
def test_only_what_was_measured_is_claimed(tmp_path: Path, arms: list[str], claimed: set[str]) -> None:
    study = read(write(tmp_path, usual(arms)) / "results.json")
    for network in study.networks:
        assert {claim.key for claim in judge(network)} == claimed


def test_without_the_plain_network_only_the_other_rivals_are_claimed(tmp_path: Path) -> None:
    claims = _claims(tmp_path, _arms(batchnorm={"accuracy": 0.95}, dropout={"accuracy": 0.90}))
    assert set(claims) == {"accuracy", "statistics"}
    assert claims["accuracy"].question == "Does it generalize better than dropout?"


def test_a_mixed_result_is_partly_supported_and_names_each_rival(tmp_path: Path) -> None:
    runs = _arms(
        none={"accuracy": 0.90},
        batchnorm={"accuracy": 0.95},
        l2={"accuracy": 0.95},
        dropout={"accuracy": 0.98},
    )
    claim = _claims(tmp_path, runs)["accuracy"]
    assert claim.grade is Grade.PARTLY
    for words in ("Better than no normalization", "worse than dropout", "no clear difference from L2"):
        assert words in claim.answer


def test_a_combination_with_batch_normalization_is_no_rival(tmp_path: Path) -> None:
    runs = _arms(
        none={"accuracy": 0.90}, batchnorm={"accuracy": 0.95}, batchnorm_plus_dropout={"accuracy": 0.99}
    )
    claim = _claims(tmp_path, runs)["accuracy"]
    assert claim.grade is Grade.SUPPORTED
    assert any(line.startswith("batchnorm+dropout in place") and "+4." in line for line in claim.details)


def test_a_network_that_hardly_trains_does_not_generalize_worse(tmp_path: Path) -> None:
    claims = _claims(
        tmp_path, _arms(none={"accuracy": 0.11}, batchnorm={"accuracy": 0.95}, l2={"accuracy": 0.95})
    )
    assert claims["accuracy"].question == "Does it generalize better than L2?"
    assert "Not compared: with no normalization (11" in claims["accuracy"].details[-1]
    assert any("hardly trains" in line for line in claims["drift"].details)
    assert "accuracy" not in _claims(tmp_path, _arms(none={"accuracy": 0.11}, batchnorm={"accuracy": 0.95}))


def test_a_target_never_reached_is_a_bound(tmp_path: Path) -> None:
    """A run of 500 steps that does not arrive counts as 500, so that 100 are at least 5 times fewer."""
    runs = _arms(none={"steps": None}, batchnorm={"steps": 100})
    claim = _claims(tmp_path, runs)["speed"]
    assert claim.grade is Grade.SUPPORTED
    assert claim.figure.startswith("≥ 5.0×")
    assert "in none of 3 runs within 500 steps" in claim.answer
    assert "at least" in claim.answer


def test_where_neither_arrives_speed_is_not_claimed(tmp_path: Path) -> None:
    assert "speed" not in _claims(tmp_path, _arms(none={"steps": None}, batchnorm={"steps": None}))


def _rates(fields: dict[str, dict[float, dict[str, Any]]]) -> list[Record]:
    return [
        run
        for arm, by_rate in fields.items()
        for rate, made in by_rate.items()
        for run in each_seed(
            lambda seed, arm=arm, rate=rate, made=made: record(arm=arm, rate=rate, seed=seed, **made)
        )
    ]


def test_diverged_runs_are_results(tmp_path: Path) -> None:
    good, lost = {"accuracy": 0.95}, {"diverged": True}
    claim = _claims(
        tmp_path, _rates({"none": {0.01: good, 1.0: lost}, "batchnorm": {0.01: good, 1.0: good}})
    )["rates"]
    assert claim.grade is Grade.SUPPORTED
    assert "nothing (every run diverged) without" in claim.answer
    assert "Diverged: 0 of 6 runs with it, 3 of 6 without." in claim.details[1]


def test_a_limit_that_was_not_reached_is_no_difference(tmp_path: Path) -> None:
    better, good = {"accuracy": 0.955}, {"accuracy": 0.945}
    claim = _claims(
        tmp_path, _rates({"none": {0.01: good, 1.0: good}, "batchnorm": {0.01: better, 1.0: better}})
    )["rates"]
    assert claim.grade is Grade.UNCLEAR
    assert "the limit lies beyond" in claim.answer


def test_rates_are_compared_where_one_still_works(tmp_path: Path) -> None:
    good, bad, worse = {"accuracy": 0.95}, {"accuracy": 0.5}, {"accuracy": 0.1}
    fields = {"none": {0.01: good, 0.1: bad, 1.0: bad}, "batchnorm": {0.01: good, 0.1: good, 1.0: worse}}
    claim = _claims(tmp_path, _rates(fields))["rates"]
    assert claim.grade is Grade.SUPPORTED
    assert claim.figure == "+45.0 points at 0.1"
    assert "Neither works at 1." in claim.answer


def test_one_rate_says_nothing_of_rates(tmp_path: Path) -> None:
    assert "rates" not in _claims(tmp_path, _arms(none={}, batchnorm={}))


@pytest.mark.parametrize(
    ("without", "with_it", "grade"),
    [
        (1e-5, 0.5, Grade.SUPPORTED),
        (0.5, 1e-5, Grade.AGAINST),
        (0.5, 0.5, Grade.UNCLEAR),
        (1e-5, 1e5, Grade.UNCLEAR),
    ],
)
def test_gradients_are_alive_when_first_and_last_are_alike(
    tmp_path: Path, without: float, with_it: float, grade: Grade
) -> None:
    """An exploding gradient is no better than a vanishing one."""
    runs = _arms(
        none={"layers": 9, "gradient_ratio": without}, batchnorm={"layers": 9, "gradient_ratio": with_it}
    )
    assert _claims(tmp_path, runs)["gradients"].grade is grade


def test_a_shallow_network_says_nothing_of_vanishing_gradients(tmp_path: Path) -> None:
    assert "gradients" not in _claims(tmp_path, _arms(none={"layers": 2}, batchnorm={"layers": 2}))


def test_drift_is_the_distance_from_the_start_in_spreads() -> None:
    steady = Moments((5.0, 5.0, 5.0), (2.0, 2.0, 2.0))
    moving = Moments((0.0, 3.0, 3.0), (4.0, 8.0, 8.0))
    assert layer_drift(steady) == 0
    assert layer_drift(moving) == pytest.approx(5 / (20 / 3))
    assert layer_drift(Moments((1.0, 1.0), (0.0, 0.0))) != layer_drift(steady)  # no spread, no unit


def test_the_data_that_go_in_do_not_count_as_drift(tmp_path: Path) -> None:
    drifts = {
        "first": Moments((0.0, 100.0), (1.0, 1.0)),
        "second": Moments((0.0, 1.0), (1.0, 1.0)),
    }
    (run,) = _network(tmp_path, [record()]).runs
    assert total_drift(replace(run, input_drift=Drift((0, 1), drifts))) == 1.0


def test_less_drift_is_supported(tmp_path: Path) -> None:
    runs = _arms(none={"layers": 4, "drift": 1.0}, batchnorm={"layers": 4, "drift": 0.1})
    assert _claims(tmp_path, runs)["drift"].grade is Grade.SUPPORTED


def test_calibration_is_judged_against_the_running_statistics(tmp_path: Path) -> None:
    runs = _arms(batchnorm={"accuracy": 0.9})
    for run in runs:
        run["test_time_statistics"] = {"batch": 0.93, "running": 0.90, "calibrated": 0.94}
    claim = _claims(tmp_path, runs)["statistics"]
    assert claim.grade is Grade.SUPPORTED
    assert claim.figure == "+4.0 points"


def test_equal_rates_are_compared_in_blocks_and_a_seed_counts_once(tmp_path: Path) -> None:
    """By hand: at each rate the steps of a seed halve, however far the rates are apart."""
    runs = [
        record(arm=arm, rate=rate, seed=seed, steps=steps * (2 if arm == "none" else 1) * factor)
        for arm in ("none", "batchnorm")
        for rate, steps in ((1e-3, 200), (1e-2, 20))
        for seed, factor in enumerate((1.0, 1.1, 0.9))
    ]
    claim = _claims(tmp_path, runs)["speed"]
    (line,) = [line for line in claim.details if line.startswith("At equal rates")]
    assert line == (
        "At equal rates, averaged over the 2 at which either gets there: 2.0 times fewer steps "
        "(95 % interval 2.0 to 2.0, 3 seeds): faster with it."
    )
    # With a seed that is slower at one rate by as much as it is faster at the other, its difference is 0.
    for run in runs:
        if run["arm"] == "batchnorm" and run["learning_rate"] == 1e-2:
            run["steps_to_target"] *= 4
    (line,) = [line for line in _claims(tmp_path, runs)["speed"].details if line.startswith("At equal")]
    assert "no clear difference" in line


def test_cost_stands_beside_the_framework_s_layer_where_that_was_timed(tmp_path: Path) -> None:
    content = results(_arms(none={}, batchnorm={}))
    name = next(iter(content["networks"]))
    measured = content["networks"][name]
    measured["batchnorm"]["seconds_per_step"] = {"values": [2e-3, 3e-3, 4e-3]}
    stock = {"seconds_per_step": [1e-3, 2e-3, 2e-3], "seconds_per_prediction": 1.0}
    content["timing"] = {name: {"stock": {**stock, "bytes_kept_for_backward": 240_000}}}
    (network,) = read(write(tmp_path, content) / "results.json").networks
    assert network.arms == ("none", "batchnorm")
    assert network.timed == ("none", "batchnorm", "stock")
    claim = next(_plain(claim) for claim in judge(network) if claim.key == "cost")
    assert (
        "With the framework's own layer a step takes 2.00 ms and keeps 0.240 MB: ours takes 2.0 times its "
        "time and 0.70 times its memory." in claim.answer
    )


def test_cost_is_in_medians_of_pairs_and_says_when_the_machine_was_busy(tmp_path: Path) -> None:
    content = results(_arms(none={}, batchnorm={}))
    times = {"none": [1e-3, 2e-3, 1e-3], "batchnorm": [2e-3, 4e-3, 9e-2]}
    for arm, values in times.items():
        content["networks"]["mlp"][arm]["seconds_per_step"] = {"mean": None, "std": None, "values": values}
    claims = judge(read(write(tmp_path, content) / "results.json").networks[0])
    claim = next(_plain(claim) for claim in claims if claim.key == "cost")
    assert "2.0 times as long" in claim.answer
    assert "4.00 ms" in claim.answer
    assert any("disturbed" in line for line in claim.details)


def test_nothing_raw_is_printed(tmp_path: Path) -> None:
    """Whatever is missing: no nan, no None in any sentence."""
    content = usual(seeds=2)
    for run in content["runs"]:
        if run["seed"] == 1:
            run["epochs"] = [dict.fromkeys(run["epochs"][0])]
            run["gradient_norm"] = run["input_drift"] = run["test_time_statistics"] = None
            run["steps_to_target"] = run["steps_per_epoch"] = None
    for network in read(write(tmp_path, content) / "results.json").networks:
        for claim in judge(network):
            text = " ".join((claim.answer, claim.figure, claim.phrase, *claim.details)).lower()
            assert "nan" not in text.replace("nant", "")
            assert "none" not in text.replace("in none of", "").replace("none of", "")
            assert "inf" not in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "the top level is"),
        ("{}", "runs is missing"),
        ('{"runs": []}', "runs is empty"),
        ('{"runs": [3]}', r"runs\[0\] is 3"),
        ('{"runs": [{"learning_rate": "fast", "seed": 0}]}', "learning_rate is 'fast', a number is needed"),
        ('{"runs": [{"learning_rate": 0.1, "seed": null}]}', "seed is missing, a number is needed"),
        (json.dumps({"runs": [record(rate=-1.0)]}), "learning_rate that is not above 0"),
        (
            json.dumps({"runs": [record() | {"epochs": [{"epoch": 1}, 3]}]}),
            r"runs\[0\]\.epochs\[1\] is 3, an obj",
        ),
    ],
)
def test_malformed_results_are_refused_in_one_line(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*No such file"):
        read(tmp_path / "results.json")
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not JSON"):
        read(tmp_path / "results.json")


def test_series_of_unequal_length_are_refused(tmp_path: Path) -> None:
    run = record()
    run["gradient_norm"]["steps"].pop()
    with pytest.raises(DataError, match="values for"):
        read(write(tmp_path, {"runs": [run]}) / "results.json")


def test_numbers_beyond_floats_are_missing(tmp_path: Path) -> None:
    content = json.dumps(results([record()])).replace('"test_loss": 2.', '"test_loss": 1e999, "x": 2.')
    (tmp_path / "results.json").write_text(content)
    assert judge(read(tmp_path / "results.json").networks[0])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (q.percent(0.9512), "95.1 %"),
        (q.points(-0.0001), "0.0 points"),
        (q.points(-0.0123), "\N{MINUS SIGN}1.2 points"),
        (q.times(1234.5), "1,200"),
        (q.times(1e-9), "1.0 × 10⁻⁹"),
        (q.times(math.nan), "–"),
        (q.duration(0.00045), "0.450 ms"),
        (q.duration(99.96e-6), "100 µs"),
        (q.duration(2.5), "2.50 s"),
        (q.megabytes(123_456), "0.123 MB"),
        (q.rate(1e-5), "1e\N{MINUS SIGN}05"),
        (q.spread(Sample((0.94, 0.96)), q.percent), "95.0 ± 1.4 %"),
        (q.spread(Sample((0.94,)), q.percent), "94.0 %"),
        (q.spread(Sample(()), q.percent), "–"),
        (q.spread(Sample((0.99e-3, 1.03e-3)), q.duration), "1.01 ± 0.03 ms"),
        (q.power_of_ten(1e-3), "10⁻³"),
    ],
)
def test_numbers_read_well(written: str, expected: str) -> None:
    assert written.replace(q.SPACE, " ") == expected
