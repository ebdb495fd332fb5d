"""`calibrate(progress_file=...)`: interrupted anywhere and called again, it finds the same, bit for bit."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import DataError, FileError, OptionError
from batchnorm.models.calibration.progress_file import _digest_of_file
from tests.models.calibration_nets import Branches, images
from tests.models.nets import anatomy

METHODS = ("batch", "layerwise")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the progress file."""
    return tmp_path / "progress.safetensors"


class Stopping:
    """Batches that raise at one of them, counted over all passes."""

    def __init__(self, batches: list[Tensor], at: int | None = None) -> None:
        self.batches, self.at, self.given = batches, at, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            if self.given == self.at:
                raise KeyboardInterrupt
            self.given += 1
            yield batch


def _interrupt(model: nn.Module, path: Path, at: int, x: Tensor, **options: Any) -> None:
    before = anatomy(model)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.calibrate(model, Stopping(list(x.split(8)), at), progress_file=path, **options)
    assert anatomy(model) == before
    assert path.exists()


def _count_forwards(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("save_every", [0.0, 60.0])
@pytest.mark.parametrize(("method", "at"), [("batch", 1), ("batch", 4), ("layerwise", 2), ("layerwise", 13)])
def test_it_goes_on_where_it_was_stopped(path: Path, method: str, at: int, save_every: float) -> None:
    model, x = Branches(), images(39)
    whole = copy.deepcopy(model)
    report = batchnorm.calibrate(whole, x.split(8), method=method)
    options = {"method": method, "save_every": save_every}
    _interrupt(model, path, at, x, **options)
    calls = _count_forwards(model)
    resumed = batchnorm.calibrate(model, x.split(8), progress_file=path, **options)
    assert len(calls) == report.passes * 5 - at
    assert resumed == report
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert not list(path.parent.iterdir())


def test_it_is_stopped_twice(path: Path) -> None:
    model, x = Branches(), images(39)
    whole = copy.deepcopy(model)
    batchnorm.calibrate(whole, x.split(8))
    _interrupt(model, path, 2, x)
    _interrupt(model, path, 4, x)
    calls = _count_forwards(model)
    batchnorm.calibrate(model, x.split(8), progress_file=path)
    assert len(calls) == 1
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_batch_that_was_stopped_midway_does_not_count(path: Path) -> None:
    """The first norms have received it, the last norm has not."""
    model, x = Branches(), images(24)
    whole = copy.deepcopy(model)
    batchnorm.calibrate(whole, x.split(8))
    handle = model.join.register_forward_pre_hook(_third_time(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        batchnorm.calibrate(model, x.split(8), progress_file=path)
    handle.remove()
    batchnorm.calibrate(model, x.split(8), progress_file=path)
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)


def _third_time(error: type[BaseException]) -> Any:
    calls = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    return hook


def _damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-9])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "a fact":
        assert b'"number":"0"' in content
        path.write_bytes(content.replace(b'"number":"0"', b'"number":"1"'))
    elif how == "text":
        path.write_text("not a file of tensors")
    elif how == "version":
        path.write_bytes(content.replace(b"calibration 2", b"calibration 1"))
    elif how in ("no facts", "a shape", "nan"):  # with a digest that fits
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        facts = json.loads(content[8 : 8 + length])["__metadata__"]
        del facts["digest"]
        if how == "no facts":
            del facts["batches"]
        elif how == "a shape":
            tensors["tally"] = tensors["tally"][:-1].clone()
        else:
            tensors["tally"][0] = float("nan")
        facts["digest"] = _digest_of_file(facts, tensors)
        path.write_bytes(safetensors.torch.save(tensors, facts))
    elif how == "foreign":
        path.write_bytes(safetensors.torch.save({"weight": torch.ones(3)}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is not a whole safetensors file"),
        ("empty", "is not a whole safetensors file"),
        ("text", "is not a whole safetensors file"),
        ("a bit", "is damaged: delete it to start over"),
        ("a fact", "is damaged: delete it to start over"),
        ("foreign", "is not a progress file of calibrate: name another path"),
        ("version", "is of another version: delete it to start over"),
        ("no facts", "is damaged: delete it to start over"),
        ("a shape", "is damaged: delete it to start over"),
        ("nan", "is damaged: delete it to start over"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_and_left(path: Path, how: str, message: str) -> None:
    model, x = Branches(), images(39)
    _interrupt(model, path, 3, x)
    _damaged(path, how)
    before, content = anatomy(model), path.read_bytes()
    with pytest.raises(DataError, match=message):
        batchnorm.calibrate(model, x.split(8), progress_file=path)
    assert anatomy(model) == before
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", ["a weight", "a name", "method", "samples"])
def test_a_file_of_another_calibration_is_refused(path: Path, change: str) -> None:
    model, x, options = Branches(), images(39), {}
    _interrupt(model, path, 3, x)
    if change == "a weight":
        model.stem.bias.data[2] += 1e-6
    elif change == "a name":
        model.wrong, model.left = model.left, nn.Identity()
    else:
        options = {"method": {"method": "layerwise"}, "samples": {"samples": 20}}[change]
    with pytest.raises(DataError, match="of another model, or of other options"):
        batchnorm.calibrate(model, x.split(8), progress_file=path, **options)


@pytest.mark.parametrize("save_every", [0.0, 60.0])
@pytest.mark.parametrize("change", ["order", "two in order", "size", "first", "second", "values", "fewer"])
def test_other_data_is_refused(path: Path, change: str, save_every: float) -> None:
    model, x = Branches(), images(39)
    _interrupt(model, path, 3, x, save_every=save_every)
    batches = list(x.split(8))
    if change == "order":
        batches = batches[::-1]
    elif change == "size":
        batches = list(x.split(7))
    elif change == "two in order":
        batches[:2] = batches[1::-1]
    elif change in ("first", "second", "values"):
        at = ["first", "second", "values"].index(change)
        batches[at] = batches[at].clone()
        batches[at][5, 1, 2, 3] += 1e-6
    else:
        batches = batches[:2]
    before = anatomy(model)
    with pytest.raises(DataError, match="data is not what it was: the progress file has 24 samples in 3"):
        batchnorm.calibrate(model, batches, progress_file=path)
    assert anatomy(model) == before


def test_running_statistics_may_have_moved_meanwhile(path: Path) -> None:
    model, x = Branches(), images(39)
    _interrupt(model, path, 3, x)
    model.join.running_mean += 1
    model.join.num_batches_tracked += 1
    assert batchnorm.calibrate(model, x.split(8), progress_file=path).samples == 39


def test_every_part_of_a_batch_is_known_again(path: Path) -> None:
    """What only `forward` knows to take, too."""

    def batches(change: str = "") -> list[dict[str, Any]]:
        torch.manual_seed(3)
        whole = torch.randn(24, *images(1).shape[1:])
        return [
            {
                "x": x,
                "scale": np.float32([2.0, 3.0 if change == "array" and at == 0 else 2.5]),
                "shift": (torch.full((1,), 4.0 if change == "tensor" and at == 0 else 0.5),),
                "power": 2 if change == "number" and at == 0 else 1,
            }
            for at, x in enumerate(whole.split(8))
        ]

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        model(batch["x"] * float(batch["scale"][1]) ** batch["power"] + batch["shift"][0])

    model = Branches()
    with pytest.raises(KeyboardInterrupt):
        batchnorm.calibrate(model, Stopping(batches(), 2), forward=forward, progress_file=path)
    for change in ("array", "tensor", "number"):
        with pytest.raises(DataError, match="data is not what it was"):
            batchnorm.calibrate(model, batches(change), forward=forward, progress_file=path)
    batchnorm.calibrate(model, batches(), forward=forward, progress_file=path)


@pytest.mark.parametrize("method", METHODS)
def test_a_result_that_is_kept_is_taken_from_the_file(path: Path, method: str) -> None:
    model, x = Branches(), images(39)
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    expected = batchnorm.calibrate(whole, x.split(8), method=method)
    options = {"method": method, "progress_file": path}
    assert batchnorm.calibrate(model, x.split(8), keep_progress=True, **options) == expected
    content = path.read_bytes()
    calls = _count_forwards(again)
    for batches in (images(47).split(8), images(31).split(8), [*x.split(8)[:4], x[32:] + 1e-6], []):
        with pytest.raises(DataError, match="data is not what it was: the progress file has 39 samples in 5"):
            batchnorm.calibrate(again, batches, keep_progress=True, **options)
    assert batchnorm.calibrate(again, x.split(8), keep_progress=True, **options) == expected
    assert path.read_bytes() == content
    for calibrated in (model, again):
        torch.testing.assert_close(calibrated.state_dict(), whole.state_dict(), rtol=0, atol=0)
    batchnorm.calibrate(again, x.split(8), **options)
    assert not calls
    assert not path.exists()


def test_a_result_that_cannot_be_kept_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Branches(), images(16)
    before = anatomy(model)
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(FileError, match="No space left on device; free some space"):
        batchnorm.calibrate(model, x.split(8), progress_file=path, keep_progress=True)
    assert anatomy(model) == before


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_a_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Branches(), images(39)
    before = anatomy(model)
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(FileError, match=r"cannot be written: No space left .*; free some space") as found:
        batchnorm.calibrate(model, x.split(8), progress_file=path, save_every=0.0)
    assert isinstance(found.value, OSError)
    assert anatomy(model) == before
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("kind", ["no folder", "a folder", "a pipe", "a device", "a name too long"])
def test_a_place_that_cannot_be_is_refused_before_any_work(path: Path, kind: str) -> None:
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    places = {
        "no folder": path / "there",
        "a device": Path("/dev/full"),
        "a name too long": path.with_name("x" * 300),
    }
    data = Stopping([images(8)], 0)
    with pytest.raises(FileError, match=r"^the progress file .* cannot be written: .*; free some space"):
        batchnorm.calibrate(Branches(), data, progress_file=places.get(kind, path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress_file": 3}, "progress_file is a path; got a int"),
        ({"save_every": "often"}, "save_every is a number of seconds, 0 or more; got 'often'"),
        ({"save_every": float("nan")}, "save_every is a number"),
        ({"keep_progress": True}, "keep_progress=True is for progress_file="),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        batchnorm.calibrate(Branches(), Stopping([images(8)], 0), **options)


def test_a_refused_result_leaves_no_file_that_would_only_repeat_it(path: Path) -> None:
    x = images(16)
    x[0, 0] = float("nan")
    with pytest.raises(DataError, match="received NaN or inf"):
        batchnorm.calibrate(Branches(), x.split(8), progress_file=path, save_every=0.0)
    assert not path.exists()


def test_an_input_that_the_model_writes_into_is_known_again(path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ReLU(inplace=True), Branches())

    x = images(39)
    before = model()
    with pytest.raises(KeyboardInterrupt):
        batchnorm.calibrate(before, Stopping(list(x.clone().split(8)), 3), progress_file=path)
    assert batchnorm.calibrate(model(), x.split(8), progress_file=path).samples == 39
