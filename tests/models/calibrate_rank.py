"""One of several processes of torch.distributed.

It calibrates in every scenario, and saves what came of each: statistics, or the error and whether the model
is as it was.
"""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import batchnorm
from tests.models.calibration_nets import Branches, images
from tests.models.nets import anatomy

# Number of processes -> the sizes of each one's batches: uneven, of different number, and a rank without any.
SHARDS = {
    1: [[203]],
    2: [[64, 64, 22], [53]],
    3: [[40, 7, 40, 33], [], [64, 19]],
}
METHODS = ("batch", "layerwise")


def whole() -> tuple[nn.Module, Tensor]:
    """Return the model and all of the data, the same in every process."""
    torch.manual_seed(0)
    return Branches(), images(203)


def shard(rank: int, ranks: int, x: Tensor) -> list[Tensor]:
    """Return the batches of one rank."""
    sizes = SHARDS[ranks]
    start = sum(map(sum, sizes[:rank]))
    return list(x[start : start + sum(sizes[rank])].split(sizes[rank])) if sizes[rank] else []


class Failing:
    """Batches of which the second one raises."""

    def __init__(self, batches: list[Tensor], error: BaseException) -> None:
        self.batches, self.error = batches, error

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches[:1]
        raise self.error


def running(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def attempt(model: nn.Module, call: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """Return what came of a call, and whether it changed the model."""
    before = anatomy(model)
    try:
        report = call(model)
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}", "is_unchanged": anatomy(model) == before}
    return {"running": running(model), "report": str(report), "samples": report.samples}


def merges(rank: int, mine: list[Tensor], pair: Any) -> dict[str, Any]:
    """Return what `merge_statistics` gives of a norm that was calibrated on the data of each rank."""
    norm = nn.BatchNorm2d(3)
    count = batchnorm.calibrate(norm, mine, group=False).layers[0].values if mine else 0
    wrong = nn.BatchNorm2d(3 + rank).state_dict()
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {
        "all": lambda: batchnorm.merge_statistics([norm.state_dict()], [count], group=None),
        "alone": lambda: batchnorm.merge_statistics([norm.state_dict()], [max(count, 2)]),
        "pair": lambda: batchnorm.merge_statistics([norm.state_dict()], [count], group=pair),
        "error": lambda: batchnorm.merge_statistics(*([wrong], [5]) if rank else ([], []), group=None),
        "layers": lambda: batchnorm.merge_statistics([wrong], [5], group=None),
    }
    for name, call in calls.items():
        try:
            found[name] = call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found | {"state": norm.state_dict()}


def scenarios(rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Return what came of each."""
    model, x = whole()
    mine = shard(rank, ranks, x)
    spoiled = [part.clone() for part in mine]
    for part in spoiled[:1] if rank == 0 else []:
        part[0, 0] = float("nan")
    wider = nn.Sequential(nn.Conv2d(3, 5 + rank, 1), nn.BatchNorm2d(5 + rank))
    pair = distributed.new_group([0, ranks - 1])
    found: dict[str, Any] = {"merge": merges(rank, mine, pair)}
    for method in METHODS:

        def calibrate(model: nn.Module, data: Any, method: str = method, **options: Any) -> Any:
            return batchnorm.calibrate(model, data, method=method, **options)

        def fails(error: BaseException, mine: list[Tensor] = mine) -> Any:
            return Failing(mine, error) if rank == 0 else mine

        calls: dict[str, Callable[[nn.Module], Any]] = {
            "all": lambda m: calibrate(m, mine),
            "parallel": lambda m: calibrate(nn.parallel.DistributedDataParallel(m), mine),
            "alone": lambda m: calibrate(m, x.split(64), group=False),
            "error": lambda m: calibrate(m, fails(ValueError("the disk is on fire"))),
            "interrupt": lambda m: calibrate(m, fails(KeyboardInterrupt())),
            "nan": lambda m: calibrate(m, spoiled),
            "option": lambda m: calibrate(m, mine, samples=0 if rank == 0 else None),
            "afterwards": lambda m: calibrate(m, mine),
            "pair": lambda m: calibrate(m, mine, group=pair),
        }
        for name, call in calls.items():
            found[f"{method} {name}"] = attempt(copy.deepcopy(model), call)
    found["spilled"] = attempt(
        copy.deepcopy(model), lambda m: batchnorm.calibrate(m, mine, method="layerwise", spill=10**9)
    )
    few = 10**9 if rank else 10
    found["few"] = attempt(
        copy.deepcopy(model), lambda m: batchnorm.calibrate(m, mine, method="layerwise", spill=few)
    )
    where = folder / "not there" if rank == 0 else folder
    found["folder"] = attempt(
        copy.deepcopy(model), lambda m: batchnorm.calibrate(m, mine, method="layerwise", spill=where)
    )
    found["another model"] = attempt(wider, lambda m: batchnorm.calibrate(m, mine))
    path = folder / "progress.safetensors"
    stopped = Failing(mine, OSError("gone")) if rank == 0 else mine
    options = {"method": "batch", "progress_file": path, "save_every": 0.0}
    found["stopped"] = attempt(copy.deepcopy(model), lambda m: batchnorm.calibrate(m, stopped, **options))
    found["files"] = sorted(file.name for file in folder.glob("progress*"))
    distributed.barrier()
    found["resumed"] = attempt(copy.deepcopy(model), lambda m: batchnorm.calibrate(m, mine, **options))
    distributed.barrier()
    for name in ("kept", "taken"):
        found[name] = attempt(
            copy.deepcopy(model), lambda m: batchnorm.calibrate(m, mine, keep_progress=True, **options)
        )
    other = [*mine, mine[0] if mine else images(8)] if rank == 0 else mine
    found["taken, other data"] = attempt(
        copy.deepcopy(model), lambda m: batchnorm.calibrate(m, other, keep_progress=True, **options)
    )
    return found


def one_is_killed(rank: int, ranks: int) -> dict[str, Any]:
    """Lose the last rank within its data; return what came of that on the others."""
    model, x = whole()

    def data() -> Iterator[Tensor]:
        yield x[:8]
        if rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield x[8:16]

    return attempt(model, lambda model: batchnorm.calibrate(model, data()))


def main(rank: int, ranks: int, what: str, folder: Path) -> None:
    """Run the scenarios, or lose a rank, and save what came of it."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks
    )
    found = scenarios(rank, ranks, folder) if what == "scenarios" else one_is_killed(rank, ranks)
    torch.save(found, folder / f"found{rank}.pt")
    if what != "scenarios":
        os._exit(0)  # no barrier: one is gone
    distributed.barrier()
    distributed.destroy_process_group()
