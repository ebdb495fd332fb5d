"""The expected answer of a call, and its comparison with the actual one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm import reference
from tests.support.cases import KINKS
from tests.support.compare import as_array
from tests.support.oracle import Expected, Options, Past, Values, expected_of

from .allowed import WIDE, Allowed, allowed_for, assert_within
from .calls import Call, Tensors, mask_that_applies


class Answer(NamedTuple):
    """The reference's, the errors that are allowed, and the cotangent that it is for, in the dtype of y."""

    expected: Expected
    allowed: Allowed
    dy: Tensor
    dtype: torch.dtype


class Found(NamedTuple):
    """Results of our call; None where there is none."""

    y: Tensor
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


def options_of(call: Call) -> Options:
    """Return what the reference is told of a call of a layer."""
    return Options(
        call.policy,
        call.training,
        call.eps,
        call.momentum_used,
        call.activation,
        call.nonfinite,
        call.small_batch,
    )


def answer_to(call: Call, tensors: Tensors, options: Options, past: Past) -> Answer:
    """Return the reference's answer to a call that is not refused."""
    x, residual = tensors.x, tensors.residual
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mask = mask_that_applies(call, tensors)
    dy = tensors.dy.to(dtype)
    arrays = [None if t is None else as_array(t) for t in (x, tensors.weight, tensors.bias, residual)]
    counted = None if mask is None else mask.numpy()

    def of(dy: Tensor) -> tuple[Expected, Allowed]:
        values = Values(*arrays, as_array(dy), counted)
        expected = expected_of(values, past, options)
        slope = reference.ACTIVATIONS[options.activation].derivative(expected.z)
        keep = True if counted is None else counted[:, None]
        dz = np.where(keep, values.dy * slope, 0.0)
        return expected, allowed_for(values, expected, dz, dtype, options.activation)

    with np.errstate(all="ignore"):
        expected, allowed = of(dy)
        near = np.zeros(expected.z.shape, dtype=bool)
        for kink in KINKS.get(options.activation or "", ()):
            near |= np.abs(expected.z - kink) <= 4 * allowed.z + 1e-6
        if near.any():
            dy = dy.masked_fill(torch.from_numpy(near), 0.0)
            expected, allowed = of(dy)
    return Answer(expected, allowed, dy, dtype)


def assert_answer(found: Found, answer: Answer) -> None:
    """Raise unless every value is as near to the reference as it must be.

    Not promised: the activation of an infinite z, and gradients at values that are not finite.
    """
    expected, allowed = answer.expected, answer.allowed
    assert found.y.dtype is answer.dtype
    fine = np.isfinite(expected.z)
    channels = fine.all(axis=(0, *range(2, fine.ndim)))
    compared = [
        ("y", expected.y, allowed.y, np.isfinite(expected.y) | np.isnan(expected.z)),
        ("dx", expected.dx, allowed.dx, fine),
        ("dresidual", expected.dresidual, allowed.dresidual, fine),
        ("dweight", expected.dweight, allowed.dweight, channels),
        ("dbias", expected.dbias, allowed.dbias, channels),
    ]
    if expected.running is not None:
        everywhere, (mean, var) = np.ones_like(channels), expected.running
        # Ghost batches in turn round float64 as many times, in another order.
        compared += [
            ("running_mean", mean, allowed.running_mean + WIDE * np.abs(mean), everywhere),
            ("running_var", var, allowed.running_var + WIDE * np.abs(var), everywhere),
        ]
    for name, wanted, within, where in compared:
        actual = getattr(found, name)
        if actual is not None:
            assert_within(actual, wanted, within, where, what=name)


def bits(tensor: Tensor | None) -> object:
    """Return what tells a tensor from a changed one: its bits; for one without memory, what it is."""
    if tensor is None or tensor.device.type == "meta":
        return None if tensor is None else (tensor.dtype, tensor.shape)
    if tensor.is_sparse:
        return bits(tensor.detach().to_dense())
    return (
        tensor.dtype,
        tensor.shape,
        tensor.requires_grad,
        tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes(),
    )
