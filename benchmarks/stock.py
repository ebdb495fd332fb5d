"""The chain that ours replaces: torch's norm, an addition and an activation."""

from __future__ import annotations

from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class StockChain(nn.Module):
    """activation(norm(x) + residual), of torch's own layers.

    Args:
        rank: axes of the input.
        channels: C.
        activation: a name of ACTIVATIONS, or None.
        in_place: add and activate in the norm's output, as torchvision's networks do.
    """

    def __init__(
        self, rank: int, channels: int, activation: str | None = None, *, in_place: bool = False
    ) -> None:
        super().__init__()
        self.norm = NORMS[rank](channels)
        self.activation = ACTIVATIONS[activation](inplace=in_place) if activation else None
        self.in_place = in_place

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the chain's output, of the shape of `x`."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual) if self.in_place else y + residual
        return y if self.activation is None else self.activation(y)
