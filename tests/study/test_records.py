"""What a study finds on disk: its own, another's, or damaged and to be done again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchnorm.errors import DataError, FileError
from batchnorm.studies.json_files import json_safe, read_stored, settings_at, write_json
from batchnorm.studies.records import (
    NAN,
    AccuracyByStatistics,
    Drift,
    Epoch,
    Gradients,
    Moments,
    Run,
    Timing,
)

SETTINGS: dict[str, object] = {
    "format": 1, "data": "digits 0123", "network": "mlp", "depth": None, "arm": "batchnorm",
    "learning_rate": 1e-3, "seed": 0, "epochs": 2, "batch_size": 5, "target_accuracy": 0.9,
    "network_source": None,
}  # fmt: skip
ARMS = ("none", "batchnorm")
TIMING = {
    "settings": SETTINGS,
    "arms": {
        arm: {"seconds_per_step": [0.1, 2e-3], "seconds_per_prediction": 0.1, "bytes_kept_for_backward": 9}
        for arm in ARMS
    },
}


RUN = Run(
    data="digits", network="mlp", depth=None, arm="batchnorm", learning_rate=1e-3, seed=0, status="finished",
    epochs=[Epoch(number, 0.5, 0.8, 0.6, 0.75) for number in (1, 2)],
    step_loss=[0.5] * 4, steps_per_epoch=2, batch_size=5, target_accuracy=0.9, steps_to_target=NAN,
    target_checked_every=1, parameters=9, bytes_kept_for_backward=NAN,
    gradient_norm=Gradients([0, 3], {"first": [0.1, 0.2], "last": [NAN, NAN]}),
    input_drift=Drift([0, 3], {name: Moments([0.0, NAN], [1.0, 1.0]) for name in ("first", "last")}),
    test_time_statistics=AccuracyByStatistics(0.7, 0.75, 0.76),
)  # fmt: skip


def found(path: Path) -> object:
    run = read_stored(path, SETTINGS, Run)
    return json_safe(run) if run is not None and run.answers(SETTINGS) else None


def found_timing(path: Path) -> object:
    if settings_at(path) != TIMING["settings"]:
        return None
    timing = read_stored(path, TIMING["settings"], Timing)
    return json_safe(timing) if timing is not None and timing.answers(ARMS) else None


def places(value: object, *before: object) -> Iterator[tuple[Any, ...]]:
    """Return the place of every value below one, as a path of keys and positions."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from places(item, *before, key)


def at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


MISSING = object()

# What a file holds, as it is written, and how it is read.
STORED: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "run": (json_safe({"settings": SETTINGS, **vars(RUN)}), found),
    "timing": (TIMING, found_timing),
}


def without_settings(whole: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in whole.items() if key != "settings"}


@pytest.mark.parametrize("kind", STORED)
def test_what_a_study_writes_it_reads(tmp_path: Path, kind: str) -> None:
    whole, read = STORED[kind]
    assert read(tmp_path / "a.json") is None
    write_json(tmp_path / "a.json", whole)
    assert read(tmp_path / "a.json") == without_settings(whole)
    assert settings_at(tmp_path / "a.json") == whole["settings"]


@pytest.mark.parametrize("kind", STORED)
def test_where_any_field_is_missing_or_of_another_kind_it_is_done_again(tmp_path: Path, kind: str) -> None:
    whole, read = STORED[kind]
    path = tmp_path / "a.json"
    for place in places(whole):
        if place[0] == "settings":
            continue
        for wrong in (MISSING, "x", [], {}, True, -1.5e300, 10**400, [None], {"": [[[]]]}):
            damaged = copy.deepcopy(whole)
            *outer, last = place
            if wrong is MISSING:
                del at(damaged, tuple(outer))[last]
            else:
                at(damaged, tuple(outer))[last] = wrong
            path.write_text(json.dumps(damaged))
            if not is_free(place, wrong):
                assert read(path) is None, (place, wrong)


def is_free(place: tuple[Any, ...], wrong: object) -> bool:
    """Whether a record may be so: how many layers, losses and timings there are is not told beforehand."""
    if wrong is MISSING:
        return place[-2:-1] in (("layers",), ("step_loss",), ("seconds_per_step",))
    return (place[-1] == "layers" and wrong == {}) or (place[-1] == "step_loss" and wrong in ([], [None]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: run.update(arm="none"),
        lambda run: run.update(seed=1),
        lambda run: run.update(epochs=run["epochs"][:1]),
        lambda run: run.update(epochs=[]),
        lambda run: run["epochs"].reverse(),
        lambda run: run["gradient_norm"]["layers"]["last"].pop(),
        lambda run: run["input_drift"]["layers"]["last"]["std"].append(1.0),
        lambda run: run.update(steps_per_epoch=0),
        lambda run: run.update(status="?"),
        lambda run: run.update(more={}),
    ],
)
def test_a_record_of_the_right_form_that_cannot_be_right_is_done_again(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None]
) -> None:
    run = copy.deepcopy(STORED["run"][0])
    damage(run)
    write_json(tmp_path / "a.json", run)
    assert found(tmp_path / "a.json") is None


def test_a_run_that_diverged_has_fewer_epochs(tmp_path: Path) -> None:
    run = STORED["run"][0] | {"status": "diverged", "epochs": [], "test_time_statistics": None}
    write_json(tmp_path / "a.json", run)
    assert found(tmp_path / "a.json") == without_settings(run)


@pytest.mark.parametrize(
    "content",
    [
        b"", b'{"settings": {"epo', b"[]", b"3", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 5000, b"NaN",
        b'{"settings": 3}', b'{"settings": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_record_is_not_there(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert found(path) is found_timing(path) is settings_at(path) is None


def test_a_file_beyond_any_run_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 2**40)
    assert found(path) is None


def test_a_pipe_is_no_record(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(FileError, match="no regular file"):
        found(tmp_path / "a.json")


def test_a_record_of_other_settings_is_an_error_in_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    other = {**SETTINGS, "epochs": 10, "x\n\x1b[31m": "y" * 10_000, **{f"k{i}": [i] for i in range(1000)}}
    write_json(path, {"settings": other})
    with pytest.raises(DataError, match=r"epochs 10 \(now 2\).*--out") as caught:
        found(path)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
