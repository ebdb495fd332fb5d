"""What a diagnosis costs, and what it finds in networks that are as their authors initialize them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.doctor.findings import Diagnosis

from . import networks
from .progress import progress
from .tables import Row, Rows, table_of
from .zoo_images import IMAGES
from .zoo_sequences import SEQUENCES

IMAGES_OF, SIDE, BATCH = 512, 64, 32
NETWORKS = ("ResNet-18", "ResNet-50", "MobileNetV2")
SAMPLES = 4  # of a network of the zoo


def measure(quick: bool = False) -> Rows:
    """Return a row per diagnosis: seconds on images for some networks, findings for those of the zoo."""
    zoo = {**IMAGES, **SEQUENCES}
    names = list(zoo)[::8] if quick else list(zoo)
    timed = [
        _timed(name, 64 if quick else IMAGES_OF)
        for name in progress(NETWORKS[:1] if quick else NETWORKS, "costs")
    ]
    return timed + [_untrained(name, zoo[name]) for name in progress(names, "networks of the zoo")]


def _timed(name: str, images: int) -> Row:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = networks.NETWORKS[name](networks.stock)
        x, y = torch.randn(images, 3, SIDE, SIDE), torch.randint(0, networks.CLASSES, (images,))
        with torch.no_grad():
            for norm in model.modules():  # off by so much that every layer is replaced alone
                if isinstance(norm, nn.BatchNorm2d):
                    norm.weight.uniform_(0.5, 1.5)
                    norm.bias.normal_(0, 0.2)
                    norm.running_mean.normal_(0, 0.5)
    data = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    load = os.getloadavg()[0]
    found = batchnorm.diagnose(model.eval(), data, samples=images)
    return {
        "network": name,
        "images": images,
        "side": SIDE,
        "norms": found.norms,
        "seconds": found.cost.seconds,
        "forwards": found.cost.forwards,
        "load_before": load,
    }


def _untrained(name: str, make: Any) -> Row:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = make()
    model.eval()
    try:
        batch = _batch(example)
        found = batchnorm.diagnose(model, [batch])
        samples = found.cost.samples
    except Exception:  # a network that takes one sample only, or whose inputs hang together
        found, samples = batchnorm.diagnose(model, example=example), 0
    return {"zoo": name, "norms": found.norms, "samples": samples, "findings": _counted(found)}


def _counted(found: Diagnosis) -> dict[str, int]:
    return dict(Counter(f"{finding.severity} {finding.check}" for finding in found.findings))


def _batch(example: Any) -> Any:
    """Return several samples like the one of an example."""

    def several(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        parts = [value] + [value + 0.5 * torch.randn_like(value) if value.is_floating_point() else value] * (
            SAMPLES - 1
        )
        return torch.cat(parts)

    if isinstance(example, Mapping):
        return {key: several(value) for key, value in example.items()}
    return several(example)


def cost_table(rows: Rows) -> str:
    """Seconds of a diagnosis, per network."""
    return table_of(
        {
            "network": row["network"],
            "data": f"{row['images']} × 3 × {row['side']}²",
            "norms": str(row["norms"]),
            "forwards of the data": f"{row['forwards']:.1f}",
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in rows
        if "network" in row
    )


def zoo_table(rows: Rows) -> str:
    """Findings in untrained networks, by severity and check, and in how many networks."""
    zoo = [row for row in rows if "zoo" in row]
    kinds = Counter(kind for row in zoo for kind in row["findings"])
    order = ("serious", "likely", "note")
    chosen = sorted(kinds, key=lambda kind: (order.index(kind.split()[0]), -kinds[kind]))
    lines = [
        {
            "severity": kind.split()[0],
            "check": kind.split()[1],
            f"of {len(zoo)} networks": str(kinds[kind]),
            "norms": str(sum(row["findings"].get(kind, 0) for row in zoo)),
        }
        for kind in chosen
    ]
    return table_of(lines)


def tables(rows: Rows) -> str:
    """Both tables."""
    return f"{cost_table(rows)}\n\n{zoo_table(rows)}"
