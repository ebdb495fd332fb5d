"""The running statistics that an engine moves within its forward: masks, groups, batches that are skipped."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.kernels import choose
from batchnorm.kernels.cpu import engine as cpu
from batchnorm.kernels.interface import RunningState
from tests.support.cases import CASES, Case
from tests.support.compare import as_array, assert_close
from tests.support.interpreted import GPU, device, every_engine_and_case, trimmed
from tests.support.primitives import Primitives

engine = Primitives(cpu)

MOMENTUM = 0.3
# What comes behind the moments is nothing to running statistics: cases that differ in more than that.
FULL = {
    (c.shape, c.layout, c.dtype, c.offset, c.masked, c.all_masked, c.group_size): c
    for c in reversed(CASES)
    if math.prod(c.shape)
}
every_engine = pytest.mark.parametrize("name", ["cpu", *GPU])
in_turn_or_together = pytest.mark.parametrize("sequential", [False, True], ids=["together", "in turn"])


class Buffers(NamedTuple):
    """Running statistics as a layer has them."""

    mean: Tensor
    var: Tensor
    batches: Tensor
    skipped: Tensor

    def clone(self) -> Buffers:
        return Buffers(*(tensor.clone() for tensor in self))

    def moving(self, *, sequential: bool = False, skips: bool = True) -> RunningState:
        return RunningState(
            self.mean, self.var, self.batches, MOMENTUM, self.skipped if skips else None, sequential
        )


def buffers(channels: int, dtype: torch.dtype = torch.float32) -> Buffers:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(channels, dtype=real), torch.rand(channels, dtype=real) + 0.5
    return Buffers(mean, var, torch.tensor(5), torch.tensor(2))


def forward(name: str, case: Case, x: Tensor, mask: Tensor | None, running: RunningState) -> None:
    there = [t.to(device(name)) if isinstance(t, Tensor) else t for t in (x, mask, *running)]
    x, mask, placed = there[0], there[1], RunningState(*there[2:])
    assert choose.load(name).moves(x, placed)
    Primitives(choose.load(name)).forward(x, 1e-5, mask=mask, group_size=case.group_size, running=placed)
    for ours, theirs in zip(running, placed, strict=True):
        if isinstance(ours, Tensor) and ours is not theirs:
            ours.copy_(theirs)


def groups_of(case: Case, x: Tensor, mask: Tensor | None) -> reference.Moments:
    return reference.moments(as_array(x), None if mask is None else mask.numpy(), case.group_size)


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("chunks")
@in_turn_or_together
@every_engine_and_case(("cpu", *GPU), tuple(FULL.values()))
def test_they_move_as_the_reference_says(name: str, case: Case, sequential: bool) -> None:
    case = trimmed(name, case)
    inputs = case.make()
    ours = buffers(case.shape[1], case.dtype)
    before, versions = ours.clone(), [tensor._version for tensor in ours]
    forward(name, case, inputs.x, inputs.mask, ours.moving(sequential=sequential))

    groups = groups_of(case, inputs.x, inputs.mask)
    update = reference.update_running_sequential if sequential else reference.update_running_pooled
    start = reference.Running(as_array(before.mean), as_array(before.var))
    moved = update(start, groups, momentum=MOMENTUM)
    assert_close(ours.mean, moved.mean, dtype=ours.mean.dtype, what="running_mean")
    assert_close(ours.var, moved.var, dtype=ours.var.dtype, what="running_var")
    assert ours.batches == 5 + (len(groups.count) if sequential else 1)
    assert ours.skipped == 2
    assert [tensor._version for tensor in ours] == [version + 1 for version in versions]
    if moved is start:
        torch.testing.assert_close((ours.mean, ours.var), (before.mean, before.var), rtol=0, atol=0)


ODD = [
    Case("rows", (13, 5)),
    Case("planes", (3, 5, 20, 17)),
    Case("short", (8, 5, 6, 6)),
    Case("channels-last", (3, 5, 20, 17), "channels_last"),
    Case("wide", (9, 300, 5)),
    Case("double", (13, 5), dtype=torch.float64),
    Case("bfloat16", (13, 5, 4), dtype=torch.bfloat16),
    Case("groups", (9, 5, 6, 6), group_size=4),
    Case("groups-wide", (9, 300), group_size=2),
    Case("groups-masked", (9, 5, 7), group_size=4, masked=True),
    Case("masked", (9, 300, 5), masked=True),
]


@pytest.mark.one_in(5)
@in_turn_or_together
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", ODD, ids=str)
@every_engine
def test_a_batch_that_is_not_finite_is_skipped_as_a_whole(
    name: str, case: Case, bad: float, sequential: bool
) -> None:
    """In the last channel and the first group, and counted; unless skipped batches are not counted."""
    x, mask = case.make().x, case.make().mask
    first = [0, *[0] * (x.dim() - 2)] if mask is None else mask.nonzero()[0].tolist()
    x[first[0], -1][tuple(first[1:])] = bad
    ours = buffers(x.shape[1], case.dtype)
    before = ours.clone()
    forward(name, case, x, mask, ours.moving(sequential=sequential))
    torch.testing.assert_close(ours, before._replace(skipped=before.skipped + 1), rtol=0, atol=0)

    forward(name, case, x, mask, ours.moving(sequential=sequential, skips=False))
    assert not ours.mean[-1].isfinite()
    assert ours.var[-1].isnan()
    assert ours.mean[:-1].isfinite().all()
    assert not (ours.mean[:-1] == before.mean[:-1]).any()
    assert ours.batches > before.batches


@every_engine
def test_they_move_along_the_way_as_in_a_launch_of_their_own(name: str) -> None:
    """`nonfinite="skip"` changes no bit of a batch that is not skipped."""
    for case in ODD:
        inputs = trimmed(name, case).make()
        moved = [buffers(inputs.x.shape[1], case.dtype)]
        moved.append(moved[0].clone())
        for ours, skips in zip(moved, (True, False), strict=True):
            forward(name, trimmed(name, case), inputs.x, inputs.mask, ours.moving(skips=skips))
        assert all(map(torch.equal, *moved)), case


@every_engine
def test_what_is_masked_spoils_nothing(name: str) -> None:
    case = Case("masked", (9, 5, 7), masked=True, group_size=4)
    inputs = case.make()
    assert inputs.x.isnan().any()
    ours = buffers(5)
    forward(name, case, inputs.x, inputs.mask, ours.moving())
    assert ours.skipped == 2
    assert ours.batches == 6
    assert ours.mean.isfinite().all()


@every_engine
def test_values_whose_squares_overflow_are_skipped_too(name: str) -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    x[:, 1] *= 1e300
    ours = buffers(3, torch.float64)
    before = ours.clone()
    forward(name, Case("huge", (6, 3)), x, None, ours.moving())
    torch.testing.assert_close(ours, before._replace(skipped=before.skipped + 1), rtol=0, atol=0)


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("skips", [True, False], ids=["skips", "does not"])
@in_turn_or_together
@every_engine
def test_less_than_two_values_move_nothing_and_count(
    name: str, valid: int, group_size: int | None, sequential: bool, skips: bool
) -> None:
    x, mask = torch.randn(6, 3, 2), torch.zeros(6, 2, dtype=torch.bool)
    mask[3, 1] = bool(valid)
    ours = buffers(3)
    before = ours.clone()
    case = Case("few", (6, 3, 2), group_size=group_size)
    forward(name, case, x, mask, ours.moving(sequential=sequential, skips=skips))
    grown = before.batches + (3 if sequential and group_size else 1)
    torch.testing.assert_close(ours, before._replace(batches=grown), rtol=0, atol=0)


@every_engine
def test_one_of_them_alone(name: str) -> None:
    """A layer may track one of them only, or count and track nothing."""
    case = Case("alone", (9, 5, 6, 6), group_size=4)
    x = case.make().x
    whole, mean_only, var_only, count_only = (buffers(5).clone() for _ in range(4))
    for other in (mean_only, var_only):
        other.mean.copy_(whole.mean)
        other.var.copy_(whole.var)
    before = whole.clone()
    forward(name, case, x, None, whole.moving())
    forward(name, case, x, None, mean_only.moving()._replace(var=None, batches=None))
    forward(name, case, x, None, var_only.moving()._replace(mean=None))
    forward(name, case, x, None, count_only.moving()._replace(mean=None, var=None))
    assert torch.equal(mean_only.mean, whole.mean)
    assert torch.equal(mean_only.var, before.var)
    assert torch.equal(var_only.var, whole.var)
    assert torch.equal(var_only.mean, before.mean)
    assert (mean_only.batches, var_only.batches, count_only.batches) == (5, 6, 6)


@in_turn_or_together
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(640, 600), (64, 520, 7, 7), (24, 40, 40, 36)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], masked: bool, sequential: bool) -> None:
    """Of the running statistics of groups, nor of dweight and dbias, which are sums over groups."""
    case = Case("threads", shape, group_size=8, masked=masked)
    inputs = case.make()
    x, weight, bias, _, dy, mask = inputs
    options = {"mask": mask, "group_size": case.group_size}
    start = buffers(shape[1])
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            ours = start.clone()
            running = ours.moving(sequential=sequential)
            _, found, rstd = engine.forward(x, 1e-5, weight, bias, running=running, **options)
            _, dweight, dbias, _ = engine.backward(x, dy, found.mean, rstd, False, weight, bias, **options)
            results.append((*ours, dweight, dbias))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("sequential", [False, True])
@every_engine
def test_a_thousand_groups_in_turn_round_once(name: str, sequential: bool) -> None:
    """They move in float64, and are rounded at the end."""
    case = Case(
        "many", (4000 if name == "cpu" or device(name) != "cpu" else 400, 3), group_size=4, offset=1e3
    )
    x = case.make().x
    ours = buffers(3)
    start = reference.Running(as_array(ours.mean).copy(), as_array(ours.var).copy())
    running = RunningState(ours.mean, ours.var, None, 0.01, None, sequential)
    forward(name, case, x, None, running)
    update = reference.update_running_sequential if sequential else reference.update_running_pooled
    moved = update(start, groups_of(case, x, None), momentum=0.01)
    np.testing.assert_allclose(as_array(ours.mean), moved.mean, rtol=1e-7)


@pytest.mark.parametrize(
    "other",
    [
        {"skipped": torch.zeros((), dtype=torch.int32)},
        {"skipped": torch.zeros((), dtype=torch.int64, device="meta")},
        {"batches": torch.zeros((), dtype=torch.int32)},
        {"var": torch.ones(6)[::2]},
    ],
    ids=["dtype of skipped", "device of skipped", "dtype of batches", "stride of var"],
)
def test_what_cannot_be_written_by_its_address_is_left_to_the_framework(other: dict[str, Tensor]) -> None:
    x, running = torch.randn(4, 3), buffers(3).moving()
    assert cpu.moves(x, running)
    assert not cpu.moves(x, running._replace(**other))
    assert not choose.load("eager").moves(x, running)


@every_engine
def test_groups_of_one_value_are_a_batch_together(name: str) -> None:
    case = Case("ones", (7, 5), group_size=1)
    x, ours = case.make().x, buffers(5)
    start = reference.Running(as_array(ours.mean).copy(), as_array(ours.var).copy())
    forward(name, case, x, None, ours.moving())
    moved = reference.update_running_pooled(start, groups_of(case, x, None), momentum=MOMENTUM)
    assert_close(ours.mean, moved.mean, dtype=torch.float32, what="running_mean")
    assert_close(ours.var, moved.var, dtype=torch.float32, what="running_var")
