"""`mask`: a context that hands a mask to all batch normalizations of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputShapeError, InputTypeError, OptionError
from batchnorm.torch.checks import shown_type
from batchnorm.torch.contexts.masks import Masked

from .contexts import layers_of, scoped
from .folding.folded import FOLDED


@contextlib.contextmanager
def mask(
    model: nn.Module,
    mask: Tensor | EllipsisType | None = ...,
    *,
    lengths: Tensor | None = None,
    size: int | None = None,
) -> Iterator[None]:
    """Leave out, within the block, padded values of the input of `model` in all its batch normalizations.

    Each layer gets the mask as if it had been called with `mask=`: padding enters no statistics, and comes
    out as zero with zero gradient. On a coarser grid a position counts if any valid position of the input
    falls in it, on a finer one if the position that contains it does; a layer with inputs `[N, C]` counts
    samples with a valid position. The mask holds for every forward within the block, also of `calibrate`,
    `lean` and compiled models; activation checkpointing recomputes a forward with the mask that it had.

    Args:
        model: with layers of this library, or one of them. A mask that a layer is called with itself comes
            first; of nested blocks, the inner one holds.
        mask: `[N, *S]` bool, True = the value counts, for the model's input `[N, C, *S]`; `[N]` for whole
            samples. None = all values count, in place of the mask of a block around this one.
        lengths: `[N]` integers, in place of a mask: of sequences, in the model's input `[N, C, L]` or tokens
            `[N, L]`, its first tensor.
        size: L, where the model's input does not show it.

    Raises:
        OptionError: (a ValueError) no batch normalization; by name, one of another library, or one folded by
            `fold`; lengths out of range, or an input that does not show L (in the forward).
        InputTypeError: (a TypeError and RuntimeError) a mask that is no bool tensor, or on another device.
        InputShapeError: (in the forward; a ValueError and RuntimeError) a layer's input has another number of
            samples than the mask, or of axes; by name.
        RecomputeError: (in the backward; a RuntimeError) activation checkpointing recomputes a forward, and
            several forwards may be meant.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), batchnorm.BatchNorm1d(8))
        >>> mask = torch.arange(10) < torch.tensor([[10], [4], [7]])  # [N, L]
        >>> with batchnorm.mask(model, mask):
        ...     y = model(torch.randn(3, 3, 10))

    Differs from torch: stock layers normalize padding along with the data.

    Source: https://github.com/pytorch/pytorch/issues/70529.
    """
    layers, masked = layers_of(model, "mask"), _masked(model, mask, lengths, size)
    with contextlib.ExitStack() as stack:
        if isinstance(masked, Lengths) and size is None:
            read = torch.compiler.disable(masked.read)  # type: ignore[no-untyped-call]
            stack.callback(model.register_forward_pre_hook(read, with_kwargs=True).remove)
        for layer in layers.values():
            scope = stack.enter_context(scoped(layer))
            stack.callback(setattr, scope, "masked", scope.masked)
            scope.masked = masked
        yield


class Lengths(Masked):
    """Makes the mask of sequences from their lengths, when the model is called.

    Args:
        lengths: `[N]` integers.
        size: padded length of the model's input; None = read off each input.
    """

    def __init__(self, lengths: Tensor, size: int | None) -> None:
        if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
            got = str(lengths.dtype) if isinstance(lengths, Tensor) else shown_type(lengths)
            raise InputTypeError(f"lengths must be a tensor of integers, [N]; got {got}")
        if lengths.dim() != 1:
            raise InputShapeError(f"lengths must have one number per sample; got shape {list(lengths.shape)}")
        self.lengths = lengths
        self._masked: dict[int, Masked] = {}  # by size: a recomputed forward finds its own
        self._now: Masked | None = None
        if size is not None:
            self._use(size)

    def read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the padded length off the model's arguments: a hook before its forward."""
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is None or first.dim() not in (2, 3):
            got = "is none" if first is None else f"has shape {list(first.shape)}"
            raise OptionError(
                "batchnorm.mask(lengths=) takes the padded length from the first tensor that the model is "
                f"called with, [N, C, L] or tokens [N, L], which {got}: pass size=, the padded length"
            )
        size, longest = first.shape[-1], int(self.lengths.max()) if self.lengths.numel() else 0
        if first.dim() == 3 and longest == first.shape[1] != size:
            raise OptionError(
                f"the model's input has shape {list(first.shape)}, and the longest sequence is {longest}: "
                "either axis may be that of positions. Pass size=, the padded length"
            )
        self._use(size)

    def of(self, input: Tensor) -> Tensor:
        """Return the mask for the input `[N, C, *S]` of a layer, `[N, *S]`."""
        if self._now is None:
            raise OptionError(
                "batchnorm.mask(lengths=) reads the padded length off the input of the model, which was "
                "not called: pass size="
            )
        return self._now.of(input)

    def _use(self, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise OptionError(f"size must be the padded length, a whole number; got {size!r}")
        least, most = (self.lengths.min(), self.lengths.max()) if self.lengths.numel() else (0, 0)
        if least < 0 or most > size:
            raise OptionError(
                f"lengths must be 0 to {size}, the padded length; got {int(least)} to {int(most)}"
            )
        if size not in self._masked:
            places = torch.arange(size, device=self.lengths.device)
            self._masked[size] = Masked(places < self.lengths.unsqueeze(1))
        self._now = self._masked[size]


def _masked(
    model: nn.Module, mask: Tensor | EllipsisType | None, lengths: Tensor | None, size: int | None
) -> Masked | None:
    """Return what the arguments of `mask` say; None = all values count."""
    if (mask is ...) is (lengths is None):
        raise OptionError("batchnorm.mask takes a mask, None for no mask, or lengths=: one of them")
    if lengths is None and size is not None:
        raise OptionError("size= is the padded length that goes with lengths=")
    if mask is None:
        return None
    if lengths is None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim()):
        got = f"{mask.dtype}, shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputTypeError(f"mask must be a bool tensor [N, *S], True = the value counts; got {got}")
    folded = [name for name, module in model.named_modules() if FOLDED in vars(module)]
    if folded:
        raise OptionError(
            "its norm is folded into other layers, and heeds no mask: mask the model that it was folded from",
            folded[0],
        )
    if isinstance(mask, Tensor):
        return Masked(mask)
    assert lengths is not None
    return Lengths(lengths, size)
