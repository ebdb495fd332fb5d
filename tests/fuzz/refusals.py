"""Errors that the documentation announces for a call."""

from __future__ import annotations

import math

import torch

from batchnorm.errors import InputShapeError, InputTypeError, NonFiniteError, OptionError
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.running import Running
from batchnorm.statistics.synced import Synced
from tests.support.cases import ACTIVATIONS

from .calls import HALVES, RANKS, Call, Tensors, mask_that_applies


def of_constructor(call: Call) -> set[type[Exception]]:
    """Return the errors that making the layer may raise; empty = it is made."""
    found: set[type[Exception]] = set()
    if call.activation is not None and call.activation not in ACTIVATIONS:
        found.add(OptionError)
    if not call.tracked and (
        call.policy.needs_running or call.nonfinite == "skip" or call.small_batch == "running"
    ):
        found.add(OptionError)
    return found


def measures(call: Call) -> bool:
    """Return whether a call takes moments of its batch."""
    return (call.training or not call.tracked) and not isinstance(call.policy, Running)


def of_call(call: Call, tensors: Tensors, *, ranks: tuple[int, ...] | None = None) -> set[type[Exception]]:
    """Return the errors that the call may raise; empty = it has an answer."""
    ranks = RANKS[call.kind] if ranks is None else ranks
    found = _of_options(call)
    if len(call.shape) not in ranks:
        found.add(InputShapeError)
    if not call.dtype.is_floating_point:
        found.add(InputTypeError)
    if len(call.shape) > 1 and call.channels != call.shape[1] and (call.affine or call.tracked):
        found.add(InputShapeError)
    is_narrow = call.dtype in HALVES and call.parameter_dtype is torch.float32
    if call.affine and call.parameter_dtype != call.dtype and not is_narrow:
        found.add(InputTypeError)
    if _is_too_small(call):
        found.add(InputShapeError)
    found |= {"broadcasts": {InputShapeError}, "dtype": {InputTypeError}, "device": {InputTypeError}}.get(
        call.residual, set()
    )
    found |= _of_mask(call)
    if not found and call.nonfinite == "raise" and call.training and measures(call):
        mask = mask_that_applies(call, tensors)
        keep = torch.ones((), dtype=torch.bool) if mask is None else mask.unsqueeze(1)
        if not torch.where(keep, tensors.x, 0.0).isfinite().all():
            found.add(NonFiniteError)
    return found


def _of_options(call: Call) -> set[type[Exception]]:
    training = call.training or not call.tracked
    return {OptionError} if call.eps < 0 or (call.eps == 0 and training) else set()


def _is_too_small(call: Call) -> bool:
    """Return whether a batch or ghost batch has one value per channel, which is refused."""
    if not measures(call) or len(call.shape) < 2:
        return False
    positions, samples = math.prod(call.shape[2:]), call.shape[0]
    if call.training and call.small_batch == "running" and call.tracked:
        return False
    policy = call.policy.over if isinstance(call.policy, Synced) else call.policy
    if isinstance(policy, Ghost) and call.training and samples:
        samples = min(policy.size, samples % policy.size or policy.size)
    return samples * positions == 1


def _of_mask(call: Call) -> set[type[Exception]]:
    found: set[type[Exception]] = set()
    if call.lengths != "none":
        if call.mask != "none" or len(call.shape) != 3:
            found.add(OptionError)
        found |= {
            "negative": {OptionError} if call.shape and call.shape[0] else set(),
            "long": {OptionError} if call.shape and call.shape[0] else set(),
            "count": {InputShapeError},
            "dtype": {InputTypeError},
            "fitting": set(),
        }[call.lengths]
    return found | {
        "shape": {InputShapeError},
        "channels": {InputShapeError} if len(call.shape) > 1 or call.shape else set(),
        "dtype": {InputTypeError},
        "device": {InputTypeError},
    }.get(call.mask, set())
