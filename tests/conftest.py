"""Every test seeds itself, and memory that no code has filled is NaN."""

from __future__ import annotations

import gc
import itertools
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import (
    commands,
    interpreted,  # noqa: F401  # before anything else imports Triton
)

# The same examples in every run, others for `make fuzz`; no limit in seconds: a busy machine is not a bug.
_NO_LIMIT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", _NO_LIMIT, derandomize=True)
settings.register_profile("fuzz", _NO_LIMIT, derandomize=False, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure() -> None:
    """Heed Ctrl-C, and share the cores.

    What a shell runs in the background has SIGINT ignored, and so have the programs that tests start and
    stop.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _share_cores()


def _share_cores() -> None:
    """Give each of several workers, and the processes that it starts, its share of the cores.

    Threads that wait for a core that another worker's thread has are the worst use of both: fifty small
    tests of a network took 3 s with one thread each, and 60 s with two, on a busy machine with two cores.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark as slow what `one_in` leaves out, before `-m` selects; put what is selected in order."""
    _mark_slow(items)
    yield
    _put_in_order(config, items)


def _mark_slow(items: list[pytest.Item]) -> None:
    """Of a test with the mark `one_in(n)`, mark all cases but each n-th as slow.

    Let n have no divisor in common with the lengths of the test's lists of parameters: the cases that stay
    then have every value of every list.
    """
    cases: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            if next(cases[test]) % mark.args[0]:
                item.add_marker("slow")


def _put_in_order(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let tests of one `xdist_group` run in one worker, and begin early, as they take longest.

    Before them come the quick tests of the reference, so that progress shows at once.
    pytest-xdist knows them by the end of their names. It sets `_nodeid` (3.8), where pytest from 9.2 on reads
    `_id`.
    """
    items.sort(
        key=lambda item: (
            not item.nodeid.startswith("tests/reference/"),
            item.get_closest_marker("xdist_group") is None,
        )
    )
    for item in items if getattr(config.option, "loadgroup", False) else ():
        group = item.get_closest_marker("xdist_group")
        if group is not None and hasattr(item, "_id"):
            item._id = type(item._id).parse(f"{item.nodeid}@{group.args[0]}")


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what is there before any test: tests of memory call it often."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name a test that fails at once; what it printed stands at the end of the run."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid}", file=sys.__stderr__, flush=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill `torch.empty` with NaN: a position that no kernel writes is then seen in every comparison.

    torch offers this as part of its deterministic mode (`fill_uninitialized_memory`, on by default).
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a user's file, with functions that make models and data."""
    path = tmp_path / "own.py"
    path.write_text(commands.OWN)
    return path
