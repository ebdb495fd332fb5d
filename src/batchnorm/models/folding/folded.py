"""Placeholder for a norm that has been folded into the weights of another layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm.errors import InputShapeError
from batchnorm.models.norms.activations import FUNCTIONS, module_for
from batchnorm.torch.symbolic import OneNode

FOLDED = "_batchnorm_folded"  # attribute of what stands in a norm's place


class Folded(OneNode):
    """activation(input + residual): what is left of a norm whose scale and shift another layer has taken.

    Args:
        activation: what the norm applied itself, a module or a name, or None.
        rank: number of axes of the input; where a norm takes several, the fold holds for this one.
    """

    def __init__(self, activation: nn.Module | str | None = None, rank: int | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.rank = rank

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return what the norm would, given the input that its neighbour has normalized."""
        if self.rank is not None and input.dim() != self.rank:
            raise InputShapeError(
                f"folded for an input of {self.rank} axes, got {input.dim()} (shape {list(input.shape)}): "
                "fold with an example of that shape"
            )
        y = input if residual is None else input + residual
        if self.activation is None:
            return y
        activate = FUNCTIONS[self.activation] if isinstance(self.activation, str) else self.activation
        return activate(y)

    def extra_repr(self) -> str:
        """Return what it applies and checks."""
        shown = {"activation": self.activation, "rank": self.rank}
        return ", ".join(f"{k}={v}" for k, v in shown.items() if isinstance(v, (str, int)))


class FoldedBeside(OneNode):
    """Zero: what is left of a norm that a convolution of the same input, added to it, computes too.

    Args:
        is_overwritten: the sum is written over this output, which has memory of its own therefore.
    """

    def __init__(self, is_overwritten: bool = False) -> None:
        super().__init__()
        self.is_overwritten = is_overwritten

    def forward(self, input: Tensor) -> Tensor:
        """Return zeros of the input's shape, one number in memory where that is enough."""
        return torch.zeros_like(input) if self.is_overwritten else input.new_zeros(()).expand(input.shape)

    def extra_repr(self) -> str:
        """Return whether its output has memory of its own."""
        return "is_overwritten=True" if self.is_overwritten else ""


def stand_in(activation: nn.Module | str | None, *, adds: bool, rank: int | None) -> nn.Module:
    """Return the module for a norm's place: torch's own where one does.

    Args:
        activation: what the norm applied itself.
        adds: whether the norm is called with a residual.
        rank: of the input, if that has to be checked.
    """
    if adds or rank is not None:
        return Folded(activation, rank)
    if isinstance(activation, str):
        return module_for(activation)
    return nn.Identity() if activation is None else activation
