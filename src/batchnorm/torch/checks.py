"""What an input must be before anything is computed; a call that raises has changed nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.errors import InputShapeError, InputTypeError, OptionError
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.statistics.policy import Policy

HALVES = (torch.float16, torch.bfloat16)


def is_usual(
    input: Tensor,
    vectors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether all is as it mostly is, float32 on a CPU: then nothing else need be checked but the activation.

    One look in place of a dozen calls, which took longer than the kernel of a small layer.
    """
    shape = input.shape
    if len(shape) < 2 or input.dtype is not torch.float32 or not input.is_cpu or eps <= 0.0:
        return False
    if (shape[0] < 2) if training else (vectors[0] is None or vectors[1] is None):
        return False
    for vector in vectors:
        if vector is not None and not (
            vector.dtype is torch.float32 and vector.is_cpu and vector.numel() == shape[1]
        ):
            return False
    return residual is None or (
        residual.dtype is torch.float32 and residual.is_cpu and residual.shape == shape
    )


def check_activation(activation: str | None) -> None:
    """Raise OptionError unless `activation` is None or the name of a fused activation."""
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise OptionError(f"activation must be None or one of {known}; got {activation!r}")


def check_policy(policy: object, tracked: bool) -> None:
    """Raise OptionError unless `policy` is one that a layer takes; some need running statistics."""
    if not isinstance(policy, Policy):
        got = f"a {type(policy).__name__}" if isinstance(policy, Tensor) else repr(policy)
        raise OptionError(f"statistics must be batchnorm.Batch() or batchnorm.Running(); got {got}")
    if policy.needs_running and not tracked:
        raise OptionError(
            f"statistics={policy} uses running statistics, and this layer has none: "
            "make it with track_running_stats=True"
        )


def check_eps(eps: float, training: bool) -> None:
    """Raise OptionError unless eps > 0 in training, eps >= 0 otherwise."""
    if training and eps <= 0.0:
        raise OptionError(
            f"batch_norm eps must be positive during training, but got {eps}: the default is 1e-5"
        )
    if eps < 0.0:
        raise OptionError(f"batch_norm eps must be non-negative, but got {eps}: the default is 1e-5")


def check_input(input: Tensor, training: bool) -> None:
    """Raise unless `input` is floating, has channels, and in training more than one value per channel."""
    if not input.is_floating_point():
        raise InputTypeError(
            f"expected a floating-point input, got {_dtype(input)}: convert it with .float()"
        )
    if input.dim() < 2:
        if input.numel() == 0:  # as the stock function: a 1-D tensor of no values passes
            return
        raise InputShapeError(
            f"expected an input [N, C, ...] of two or more dimensions, got shape {list(input.shape)}: "
            "add a batch axis with .unsqueeze(0)"
        )
    if training and input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise InputShapeError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}: "
            "one value has no variance; use a larger batch, drop the last batch of one "
            "(DataLoader(drop_last=True)), or call .eval() on this layer"
        )


def check_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
    """Raise unless `vector` is None or one floating value per channel of `input`, on the same device."""
    if vector is None:
        return
    channels = input.shape[1] if input.dim() > 1 else 0
    if vector.numel() != channels:
        raise InputShapeError(
            f"{name} should contain {channels} elements not {vector.numel()}: the input of shape "
            f"{list(input.shape)} has {channels} channels (axis 1)"
        )
    if vector.device != input.device:
        raise InputTypeError(
            f"{name} is on {vector.device} and the input on {input.device}: "
            "move the model or the input with .to()"
        )


def check_running(
    running_mean: Tensor | None, running_var: Tensor | None, input: Tensor, training: bool
) -> None:
    """Raise unless both running statistics fit the input; outside training both must be there."""
    if not training and (running_mean is None or running_var is None):
        raise OptionError(
            "expected running_mean and running_var outside training, got None: "
            "pass training=True to normalize by the batch's own statistics"
        )
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        check_vector(name, running, input)
        if running is not None and not running.is_floating_point():
            raise InputTypeError(f"{name} is {_dtype(running)}: running statistics are floating-point")


def check_parameter(name: str, parameter: Tensor | None, input: Tensor) -> None:
    """As `check_vector`; besides, the dtype is the input's, or float32 for a 16-bit input."""
    check_vector(name, parameter, input)
    if parameter is None or parameter.dtype == input.dtype:
        return
    if not (input.dtype in HALVES and parameter.dtype == torch.float32):
        raise InputTypeError(
            f"{name} is {_dtype(parameter)} and the input is {_dtype(input)}: "
            "convert one of them with .to(dtype)"
        )


def check_residual(residual: Tensor | None, input: Tensor) -> None:
    """Raise unless `residual` is None or a floating tensor of the input's shape and device."""
    if residual is None:
        return
    if residual.shape != input.shape:
        raise InputShapeError(
            f"residual has shape {list(residual.shape)} and the input {list(input.shape)}: they must be equal"
        )
    if not residual.is_floating_point() or residual.device != input.device:
        raise InputTypeError(
            f"residual is {_dtype(residual)} on {residual.device}, "
            f"the input {_dtype(input)} on {input.device}: it must be floating-point and on the same device"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
