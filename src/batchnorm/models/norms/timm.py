"""Defines the counterpart of `timm.layers.BatchNormAct2d`, with the modules that timm's contains."""

from __future__ import annotations

from torch import Tensor, nn

from batchnorm.models.graph.module_hooks import has_hooks
from batchnorm.torch.call import cleared
from batchnorm.torch.layers import BatchNorm2d

from .activations import module_activation


class BatchNormAct2d(BatchNorm2d):
    """Our BatchNorm2d with timm's `drop` and `act` behind it, in one pass where these can be fused."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return act(drop(norm(input) + residual)), 0 where masked."""
        y = super().forward(input, residual, mask, lengths)
        if self.activation is not None:
            return y
        y = self.act(self.drop(y))
        used = self.mask_for(input, mask, lengths) if self._scope is None else self._scope.used
        return cleared(y, used)


def inner_activation(norm: nn.Module) -> str | None:
    """Return the activation of `act` if the layer can apply it, else None."""
    drop, act = norm.drop, norm.act
    assert isinstance(act, nn.Module)
    assert isinstance(drop, nn.Module)
    return None if type(drop) is not nn.Identity or has_hooks(drop) else module_activation(act)


def is_bare(norm: nn.Module) -> bool:
    """Whether `drop` and `act` are identities."""
    return all(type(part) is nn.Identity and not has_hooks(part) for part in (norm.drop, norm.act))
