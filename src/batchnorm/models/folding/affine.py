"""The affine map of a torch batch normalization in evaluation, or the reason why it has none."""

from __future__ import annotations

import torch
from torch import nn

from batchnorm.folding.affine import Affine
from batchnorm.folding.affine import affine as map_of
from batchnorm.models.graph.module_hooks import is_forward_replaced
from batchnorm.models.norms.find import Found
from batchnorm.models.norms.kinds import is_layer, is_ours
from batchnorm.models.norms.timm import BatchNormAct2d

from .foldable_layers import copied, listeners

_FIXED_EPS = 1e-5  # of the copies of FrozenBatchNorm2d in transformers, which have it in their code


def affine(norm: nn.Module) -> Affine:
    """Return scale and shift of a norm that keeps running statistics."""
    tensors = (getattr(norm, name, None) for name in ("running_mean", "running_var", "weight", "bias"))
    mean, var, weight, bias = (None if t is None else t.detach().cpu().double().numpy() for t in tensors)
    assert mean is not None
    assert var is not None
    return map_of(mean, var, getattr(norm, "eps", _FIXED_EPS), weight, bias)


def why_not_affine(found: Found) -> str:
    """Return why a norm is no affine map in evaluation, or cannot be taken away; "" if it can."""
    norm, family = found.module, found.kind.family
    if family == "other":
        return "its class is not known: it may compute something else"
    if listeners(norm):
        return "it has hooks, which would see other values"
    if is_forward_replaced(norm):
        return "its forward was replaced on the instance"
    if is_layer(norm) and norm.statistics.measures(training=False):
        return f"statistics={norm.statistics} adapts to each batch: it is no affine map in evaluation"
    mean, var = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
    if mean is None or var is None:
        return "it keeps no running statistics: it normalizes by the batch in evaluation too"
    if mean.is_meta or var.is_meta:
        return "it is on the meta device: no values"
    found_affine = affine(norm)
    if not found_affine.is_finite:
        return "its statistics or parameters give NaN or inf"
    if family == "frozen" and not _computes(norm, found_affine):
        return "its forward computes something else than its buffers say"
    return ""


def _computes(norm: nn.Module, wanted: Affine) -> bool:
    """Whether a norm that is known by its name only computes an affine map on random numbers."""
    x = torch.randn(
        2, len(wanted.scale), 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    shape = (1, -1, 1, 1)
    y = torch.from_numpy(wanted.scale.reshape(shape)) * x + torch.from_numpy(wanted.shift.reshape(shape))
    try:
        with torch.no_grad():
            given = copied(norm).cpu().double().eval()(x)
        return bool(torch.allclose(given, y, rtol=1e-10, atol=1e-10 * float(y.abs().max())))
    except Exception:  # a forward of another library may raise anything
        return False


def own_activation(norm: nn.Module) -> nn.Module | str | None:
    """Return the activation that a norm applies itself: a module of it, its name in our layers, or None."""
    if is_ours(norm) and norm.activation is not None:
        return str(norm.activation)
    if is_timm(norm):
        drop, act = norm.drop, norm.act
        assert isinstance(act, nn.Module)
        assert isinstance(drop, nn.Module)
        if type(drop) in (nn.Identity, nn.Dropout, nn.Dropout2d) and not listeners(drop):
            return None if type(act) is nn.Identity and not listeners(act) else act
        return nn.Sequential(drop, act)
    return None


def is_timm(norm: nn.Module) -> bool:
    """Whether a norm has timm's `drop` and `act` inside."""
    return isinstance(norm, BatchNormAct2d) or (hasattr(norm, "drop") and hasattr(norm, "act"))
