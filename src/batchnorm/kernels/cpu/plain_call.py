"""Runs a layer's plain call, verified once, again on inputs of the same kind.

A plain call has float tensors, a weight and a bias in the dtype of the arithmetic, no mask and no groups. It
normalizes by its batch and moves running statistics, or it normalizes by these. What depends on shapes,
strides, dtypes and addresses alone is kept, so that a small layer spends little time outside of its kernel.
No value is kept: every run reads the layer's tensors, after it has compared their addresses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from batchnorm.kernels.layout import shows_values

from . import huge_pages
from .prepared_launch import EMPTY, copied, increment_version, prepare

_empty_like = torch.empty_like
_strided = torch.strided


class PlainCall:
    """A plain call of a layer, prepared for inputs of one shape, strides and dtype.

    Args:
        x: an input `[N, C, *S]`, dense.
        weight, bias: `[C]`.
        running: running mean `[C]`, running variance `[C]`, and the number of batches, one integer.
        training: whether the batch's own statistics normalize it, and move the running ones.
        eps: added to var.
        momentum: fraction of a batch in the running statistics, 0..1.
        activation: its name, or None.
    """

    __slots__ = (
        "_addresses",
        "_backward",
        "_dtype",
        "_forward",
        "_learned",
        "_moved",
        "_real",
        "_shape",
        "_stride",
        "_template",
        "activation",
        "eps",
        "momentum",
        "tensors",
        "training",
    )

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor, Tensor, Tensor],
        *,
        training: bool,
        eps: float,
        momentum: float,
        activation: str | None,
    ) -> None:
        self._shape, self._stride, self._dtype = kind = x.shape, x.stride(), x.dtype
        self.activation, self.eps, self.momentum, self.training = activation, eps, momentum, training
        self._forward = prepare(*kind, False, None, activation, "forward" if training else "evaluate")
        self._backward = prepare(*kind, False, None, activation, "backward")
        self.tensors = (weight, bias, *running)
        self._learned = weight.dtype
        self._addresses = tuple(tensor.data_ptr() for tensor in self.tensors)
        self._moved = list(running) if training else []
        args = copied(self._forward.template)
        args.weight, args.bias, args.running_mean, args.running_var, args.batches = self._addresses
        # Parameters of 16 bits are widened anew in each run.
        self._real = None if weight.dtype is self._forward.real else self._forward.real
        args.eps, args.momentum = eps, momentum
        self._template = bytes(args)

    @property
    def is_dense(self) -> bool:
        """Returns whether there are kernels for the layout of the input."""
        return self._forward.is_dense

    def takes(
        self,
        x: Tensor,
        residual: Tensor | None,
        parameters: Mapping[str, Tensor | None],
        buffers: Mapping[str, Tensor | None],
    ) -> bool:
        """Returns whether an input is of the same kind, and the layer's tensors are where they were.

        A tensor whose `.data` was replaced by another view that begins at the same address is not noticed.
        """
        weight, bias, mean, var, batches = self.tensors
        at_weight, at_bias, at_mean, at_var, at_batches = self._addresses
        try:
            return (
                type(x) is Tensor
                and x.is_cpu
                and x.layout is _strided
                and x.dtype is self._dtype
                and x.shape == self._shape
                and x.stride() == self._stride
                and not x.is_neg()
                and parameters["weight"] is weight
                and parameters["bias"] is bias
                and buffers["running_mean"] is mean
                and buffers["running_var"] is var
                and buffers["num_batches_tracked"] is batches
                and weight.dtype is self._learned
                and bias.dtype is self._learned
                and weight.data_ptr() == at_weight
                and bias.data_ptr() == at_bias
                and mean.data_ptr() == at_mean
                and var.data_ptr() == at_var
                and batches.data_ptr() == at_batches
                and not mean.requires_grad
                and not var.requires_grad
                and (residual is None or self.is_alike(residual))
            )
        except (KeyError, RuntimeError):  # attributes in place of buffers; a nested x, which has no shape
            return False

    def is_alike(self, residual: Tensor) -> bool:
        """Returns whether a residual has the shape, strides and dtype of the input, and memory of its own."""
        return (
            type(residual) is Tensor
            and residual.dtype is self._dtype
            and residual.is_cpu
            and residual.layout is _strided
            and not residual.is_nested
            and residual.shape == self._shape
            and residual.stride() == self._stride
            and shows_values(residual)
        )

    def forward(self, x: Tensor, residual: Tensor | None, keeps: bool = True) -> tuple[Tensor, Tensor | None]:
        """Returns y and the statistics that normalized it, in the form of the engine; None if not kept.

        Raises:
            RuntimeError: x has no memory: it is a ZeroTensor, or a transform's wrapper.
        """
        prepared, args = self._forward, copied(self._template)
        args.x = address = x.data_ptr()
        if not address:
            raise RuntimeError("a ZeroTensor has no memory")
        y = huge_pages.empty_like(x) if prepared.is_huge else _empty_like(x)
        args.y = y.data_ptr()
        statistics = None
        if keeps or self.training or not prepared.is_small:
            statistics = EMPTY.new_empty(prepared.statistics)
            args.statistics = statistics.data_ptr()
        if prepared.scratch:
            scratch = EMPTY.new_empty(prepared.scratch)
            args.scratch = scratch.data_ptr()
        if residual is not None:
            args.residual = residual.data_ptr()
        if self._real is not None:
            weight, bias = self.tensors[0].to(self._real), self.tensors[1].to(self._real)
            args.weight, args.bias = weight.data_ptr(), bias.data_ptr()
        prepared.run(args)
        if self._moved:
            increment_version(self._moved)
        return y, statistics

    def is_as_saved(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor,
    ) -> bool:
        """Returns whether tensors are laid out as those that were saved: hooks may return others."""
        return (
            x.stride() == self._stride
            and x.dtype is self._dtype
            and weight.dtype is self._learned
            and weight.stride() == (1,)
            and statistics.dtype is torch.float64
            and statistics.stride() == (1,)
            and (bias is None or (bias.dtype is self._learned and bias.stride() == (1,)))
            and (residual is None or (residual.stride() == self._stride and residual.dtype is self._dtype))
        )

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns dx, dweight, dbias and dresidual; bias and residual are needed behind an activation."""
        prepared, args = self._backward, copied(self._backward.template)
        dtype = weight.dtype
        if self._real is not None:
            weight, bias = weight.to(self._real), None if bias is None else bias.to(self._real)
        if dy.stride() != self._stride or dy.dtype is not self._dtype or dy.is_neg() or not dy.data_ptr():
            dy = _empty_like(x).copy_(dy)
        dx = huge_pages.empty_like(x) if prepared.is_huge else _empty_like(x)
        dweight, dbias = _empty_like(weight), _empty_like(weight)
        args.x, args.dy, args.dx, args.weight = x.data_ptr(), dy.data_ptr(), dx.data_ptr(), weight.data_ptr()
        args.statistics, args.dweight, args.dbias = (
            statistics.data_ptr(),
            dweight.data_ptr(),
            dbias.data_ptr(),
        )
        args.constant = not self.training
        if prepared.scratch:
            scratch = EMPTY.new_empty(prepared.scratch)
            args.scratch = scratch.data_ptr()
        if bias is not None:
            args.bias = bias.data_ptr()
        dresidual = None
        if residual is not None:
            dresidual = huge_pages.empty_like(x) if prepared.is_huge else _empty_like(x)
            args.residual, args.dresidual = residual.data_ptr(), dresidual.data_ptr()
        prepared.run(args)
        if self._real is not None:
            dweight, dbias = dweight.to(dtype), dbias.to(dtype)
        return dx, dweight, dbias, dresidual
