"""Several processes of torch.distributed, each of which runs a module of the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def found_by_ranks(
    module: ModuleType, number: int, folder: Path, *arguments: object, lost: Container[int] = ()
) -> list[Any]:
    """Run `python -m module RANK *arguments FOLDER` in each process; return what each saved, foundRANK.pt.

    Args:
        module: whose `python -m` is one rank.
        number: of ranks.
        folder: where they meet and save.
        arguments: for all of them.
        lost: ranks that must not end well: killed, or failed. In place of what they found stands what they
            wrote to stderr.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module.__name__, str(rank), *map(str, arguments), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # those that still wait for one that failed; the others have ended
            rank.communicate()
    ended_well = [rank.returncode == 0 for rank in ranks]
    assert ended_well == [rank not in lost for rank in range(number)], errors
    return [
        torch.load(folder / f"found{rank}.pt", weights_only=True) if ended_well[rank] else errors[rank]
        for rank in range(number)
    ]
