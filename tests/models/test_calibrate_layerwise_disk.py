"""`calibrate(method="layerwise", spill=...)`: the same in one forward in total, or refused."""

from __future__ import annotations

import copy
import errno
import itertools
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.errors import DataError, FileError, OptionError
from tests.models.calibration_nets import NETWORKS, WAYS, Again, Branches, Hidden, Swapped, images
from tests.models.nets import anatomy, refuses, scrambled

ENOUGH = 10**9  # bytes
# Ways out of torch, which are refused; and one that is only seen where it changes what a norm receives.
CLOSED_WAYS = {"numpy": "numpy", "tolist": "tolist", "a module with a kernel": "data_ptr"}
OPEN_WAYS = [way for way in WAYS if way not in (*CLOSED_WAYS, "a module in C++")]


def _spilled(model: nn.Module, data: Any, spill: Any = ENOUGH, **options: Any) -> Any:
    return batchnorm.calibrate(model, data, method="layerwise", spill=spill, **options)


def _assert_as_in_passes(model: nn.Module, x: Tensor, size: int) -> None:
    twin = copy.deepcopy(model)
    report = _spilled(model, iter(x.clone().split(size)))
    expected = batchnorm.calibrate(twin, x.clone().split(size), method="layerwise")
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-12, atol=1e-12)
    assert report.passes == 1
    assert (report.samples, report.batches) == (expected.samples, expected.batches)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("size", [40, 9, 1])
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "twice"])
def test_it_finds_what_passes_find(network: str, size: int) -> None:
    _assert_as_in_passes(scrambled(NETWORKS[network]()), images(40).double(), size)


@pytest.mark.parametrize("way", OPEN_WAYS)
def test_whatever_a_forward_does_goes_on_where_it_stopped(way: str) -> None:
    _assert_as_in_passes(Hidden(WAYS[way]).double(), images(24).double(), 6)


class InPlace(nn.Module):
    """Writes into its input, into views, into a buffer, and reads a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.register_buffer("seen", torch.zeros(1))
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        kept, seen = x[:, :2], self.seen.view(1, 1)
        y = self.first(x * self.scale[::2])
        kept += y[:, 1:]
        seen += 1
        self.last = y
        return self.second((x + self.scale[1::2]).relu_() + self.seen.sign())


def test_writes_in_place_happen_once() -> None:
    model, x = InPlace().double(), images(12).double()
    twin = copy.deepcopy(model)
    _spilled(model, x.clone().split(4))
    assert model.seen.item() == 3 + 1  # and once for the check in the end
    batchnorm.calibrate(twin, [x.clone()], method="layerwise", forward=lambda m, b: m(b.clone()))
    for name in ("first", "second"):
        found, expected = model.get_submodule(name), twin.get_submodule(name)
        torch.testing.assert_close(found.running_mean, expected.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.running_var, expected.running_var, rtol=1e-12, atol=1e-12)


class Counting(TorchDispatchMode):
    """Counts convolutions that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_every_operator_is_computed_once() -> None:
    model = NETWORKS["residual"]()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    with Counting() as counting:
        _spilled(model, images(40).split(10))
    assert counting.count == convolutions * (4 + 1)  # four batches, and the first again as a check


def test_stopped_forwards_hold_no_memory() -> None:
    model, alive = NETWORKS["residual"](), set()
    most = []

    def note(_module: nn.Module, args: Any, result: Any) -> None:
        alive.update(weakref.ref(t) for t in (*args, result) if isinstance(t, Tensor))
        most.append(sum(ref() is not None for ref in alive))

    for module in model.modules():
        module.register_forward_hook(note)
    _spilled(model, (images(4) for _ in range(8)))
    with_one = max(most[: len(most) // 8])
    assert max(most) <= max(with_one, 8)


def test_a_norm_that_no_value_reached_is_named() -> None:
    with pytest.raises(DataError, match=r"^BatchNorm1d: received no value that counts"):
        _spilled(nn.BatchNorm1d(3), [torch.zeros(0, 3)])


def test_files_go_into_the_folder_and_away_again(tmp_path: Path) -> None:
    model, seen = Branches(), []
    model.left.register_forward_hook(lambda *_: seen.append(len(list(tmp_path.rglob("*.bin")))))
    _spilled(model, images(12).split(4), spill=tmp_path)
    assert max(seen) == 3
    assert not list(tmp_path.iterdir())


def test_an_error_takes_the_files_away_too(tmp_path: Path) -> None:
    model, calls = Branches(), []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    model.stem.register_forward_hook(fail)
    before = anatomy(model)
    with pytest.raises(KeyboardInterrupt):
        _spilled(model, images(12).split(4), spill=tmp_path)
    assert anatomy(model) == before
    assert not list(tmp_path.iterdir())


def test_parts_of_one_tensor_take_their_own_room_only() -> None:
    assert _spilled(Branches(), images(40).split(1), 100_000).batches == 40  # the whole, each time: 300,000


def test_a_budget_that_is_too_small_is_refused() -> None:
    message = refuses(_spilled, Branches(), images(12).split(4), 5000)
    assert "spill=5000 bytes are too few: stopped forwards hold" in message


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    data = iter(images(12).split(4))
    with pytest.raises(FileError, match=rf"spill: .*there cannot be used .{os.strerror(errno.ENOENT)}"):
        _spilled(Branches(), data, spill=tmp_path / "there")
    assert len(list(data)) == 3  # before any work


class Random(nn.Module):
    """Never the same twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + torch.rand_like(x))


class Alternating(nn.Module):
    """Computes something else in every other forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.forwards = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.tanh() if next(self.forwards) % 2 else x.sin())


def test_a_forward_that_takes_another_way_the_second_time_is_refused() -> None:
    three = images(12).split(4)  # of an odd number of batches, each meets the other way
    found = refuses(_spilled, Alternating(), three)
    assert (
        "spill: a forward took another way the second time, aten.tanh.default for aten.sin.default" in found
    )
    assert "leave spill out" in found


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NETWORKS["twice"](), "shared is called several times in a forward"),
        (Swapped(), "batches call their norms in different orders"),
        (Again(), "first is called several times in a forward"),
        *((Hidden(WAYS[way]), f"the forward leaves torch by {how}") for way, how in CLOSED_WAYS.items()),
        (Random(), "second receives other values from a forward in one go"),
    ],
)
def test_what_it_cannot_do_is_refused(model: nn.Module, message: str) -> None:
    x = images(20)
    x[:10, 0, 0, 0], x[10:, 0, 0, 0] = -1.0, 1.0
    found = refuses(_spilled, model, x.split(10))
    assert message in found
    assert "leave spill out" in found


def test_it_needs_data_and_the_layerwise_method() -> None:
    with pytest.raises(DataError, match="no batch"):
        _spilled(Branches(), [])
    with pytest.raises(OptionError, match="spill= is for method='layerwise'"):
        batchnorm.calibrate(Branches(), images(4).split(4), spill=ENOUGH)
    with pytest.raises(OptionError, match="without progress_file="):
        _spilled(Branches(), images(4).split(4), progress_file="file")


def test_samples_are_counted() -> None:
    assert _spilled(Branches(), images(12).split(4), samples=7).samples == 7
