"""Counts the memory that `lean` saves, and warns where other layers keep it from saving more."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.activations import ACTIVATIONS

from . import autograd

_ENOUGH = 0.1  # fraction of the missed bytes; where less is saved, a warning is due
_FAR = 3  # steps of the graph that are searched for a norm: from an activation over an addition to it
_HELP = {
    "convert": "the batch normalizations here are torch's own: batchnorm.convert(model), then "
    "batchnorm.fuse(model, example), before",
    "fuse": "what stands behind the layers of batchnorm here is not part of them: "
    "batchnorm.fuse(model, example) before",
}
_NORMS = (autograd._BatchNorm, autograd._PlainBatchNorm, autograd._PolicyBatchNorm)
_warned: set[str] = set()


class Savings:
    """Counts the bytes that one block of `lean` saves, and those that it misses on other layers."""

    def __init__(self) -> None:
        _fusable()  # called here, because it builds a graph, which must not happen within the hooks
        self.spared = 0
        self.missed = dict.fromkeys(_HELP, 0)

    def note(self, tensor: Tensor, *, is_spared: bool) -> None:
        """Count a tensor that an operator saves for the backward."""
        if is_spared:
            self.spared += tensor.nbytes
        elif len(_warned) < len(_HELP) and tensor.is_floating_point() and tensor.grad_fn is not None:
            remedy = _remedy(tensor.grad_fn, 0)
            if remedy is not None:
                self.missed[remedy] += tensor.nbytes

    def warn(self, stacklevel: int) -> None:
        """Warn if hardly any memory was saved, once for each remedy."""
        missed = sum(self.missed.values())
        if self.spared >= _ENOUGH * missed:
            return
        remedy = max(self.missed, key=lambda name: self.missed[name])
        if remedy not in _warned:
            _warned.add(remedy)
            warnings.warn(f"lean saves next to nothing: {_HELP[remedy]}", UserWarning, stacklevel=stacklevel)


def _remedy(node: Any, far: int) -> str | None:
    """Return the remedy that would let `lean` recompute the output of a node, if a norm is before it."""
    if getattr(type(node), "_forward_cls", None) in _NORMS:
        return "fuse" if far else None  # the output of a norm itself is saved only at the end of a chain
    name = node.name()
    if "BatchNorm" in name:
        return "convert"
    if far == _FAR or name not in _fusable():
        return None
    found = [_remedy(after, far + 1) for after, _ in node.next_functions if after is not None]
    return next((remedy for remedy in found if remedy is not None), None)


@functools.cache
def _fusable() -> frozenset[str]:
    """Return the names of the graph's nodes for additions and for activations that a layer can apply."""
    with torch.enable_grad(), torch.inference_mode(False):
        x = torch.zeros(1, requires_grad=True)
        results = [x + x, *(getattr(F, name)(x) for name in ACTIVATIONS)]
    return frozenset(str(y.grad_fn.name()) for y in results)
