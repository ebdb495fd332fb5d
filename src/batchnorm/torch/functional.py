"""Batch normalization as functions, `batchnorm.functional`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.errors import OptionError
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import RunningStatistics, wide_dtype
from batchnorm.statistics.batch import running_update
from batchnorm.statistics.moments import PooledMoments

from . import checks, compiled, differentiable, operators
from .differentiable import Normalized

__all__ = ["batch_norm", "moments", "normalize_batch", "pure_batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalize each channel; drop-in for `torch.nn.functional.batch_norm`.

        y = activation(weight * (input - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var are the batch's over axes N and S (var biased, ÷ n), and the running statistics
    move in place: running = (1 - momentum) * running + momentum * batch, where the batch variance that enters
    is the unbiased one, ÷ (n - 1). Otherwise mean and var are the running ones.

    Args:
        input: `[N, C, *S]`, floating.
        running_mean: `[C]`, or None: not tracked (training only).
        running_var: `[C]`, or None: not tracked (training only).
        weight: `[C]`, γ; None = 1.
        bias: `[C]`, β; None = 0.
        training: normalize by the batch, and move the running statistics.
        momentum: fraction 0..1 of the batch in the running statistics; a tensor of one value also serves.
        eps: added to var; positive in training.
        residual: `[N, C, *S]`, added before the activation.
        activation: relu, relu6, leaky_relu (slope 0.01), silu, gelu (erf), hardswish, sigmoid, tanh,
            elu (α = 1), or None.

    Returns:
        y `[N, C, *S]`, in the input's dtype and layout; with a residual, in the promoted dtype of both.

    Raises:
        InputShapeError: (a ValueError and RuntimeError) sizes differ, or one value per channel in training.
        InputTypeError: (a TypeError and RuntimeError) integer input, mixed dtypes or devices.
        OptionError: (a ValueError) eps or activation out of range.

    Differs from torch: mean and variance are centred and wide, so accurate for any |mean|/std; an empty batch
    leaves the running statistics alone; a 16-bit input takes parameters of its own dtype or float32 ones, and
    running statistics of any floating dtype.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    return tracked_batch_norm(
        input,
        running_mean,
        running_var,
        None,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
    )


def tracked_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """As `batch_norm`, and counts the batch in `batches`, an integer tensor of one value."""
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):
        y: Tensor = handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            activation=activation,
        )
        if batches is not None:
            batches.add_(1)
        return y
    _check(input, running_mean, running_var, weight, bias, training, eps, residual, activation)
    if _is_exporting():
        y = _stock(
            input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
        )
        if batches is not None:
            batches.add_(1)
        return y
    running = None
    if training and not isinstance(momentum, Tensor) and not (running_mean is None and running_var is None):
        running = RunningStatistics(running_mean, running_var, batches, momentum)
    y, mean, m2, moved = _normalize(
        input, running_mean, running_var, weight, bias, training, eps, residual, activation, running
    )
    if training and not moved:
        _write((running_mean, running_var), _moved(running_mean, running_var, mean, m2, input, momentum))
        if batches is not None:
            batches.add_(1)  # last: a call that raised has counted nothing
    return y


def pure_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalize each channel and return the moved running statistics instead of writing to them.

    As `batch_norm`, for `torch.func`: it writes to nothing, so `vmap`, `grad`, `jvp` and `functional_call`
    all go through it.

    Returns:
        (y, running_mean, running_var); a running statistic that was None stays None, and outside training
        both come back as they were. No gradient flows into the running statistics.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps, residual, activation)
    if _is_exporting():
        new_mean, new_var = (None if t is None else t.clone() for t in (running_mean, running_var))
        y = _stock(input, new_mean, new_var, weight, bias, training, momentum, eps, residual, activation)
        return y, new_mean, new_var
    y, mean, m2, _ = _normalize(
        input, running_mean, running_var, weight, bias, training, eps, residual, activation
    )
    moved = _moved(running_mean, running_var, mean, m2, input, momentum)
    new_mean, new_var = (
        new if old is None or new is None else new.to(old.dtype)
        for old, new in zip((running_mean, running_var), moved, strict=True)
    )
    return y, new_mean, new_var


def moments(input: Tensor, mask: Tensor | None = None) -> PooledMoments:
    """Return count, mean and centred second moment of each channel.

        mean = Σ x / n        m2 = Σ (x - mean)²        var = m2 / n        var_unbiased = m2 / (n - 1)

    Args:
        input: `[N, C, *S]`, floating, any layout.
        mask: `[N, *S]` bool, True = the value counts.

    Returns:
        count (scalar tensor), mean `[C]` and m2 `[C]`, in float64 (float32 on devices without it). They merge
        by `batchnorm.statistics.moments.merge`.
    """
    checks.check_input(input, training=False)
    count, mean, m2 = engine(input).moments(input.detach(), mask=mask)
    return PooledMoments(count[0], mean[0], m2[0])


def normalize_batch(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, PooledMoments]:
    """Normalize each channel by the batch, and return its moments: for layers that track their own.

    As `batch_norm` in training, without running statistics, and one value per channel is allowed (var = 0).

    Returns:
        y, and the moments as of `moments`, `[C]`; no gradient flows into these.
    """
    checks.check_activation(activation)
    if not checks.is_usual(input, (weight, bias), residual, True, eps):
        checks.check_eps(eps, training=True)
        checks.check_input(input, training=False)
        checks.check_parameter("weight", weight, input)
        checks.check_parameter("bias", bias, input)
        checks.check_residual(residual, input)
    y, mean, m2, _ = _normalize(input, None, None, weight, bias, True, eps, residual, activation)
    assert mean is not None
    assert m2 is not None
    count = input.shape[0] * math.prod(input.shape[2:])
    return y, PooledMoments(count, mean.detach()[0], m2.detach()[0])


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    checks.check_activation(activation)
    is_tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    if not is_tracing and checks.is_usual(
        input, (running_mean, running_var, weight, bias), residual, training, eps
    ):
        return
    checks.check_eps(eps, training)
    if is_tracing:
        return  # sizes are recorded values there, and torch's own operator checks them
    checks.check_input(input, training)
    checks.check_running(running_mean, running_var, input, training)
    checks.check_parameter("weight", weight, input)
    checks.check_parameter("bias", bias, input)
    checks.check_residual(residual, input)


def _normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    running: RunningStatistics | None = None,
) -> Normalized:
    """Take the path that this call needs: compiled, transformed, or eager; only this one moves `running`."""
    if residual is not None:
        input = input.to(torch.promote_types(input.dtype, residual.dtype))
    given = None
    if not training and running_mean is not None and running_var is not None:
        given = _given(running_mean, running_var, eps, input)
    if input.dim() < 2:
        return Normalized(_behind(input.clone(), residual, activation), None, None)
    if differentiable.is_transforming():
        return differentiable.normalize(input, weight, bias, residual, activation, eps, given)
    if torch.compiler.is_compiling():
        return compiled.apply(input, weight, bias, residual, activation, eps, given)
    return operators.apply(input, weight, bias, residual, activation, eps, given, running)


def _given(running_mean: Tensor, running_var: Tensor, eps: float, input: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and rstd, `[1, C]`; copies, so that autograd never holds a buffer that will move."""
    if not (differentiable.is_transforming() or torch.compiler.is_compiling()):
        found = engine(input).given(running_mean, running_var, eps)
        if found is not None:
            return found
    wide = wide_dtype(running_mean.device)
    mean = running_mean.detach().to(wide, copy=True)
    return mean.unsqueeze(0), (running_var.detach().to(wide) + eps).rsqrt().unsqueeze(0)


