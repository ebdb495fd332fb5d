"""The batch normalizations of a model: torch's own and ours, by name."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def tracking_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the layers of `model` that keep running statistics, by qualified name, each layer once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
    }
