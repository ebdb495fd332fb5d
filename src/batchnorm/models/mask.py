"""`mask`: a context that hands a mask to all batch normalizations of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.errors import InputTypeError, OptionError
from batchnorm.torch.contexts.checkpointing import Scope
from batchnorm.torch.contexts.masks import Masked

from .contexts import layers_of
from .folding.folded import FOLDED
from .mask_lengths import Lengths


class Absent:
    """What stands for an argument that was not given, where None says something."""

    def __repr__(self) -> str:
        return "..."


ABSENT = Absent()


@contextlib.contextmanager
def mask(
    model: nn.Module,
    mask: Tensor | Absent | None = ABSENT,
    *,
    lengths: Tensor | None = None,
    size: int | None = None,
) -> Iterator[None]:
    """Within the block, the batch normalizations of `model` leave out what a mask of its input leaves out.

        with batchnorm.mask(model, mask):
            y = model(x)

    Each layer gets the mask as if it had been called with `mask=`: padding is in no statistic, and comes out
    as zero with zero gradient, whatever was in it. On a layer's own grid a position counts if any valid
    position of the input falls in it; on a finer one, if that counts in which it lies. A layer without
    positions, `[N, C]`, counts the samples that have a valid one. The mask holds for every forward within the
    block; `calibrate` heeds it, and so do `lean` and compiled models. Activation checkpointing computes a
    forward again with the mask that it had, wherever the backward is. What is folded into other layers
    (`fold`) has no statistics, and so heeds no mask.

    Args:
        model: with layers of this library, or one of them. A mask that a layer is called with itself comes
            first; of nested blocks, the inner one does.
        mask: `[N, *S]` bool, True = the value counts, for the model's input `[N, C, *S]`; `[N]` says which
            samples count. None: all values count, whatever the block around this one says.
        lengths: `[N]` integers, in place of a mask: of sequences, in the model's input `[N, C, L]` or tokens
            `[N, L]`, its first tensor.
        size: L, where the model's input does not tell it.

    Raises:
        OptionError: (a ValueError) no batch normalization; by name, one that is not of this library, or that
            `fold` has folded; lengths out of range, or where the input does not tell L (in the forward).
        InputTypeError: (a TypeError and RuntimeError) a mask that is no bool tensor; in the forward, a mask
            on another device.
        InputShapeError: (in the forward; a ValueError and RuntimeError) a layer's input has another number of
            samples than the mask, or of axes; by name.
        RecomputeError: (in the backward; a RuntimeError) checkpointing, and the forward that it computes
            again cannot be told among those that may be meant.

    Differs from torch: stock layers normalize padding along with the data.

    Source: https://github.com/pytorch/pytorch/issues/70529.
    """
    if (mask is ABSENT) is (lengths is None):
        raise OptionError("batchnorm.mask takes a mask, None for no mask, or lengths=: one of them")
    if lengths is None and size is not None:
        raise OptionError("size= is the padded length that goes with lengths=")
    layers = layers_of(model, "mask")
    masked = _masked(mask, lengths, size)
    folded = [name for name, module in model.named_modules() if FOLDED in vars(module)]
    if masked is not None and folded:
        raise OptionError(
            "its norm is folded into other layers, and heeds no mask: mask the model that it was folded from",
            folded[0],
        )
    before = []
    handle = None
    try:
        if isinstance(masked, Lengths) and size is None:
            handle = model.register_forward_pre_hook(
                torch.compiler.disable(masked.read),  # type: ignore[no-untyped-call]
                with_kwargs=True,
            )
        for layer in layers:
            scope = layer._scope
            if scope is None:
                scope = layer._scope = Scope()
            before.append((layer, scope, scope.masked))
            scope.masked = masked
        yield
    finally:
        if handle is not None:
            handle.remove()
        for layer, scope, earlier in before:
            scope.masked = earlier
            if scope.is_over and vars(layer).get("_scope") is scope:
                vars(layer).pop("_scope", None)


def _masked(mask: Tensor | Absent | None, lengths: Tensor | None, size: int | None) -> Masked | None:
    if lengths is not None:
        return Lengths(lengths, size)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 1):
        got = f"{mask.dtype}, shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputTypeError(f"mask must be a bool tensor [N, *S], True = the value counts; got {got}")
    return None if mask is None else Masked(mask)
