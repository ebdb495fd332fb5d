"""Time of the first forward and backward of a process, ours and stock's, once torch is imported.

Each is measured in a process of its own: `python -m benchmarks.first_call RIVAL` prints its seconds as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

from .fresh_process import json_of
from .tables import Rows, table_of

RIVALS = ("stock", "ours")
SHAPE = (32, 64, 28, 28)
PROCESSES, QUICK_PROCESSES = 7, 1


def measure(quick: bool = False) -> Rows:
    """Return one row: medians in seconds over fresh processes, in turn; kernels are on disk by then."""
    _fresh_process("ours")  # compiles the kernels where they are not on disk
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in RIVALS}
    for _ in range(QUICK_PROCESSES if quick else PROCESSES):
        for name in RIVALS:
            taken[name].append(_fresh_process(name))
    seconds = {
        name: {part: statistics.median(one[part] for one in found) for part in ("import", "call", "total")}
        | {"most": max(one["total"] for one in found)}
        for name, found in taken.items()
    }
    return [{"shape": list(SHAPE), "processes": len(taken["ours"]), "seconds": seconds}]


def _fresh_process(name: str) -> dict[str, float]:
    found: dict[str, float] = json_of("benchmarks.first_call", name)
    return found


def _first_call(name: str) -> dict[str, float]:
    import torch

    x = torch.randn(SHAPE, requires_grad=True)
    dy = torch.randn(SHAPE)
    start = time.perf_counter()
    if name == "ours":
        from batchnorm import BatchNorm2d
    else:
        from torch.nn import BatchNorm2d  # type: ignore[assignment]
    imported = time.perf_counter()
    BatchNorm2d(SHAPE[1])(x).backward(dy)
    end = time.perf_counter()
    return {"import": imported - start, "call": end - imported, "total": end - start}


def first_call_table(rows: Rows) -> str:
    """Milliseconds of the import of the layer and of its first call."""
    parts = {"import": "import", "call": "forward and backward", "total": "both", "most": "slowest process"}
    return table_of(
        {"shape": str(tuple(row["shape"])), "": name}
        | {f"{shown}, ms": f"{row['seconds'][name][part] * 1e3:.1f}" for part, shown in parts.items()}
        for row in rows
        for name in RIVALS
    )


def goals_table(rows: Rows) -> str:
    """The goal of the first call, and what was found."""
    from . import goals  # which imports torch and batchnorm: too early where their import is measured

    return goals.findings_table(goals.first_call_findings(rows))


if __name__ == "__main__":
    print(json.dumps(_first_call(sys.argv[1])))
