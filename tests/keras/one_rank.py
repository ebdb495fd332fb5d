"""One of two processes of torch.distributed: layers of Keras on the torch backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from batchnorm.keras import BatchNormalization


def step(given: dict[str, Any]) -> dict[str, Tensor]:
    """Return output, gradients and moving statistics of a layer."""
    layer = BatchNormalization(momentum=0.9, **json.loads(given["options"]))
    layer.build(given["x"].shape)
    layer.set_weights([given[name].numpy() for name in ("gamma", "beta", "mean", "var")])
    x = given["x"].requires_grad_()
    y = layer(x, training=True, mask=given.get("mask"))
    weights = [layer.gamma.value, layer.beta.value]
    dx, dgamma, dbeta = torch.autograd.grad(y, [x, *weights], given["dy"])
    found = {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    found |= {"moving_mean": layer.moving_mean.value, "moving_variance": layer.moving_variance.value}
    return {name: value.detach() for name, value in found.items()}


def main(rank: int, folder: Path) -> None:
    """Run every scenario."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    given = torch.load(folder / f"given{rank}.pt", weights_only=True)
    torch.save({name: step(one) for name, one in given.items()}, folder / f"found{rank}.pt")
    distributed.destroy_process_group()
