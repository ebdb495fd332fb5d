"""Networks with batch normalization: transformers' from small configurations, plain torch's, branched, nasty.

Weights are random, as torch's layers start, and norms are away from their initial state, so that nothing is
right by chance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import networks
from .zoo_branches import BRANCHES
from .zoo_images import IMAGES, Made
from .zoo_nasty import NASTY
from .zoo_sequences import SEQUENCES


def made(name: str) -> Made:
    """Return a network of the zoo, in evaluation, and an example of what it takes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = ZOO[name]()
        for module in model.modules():
            _randomise(module)
    return model.eval(), example


def _randomise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not parametrize.is_parametrized(module):
        module.reset_parameters()  # weights of some of these networks start so small that a norm hardly shows
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        return
    with torch.no_grad():
        mean.normal_(0, 0.2)
        var.uniform_(0.5, 1.5)
        if getattr(module, "weight", None) is not None:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)


def _stock(name: str) -> Callable[[], Made]:
    return lambda: (networks.NETWORKS[name](networks.stock), torch.randn(1, 3, 64, 64))


OF_IMAGES: dict[str, Callable[[], Made]] = {
    **{name: _stock(name) for name in networks.NETWORKS},
    **BRANCHES,
    **IMAGES,
}
ZOO: dict[str, Callable[[], Made]] = {**OF_IMAGES, **SEQUENCES, **NASTY}
