"""Several processes of torch.distributed, each of which runs a module of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def found_by_ranks(module: ModuleType, number: int, folder: Path, *arguments: object) -> list[Any]:
    """Run `python -m module RANK *arguments FOLDER` in each process; return what each saved, foundRANK.pt."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module.__name__, str(rank), *map(str, arguments), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * number, errors
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(number)]
