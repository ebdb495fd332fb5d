"""Several processes of torch.distributed, each of which calls `main` of a module of the tests.

A fork server has imported torch and these modules once: a process of its own takes seconds to do that.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "tests.models.calibrate_rank",
        "tests.models.monitor_rank",
        "tests.models.sharded_rank",
        "tests.torch.collectives_rank",
        "tests.torch.contexts_rank",
        "tests.torch.ddp_rank",
        "tests.torch.synced_lost_rank",
        "tests.torch.synced_rank",
    ]
)
_SECONDS = 600.0  # after which a rank hangs


def found_by_ranks(
    module: ModuleType, number: int, folder: Path, *arguments: object, lost: Container[int] = ()
) -> list[Any]:
    """Call `module.main(rank, *arguments, folder)` in a process for each rank; return what each saved.

    That is in foundRANK.pt.

    Args:
        module: whose `main` is one rank.
        number: of ranks.
        folder: where they meet and save.
        arguments: for all of them.
        lost: ranks that must not end well: killed, or failed. In place of what they found stands what they
            wrote to stderr.
    """
    ranks = [
        _SERVER.Process(target=_run, args=(module.__name__, rank, arguments, folder), daemon=True)
        for rank in range(number)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(_SECONDS)
    finally:
        for rank in ranks:
            rank.kill()  # those that still wait for one that failed; the others have ended
            rank.join()
    ended_well = [rank.exitcode == 0 for rank in ranks]
    errors = [_stderr(folder, rank).read_text() for rank in range(number)]
    assert ended_well == [rank not in lost for rank in range(number)], errors
    return [
        torch.load(folder / f"found{rank}.pt", weights_only=True) if ended_well[rank] else errors[rank]
        for rank in range(number)
    ]


def _run(module: str, rank: int, arguments: tuple[object, ...], folder: Path) -> None:
    """Be one rank: what it writes to stderr goes to a file."""
    os.dup2(os.open(_stderr(folder, rank), os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    __import__(module)
    sys.modules[module].main(rank, *arguments, folder)


def _stderr(folder: Path, rank: int) -> Path:
    return folder / f"stderr{rank}"
