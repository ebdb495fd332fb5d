"""The engine for CPUs, where one task has several groups and channels: in a call of small groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchnorm.kernels.cpu import partition
from batchnorm.kernels.cpu import prepared_launch as prepared
from tests.kernels import test_engines
from tests.support.cases import CASES, Case

every_grouped_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.group_size and case.shape[0]], ids=str
)


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plan one task where there would be many: what is planned for many small groups, of a small tensor."""
    monkeypatch.setattr(partition, "_TASKS", 1)
    partition.partition.cache_clear()
    prepared.prepare.cache_clear()
    yield
    partition.partition.cache_clear()
    prepared.prepare.cache_clear()


@every_grouped_case
def test_split_primitives(case: Case) -> None:
    test_engines.test_split_primitives("cpu", case)


@every_grouped_case
def test_fused_pairs(case: Case) -> None:
    test_engines.test_fused_pairs("cpu", case)


def test_a_task_has_several() -> None:
    """These cases have several groups in a task; with one they would repeat other tests."""
    dense, planes = ((11, 4), (4, 1)), ((7, 3, 5, 20), (300, 100, 20, 1))
    assert partition.partition(*dense, False, 4).span == 3
    assert partition.partition(*planes, False, 3).block > 1
