"""Our kernels behind the least Python that autograd allows: what a small layer could take at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import batchnorm


class _Unchecked(torch.autograd.Function):
    """(x, weight, bias, prepared call) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, plain: Any) -> Tensor:  # noqa: ARG004
        y, statistics = plain.forward(x, None)
        ctx.save_for_backward(x, weight, statistics)
        ctx.plain = plain
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, statistics = ctx.saved_tensors
        dx, dweight, dbias, _ = ctx.plain.backward(x, dy, weight, None, None, statistics)
        return dx, dweight, dbias, None


_apply: Callable[..., Any] = super(torch.autograd.Function, _Unchecked).apply


class Unchecked(batchnorm.BatchNorm1d):
    """Runs the layer's prepared call again, from its second call on, without looking at anything.

    It is right for one shape, and where nothing but its input changes.
    """

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        if self._plain is None:
            return super().forward(input)
        y: Tensor = _apply(input, self._plain.tensors[0], self._plain.tensors[1], self._plain)
        return y