def _moved(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    input: Tensor,
    momentum: float | Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the running statistics after this batch, wide; as they were where none were taken of it."""
    tracked = running_mean is not None or running_var is not None
    if not tracked or mean is None or m2 is None or input.numel() == 0:
        return running_mean, running_var
    count = input.shape[0] * math.prod(input.shape[2:])
    batch = (mean.detach()[0], m2.detach()[0].div(count - 1))
    running_mean, running_var = (
        None if old is None else running_update(old.detach().to(new.dtype), new, momentum)
        for old, new in zip((running_mean, running_var), batch, strict=True)
    )
    return running_mean, running_var


def _write(running: tuple[Tensor | None, ...], moved: tuple[Tensor | None, ...]) -> None:
    """Write the moved statistics into the running ones: all of them, or none where one cannot be written."""
    written: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for old, new in zip(running, moved, strict=True):
                if old is not None and new is not None and new is not old:
                    before = old.clone()
                    old.copy_(new)
                    written.append((old, before))
    except RuntimeError as error:
        for old, before in written:
            old.copy_(before)
        if not differentiable.is_transforming():
            raise
        raise OptionError(
            "torch.func cannot write to running statistics that it does not transform: pass the buffers as "
            "arguments (functional_call), use functional.pure_batch_norm, or track_running_stats=False"
        ) from error


def _is_exporting() -> bool:
    return torch.compiler.is_exporting() or bool(torch.jit.is_tracing())  # type: ignore[no-untyped-call]


def _stock(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Emit torch's own operators, which every exporter knows."""
    if (
        running_mean is not None and running_mean.dtype != input.dtype
    ):  # its 16-bit form wants float32 parameters
        weight, bias = (None if t is None else t.to(running_mean.dtype) for t in (weight, bias))
    if isinstance(
        momentum, Tensor
    ):  # torch's operator takes a number: read the batch off it, and move by hand
        mean, var = (None if t is None else torch.zeros_like(t) for t in (running_mean, running_var))
        y = F.batch_norm(input, mean, var, weight, bias, training, 1.0, eps)
        moved = (
            None if old is None or new is None else running_update(old, new, momentum)
            for old, new in ((running_mean, mean), (running_var, var))
        )
        _write((running_mean, running_var), tuple(moved))
    else:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _behind(y, residual, activation)


def _behind(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    y = y if residual is None else y + residual
    return y if activation is None else ACTIVATIONS[activation].value(y)
