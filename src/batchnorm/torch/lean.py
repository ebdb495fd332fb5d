"""`lean`: a context in which norm outputs are not saved for the backward, which recomputes them."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from batchnorm.kernels.activations import ACTIVATIONS

from . import autograd, output_recompute
from .tracing import is_transforming

# Max pooling saves the position of each maximum in its plane as int64; int16 is enough up to 181 x 181.
_NARROW = (torch.uint8, torch.int16, torch.int32)
_FEW = 4096  # fewer values than this are not worth a conversion
_PLANES = 4  # axes that such indices have at least; labels, which the caller keeps anyway, have fewer

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


class _NarrowIntegers:
    """Integers, saved in the narrowest dtype that holds them."""

    __slots__ = ("values",)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def unpack(self) -> Tensor:
        """Return the integers as int64."""
        return self.values.to(torch.int64)


Packed = output_recompute.SavedTensor | output_recompute.RecomputedOutput | _NarrowIntegers


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Around a forward: keep about half as much for the backward, which gives the same gradients.

        with batchnorm.lean():
            loss = f(model(x))
        loss.backward()

    A layer of this library saves its input for its own gradient. Its output, which a following convolution or
    pooling saves for its gradient, can be recomputed from that in one cheap pass. Within this context the
    output is not saved, and the backward recomputes it with the same kernel, bit for bit. Whatever is fused
    into the layer, residual and activation, is recomputed with it: `convert` and `fuse` the model before. The
    context covers what operators save in this thread, of outputs that were computed within such a context.

    Warns:
        UserWarning: (once) hardly any memory is saved, because the model's norms are torch's own, or because
            activations and additions are not fused into them; the warning names the calls that help.

    Raises:
        RuntimeError: (in the backward) a saved tensor was written to in place; the same as torch's own error.

    Example:
        >>> norm = batchnorm.BatchNorm1d(8, activation="relu")
        >>> model = nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 1))
        >>> with batchnorm.lean():
        ...     y = model(torch.randn(16, 4))
        >>> y.sum().backward()

    Differs from torch: writing to an output after an operator has saved it is an error there; here the
    backward has the value that the operator read. Writes that torch does not count (`.data`, NumPy) go
    unnoticed. Of nested `saved_tensors_hooks`, torch calls the innermost pair only, and this context is one.
    `torch.compile` decides by itself what to recompute: for compiled parts, and within a transform of
    `torch.func`, this context does nothing.

    Source: the idea of recomputing what is cheap, Chen et al. 2016, arXiv:1604.06174; for norm and activation
    by inverting them, Rota Bulò et al. 2017, arXiv:1712.02616.
    """
    if torch.compiler.is_compiling() or is_transforming():
        yield
        return
    saved = _Savings()

    def pack(tensor: Tensor) -> Packed:
        recipe = output_recompute.find(tensor)
        saved.note(tensor, is_spared=recipe is not None)
        return _saved(tensor) if recipe is None else recipe.placeholder(tensor)

    with saved_tensors_hooks(pack, _unpack):
        yield
    saved.warn(stacklevel=4)  # this function, contextlib, the block


def _saved(tensor: Tensor) -> Packed:
    """Save a tensor that has no recipe."""
    if tensor.dtype == torch.int64 and tensor.dim() >= _PLANES and tensor.numel() >= _FEW:
        return _narrowed(tensor) or output_recompute.save(tensor)
    return output_recompute.save(tensor)


def _unpack(packed: Packed) -> Tensor:
    """Return a saved tensor to the operator that needs it."""
    return packed.unpack()


def _narrowed(values: Tensor) -> _NarrowIntegers | None:
    """Return integers in the narrowest dtype that holds them; on a GPU the host waits for their bounds."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # within a capture the host cannot wait
    low, high = (int(bound) for bound in torch.aminmax(values))
    for dtype in _NARROW:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return _NarrowIntegers(values.to(dtype))
    return None


class _Savings:
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
