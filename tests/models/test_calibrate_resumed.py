"""`calibrate(progress_file=...)`: interrupted anywhere and called again, it finds the same, bit for bit."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import DataError, FileError
from tests.models.calibration_nets import Branches, images
from tests.models.nets import anatomy

METHODS = ("batch", "layerwise")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the progress file goes."""
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
    """The first norms have heard it, the last one has not."""
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


@pytest.mark.parametrize("change", ["order", "size", "values", "fewer"])
def test_other_data_is_refused(path: Path, change: str) -> None:
    model, x = Branches(), images(39)
    _interrupt(model, path, 3, x)
    batches = list(x.split(8))
    if change == "order":
        batches = batches[::-1]
    elif change == "size":
        batches = list(x.split(7))
    elif change == "values":
        batches[2] = batches[2] + 1e-6
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


def test_a_full_disk_is_a_clear_error(path: Path) -> None:
    """A real device without space stands for the disk."""
    model, x = Branches(), images(39)
    path.with_name(f"{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    before = anatomy(model)
    with pytest.raises(
        FileError, match=rf"cannot be written .{os.strerror(errno.ENOSPC)}.: free some space"
    ) as found:
        batchnorm.calibrate(model, x.split(8), progress_file=path, save_every=0.0)
    assert isinstance(found.value, OSError)
    assert anatomy(model) == before
    assert not list(path.parent.glob("*.tmp"))


def test_a_folder_that_is_not_there_is_a_clear_error(path: Path) -> None:
    with pytest.raises(FileError, match=rf"cannot be written .{os.strerror(errno.ENOENT)}"):
        batchnorm.calibrate(
            Branches(), images(16).split(8), progress_file=path / "there" / "file", save_every=0.0
        )


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
