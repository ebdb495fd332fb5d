"""Lengths of sequences in place of a mask: the padded length is that of the model's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputShapeError, InputTypeError, OptionError
from batchnorm.torch.checks import shown_type
from batchnorm.torch.contexts.masks import Masked


class Lengths(Masked):
    """The mask that lengths stand for, made when the model is called.

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
        self._masked: dict[int, Masked] = {}  # one for each size: a recompute knows its own again
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
