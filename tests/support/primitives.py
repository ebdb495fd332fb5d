"""An engine's primitives with a call's tensors and options as arguments, and statistics taken apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from batchnorm.kernels.interface import Coefficients, Engine, Moments
from batchnorm.torch.call import Call


class Primitives:
    """An engine: `[N, C, *S]` and options in, tensors out.

    Args:
        engine: whose primitives these are.
        own_statistics: `backward` reads what `forward` has returned, in the engine's own form, instead of
            mean and rstd.
    """

    def __init__(self, engine: Engine, *, own_statistics: bool = False) -> None:
        self.engine = engine
        self.own_statistics = own_statistics
        self._last: tuple[Tensor, ...] = ()

    def moments(self, x: Tensor, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
        return self.engine.moments(Call(x, mask=mask, group_size=group_size))

    def forward(
        self,
        x: Tensor,
        eps: float,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        running: Any = None,
        activation_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Moments, Tensor]:
        call = Call(x, weight, bias, eps=eps, **options)
        y, self._last = self.engine.forward(call, running, activation_mask)
        return y, *self.engine.unpack(self._last, x.shape[1])

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        activation_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        return self.engine.normalize(Call(x, weight, bias, **options), (mean, rstd), activation_mask)

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        mean: Tensor,
        rstd: Tensor,
        constant: bool,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        activation_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        statistics = self._last if self.own_statistics and self._last else (mean, rstd)
        return self.engine.backward(
            Call(x, weight, bias, **options), dy, statistics, constant, activation_mask
        )

    def backward_reduce(
        self,
        x: Tensor,
        dy: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        return self.engine.backward_reduce(Call(x, weight, bias, **options), dy, (mean, rstd))

    def backward_apply(
        self,
        x: Tensor,
        dy: Tensor,
        mean: Tensor,
        rstd: Tensor,
        coefficients: Coefficients,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return self.engine.backward_apply(Call(x, weight, bias, **options), dy, (mean, rstd), coefficients)

    def activation_mask(self, x: Tensor, activation: str | None, group_size: int | None) -> Tensor | None:
        return self.engine.activation_mask(Call(x, activation=activation, group_size=group_size))
