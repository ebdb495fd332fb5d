"""`lean`: around a forward, outputs of norms are not kept for the backward; it computes them again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from . import output_recipes
from .lean_savings import Savings
from .tracing import is_transforming

# Max pooling keeps, as int64, where in its plane each maximum was; int16 holds that for planes of 181 x 181.
_NARROW = (torch.uint8, torch.int16, torch.int32)
_FEW = 4096  # values that are not worth it
_PLANES = 4  # axes of such indices, at least: labels, which their owner keeps too, have fewer


class _Narrow:
    """Integers, kept as the narrowest that hold them."""

    __slots__ = ("values",)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def take(self) -> Tensor:
        return self.values.to(torch.int64)


Packed = output_recipes.Kept | output_recipes.Reading | _Narrow


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Around a forward: keep about half as much for the backward, which gives the same gradients.

        with batchnorm.lean():
            loss = f(model(x))
        loss.backward()

    A layer of this library keeps its input for its own gradient. Its output, which a convolution or pooling
    behind it keeps for theirs, follows from that by one cheap pass: within this context it is not kept, and
    the backward computes it again by the same kernel, bit for bit. That takes in whatever is fused into the
    layer, residual and activation: `convert` and `fuse` the model before. It holds for what operators keep in
    this thread, and for outputs that were computed within such a context.

    Warns:
        UserWarning: (once) next to nothing is saved, as the model's norms are torch's own, or their
            activations and additions are not fused into them; it names the calls that help.

    Raises:
        RuntimeError: (in the backward) as torch's own: something that is needed was written to in place.

    Differs from torch: an output that was written to after an operator had kept it is an error there; here
    the backward has the value that the operator saw. What torch does not count as a write (`.data`, NumPy) is
    not seen. Of nested `saved_tensors_hooks`, torch asks the innermost pair only, and this is one.
    `torch.compile` decides by itself what to compute again: for compiled parts, and within a transform of
    `torch.func`, this does nothing.

    Source: the idea of recomputing what is cheap, Chen et al. 2016, arXiv:1604.06174; for norm and activation
    by inverting them, Rota Bulò et al. 2017, arXiv:1712.02616.
    """
    if torch.compiler.is_compiling() or is_transforming():
        yield
        return
    saved = Savings()

    def pack(tensor: Tensor) -> Packed:
        recipe = output_recipes.find(tensor)
        saved.note(tensor, is_spared=recipe is not None)
        return _kept(tensor) if recipe is None else recipe.read(tensor)

    with saved_tensors_hooks(pack, _unpack):
        yield
    saved.warn(stacklevel=4)  # this, contextlib, the block


def _kept(tensor: Tensor) -> Packed:
    """Return what is kept in the place of a tensor that has no recipe."""
    if tensor.dtype == torch.int64 and tensor.dim() >= _PLANES and tensor.numel() >= _FEW:
        return _narrowed(tensor) or output_recipes.keep(tensor)
    return output_recipes.keep(tensor)


def _unpack(packed: Packed) -> Tensor:
    return packed.take()


def _narrowed(values: Tensor) -> _Narrow | None:
    """Return integers as the narrowest that hold them; on a GPU the host waits for their bounds."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a CUDA graph cannot wait
    low, high = (int(bound) for bound in torch.aminmax(values))
    for dtype in _NARROW:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return _Narrow(values.to(dtype))
    return None
