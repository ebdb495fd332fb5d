"""Reads the state of a batch normalization, as the checks of the doctor take it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from batchnorm.doctor.records import NormState
from batchnorm.statistics.policy import Policy
from batchnorm.torch.contexts.domains import affine_of

from .find import Found
from .kinds import is_synchronized

_READ = ("running_mean", "running_var", "num_batches_tracked")


def norm_state(found: Found) -> NormState:
    """Return the state of a norm as it is now; of a layer with domains, of the one in use."""
    norm, family = found.module, found.kind.family
    with torch.no_grad():
        tensors = {name: getattr(norm, name, None) for name in _READ} | affine_of(norm)
    present = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    policy = getattr(norm, "statistics", None)
    policy = policy if isinstance(policy, Policy) else None
    momentum = getattr(norm, "momentum", None)
    has_statistics = {"running_mean", "running_var"} <= present.keys()
    is_frozen = family == "frozen" or momentum == 0 or (policy is not None and not policy.moves(True))
    kept = NormState(
        name=found.name,
        kind=found.kind.name,
        is_stock=family in ("stock", "synchronized", "timm", "other"),
        training=norm.training and not is_frozen,
        is_tracked=has_statistics,
        moves=has_statistics and not is_frozen,
        momentum=None if momentum is None else float(momentum),
        warm_start=getattr(norm, "warm_start", False) is True,
        eps=float(getattr(norm, "eps", 0.0)),
        dtype=str(present["running_var"].dtype).removeprefix("torch.") if has_statistics else "",
        learns=any(parameter.requires_grad for parameter in norm.parameters()),
        is_synchronized=is_synchronized(norm) or (policy is not None and policy.name == "synced"),
        places=found.names,
        adapts=policy is not None and policy.measures(False),
        unreadable=_unreadable(list(present.values())),
    )
    return kept if kept.unreadable else _with_values(kept, present)


def _unreadable(tensors: list[Tensor]) -> str:
    if any(is_lazy(tensor) for tensor in tensors):
        return "not initialized: it has seen no input"
    if any(tensor.is_meta for tensor in tensors):
        return "on the meta device: no values"
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):
        return "sharded over processes: its values are not looked at"
    return ""


def _with_values(state: NormState, tensors: dict[str, Tensor]) -> NormState:
    batches = tensors.get("num_batches_tracked")
    values = {name: _array(tensors[name]) for name in tensors if name != "num_batches_tracked"}
    return replace(
        state,
        mean=values.get("running_mean") if state.is_tracked else None,
        var=values.get("running_var") if state.is_tracked else None,
        batches=None if batches is None else int(batches),
        weight=values.get("weight"),
        bias=values.get("bias"),
    )


def _array(tensor: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = tensor.detach().cpu().double().numpy().reshape(-1).copy()
    return found
