"""Placeholder for a norm that has been folded into the weights of another layer."""

from __future__ import annotations

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
    """Zero: what is left of a norm or convolution that a convolution of the same input computes too.

    Args:
        is_overwritten: the sum is written over this output, which has memory of its own therefore.
        channels: of the convolution's output; None for a norm, whose output has the input's shape.
        windows: of the convolution, on each axis: stride, and the positions by which the padding is longer
            than the window is beyond its first value.
    """

    def __init__(
        self,
        is_overwritten: bool = False,
        channels: int | None = None,
        windows: tuple[tuple[int, int], ...] = (),
    ) -> None:
        super().__init__()
        self.is_overwritten = is_overwritten
        self.channels, self.windows = channels, windows

    def forward(self, input: Tensor) -> Tensor:
        """Return zeros of the output's shape, one number in memory where that is enough."""
        shape: tuple[int, ...] = input.shape
        if self.channels is not None:
            before, sizes = shape[: -len(self.windows) - 1], shape[-len(self.windows) :]
            positions = zip(sizes, self.windows, strict=True)
            shape = (*before, self.channels, *((size + more - 1) // by + 1 for size, (by, more) in positions))
        return input.new_zeros(shape) if self.is_overwritten else input.new_zeros(()).expand(shape)

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
