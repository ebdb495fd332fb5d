"""Frozen norms of other packages: four buffers, of which two become parameters that do not learn."""

from __future__ import annotations

import torch
from torch import nn

_FROZEN = (  # the public name and where it is defined
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "torchvision.ops.FrozenBatchNorm2d",
)
FROZEN_TIMM = "timm.layers.norm_act.FrozenBatchNormAct2d"


def is_frozen(name: str) -> bool:
    """Whether a class of this qualified name is a frozen norm: torchvision's, timm's or transformers'.

    transformers has a copy for each detector: transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d.
    """
    is_transformers = name.startswith("transformers.models.") and name.endswith("FrozenBatchNorm2d")
    return name in _FROZEN or name == FROZEN_TIMM or is_transformers


def complete(norm: nn.Module) -> None:
    """Give a frozen norm what a layer has beside its buffers: parameters, a counter and settings.

    The parameters share the memory of the buffers that they were.
    """
    for name in ("weight", "bias"):
        buffer = norm._buffers.pop(name)
        assert buffer is not None
        norm._parameters[name] = nn.Parameter(buffer.detach(), requires_grad=False)
    norm._non_persistent_buffers_set = norm._non_persistent_buffers_set - {"weight", "bias"}
    weight = norm._parameters["weight"]
    assert weight is not None
    settings = {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
    for name, value in {"num_features": weight.numel(), **settings}.items():
        vars(norm).setdefault(name, value)
    if norm._buffers.get("num_batches_tracked") is None:
        norm._buffers["num_batches_tracked"] = torch.tensor(0, dtype=torch.long, device=weight.device)
