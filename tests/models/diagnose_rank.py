"""One of two processes of torch.distributed: it diagnoses alone, and together with the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

import batchnorm
from batchnorm.doctor.findings import Diagnosis

from .diagnosed import applied, batches, checks, only, trained


def _attempt(call: Callable[[], Diagnosis]) -> Any:
    try:
        return sorted(map(str, checks(call())))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(rank: int, folder: Path) -> None:
    """Diagnose in every way, and save what came of it."""
    torch.set_num_threads(1)
    trained()  # calibrates, which both would have to do together
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    found: dict[str, Any] = {}
    for name, convert in (
        ("ours", lambda model: batchnorm.convert(model, batchnorm.Synced())),
        ("stock", nn.SyncBatchNorm.convert_sync_batchnorm),
        ("over", lambda model: batchnorm.convert(model, batchnorm.Synced(over=batchnorm.Adapted()))),
    ):
        if rank == 0:  # the other process is not there: a collective would wait for it
            model = convert(trained()).train()
            alone = batchnorm.diagnose(model, batches())
            found[name] = only(alone, "batch-mates").layer, alone.scores["batch"], alone.unchecked
        distributed.barrier()
    model = trained()
    data = batches()[rank::2]
    whole = nn.parallel.DistributedDataParallel(model)
    found["same"] = _attempt(lambda: batchnorm.diagnose(whole, data, group=None))
    if rank == 1:
        model[4].running_mean += 0.05 * model[4].running_var.sqrt()
    found["near"] = _attempt(lambda: batchnorm.diagnose(model, group=None))
    if rank == 1:
        model[4].running_mean += 0.5 * model[4].running_var.sqrt()
    finding = only(batchnorm.diagnose(model, group=None), "different-ranks")
    found["apart"] = finding.layer, finding.severity, finding.evidence["distance"]
    found["unasked"] = _attempt(lambda: batchnorm.diagnose(model))
    found["error"] = _attempt(lambda: batchnorm.diagnose(model, samples=1 + rank, group=None))
    applied(finding, model=model, data=data)
    found["mended"] = _attempt(lambda: batchnorm.diagnose(model, group=None))
    torch.save(found, folder / f"found{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
