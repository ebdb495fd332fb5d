"""One of two processes of torch.distributed: `python one_rank.py RANK FOLDER`, with KERAS_BACKEND=torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from batchnorm.keras import BatchNormalization


def main(rank: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    given = np.load(folder / f"given{rank}.npz")
    options = json.loads(str(given["options"])) if "options" in given else {"synchronized": True}
    layer = BatchNormalization(momentum=0.9, **options)
    layer.build(given["x"].shape)
    layer.set_weights([given[name] for name in ("gamma", "beta", "mean", "var")])
    x = torch.tensor(given["x"], requires_grad=True)
    mask = given.get("mask")
    y = layer(x, training=True, mask=mask)
    weights = [layer.gamma.value, layer.beta.value]
    dx, dgamma, dbeta = torch.autograd.grad(y, [x, *weights], torch.tensor(given["dy"]))
    found = {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    found |= {"moving_mean": layer.moving_mean.value, "moving_variance": layer.moving_variance.value}
    np.savez(folder / f"found{rank}.npz", **{name: value.detach().numpy() for name, value in found.items()})
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
