"""Defines the functions of `batchnorm.functional`."""

from __future__ import annotations

from torch import Tensor, distributed
from torch._compile import _disable_dynamo
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm.kernels.choose import engine
from batchnorm.kernels.interface import RunningState, wide_dtype
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.policy_config import check_policy

from . import checks, dispatch
from .call import Call
from .collectives.operations import differentiable_gather, numbered, sharing_ranks, timeout_of
from .exported import stock
from .moments import pooled_groups
from .running_stats import moved
from .symbolic import one_node
from .tracing import is_exporting

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
    mask: Tensor | None = None,
    statistics: Policy = Batch(),  # noqa: B008 -- frozen
    axis: int = 1,
) -> Tensor:
    """Normalize each channel; drop-in for `torch.nn.functional.batch_norm`.

        y = activation(weight * (input - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var are the batch's over axes N and S (var biased, ÷ n), and the running statistics
    move in place: running = (1 - momentum) * running + momentum * batch, where the batch variance that enters
    is the unbiased one, ÷ (n - 1). Otherwise mean and var are the running ones. `statistics` names another
    choice.

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
        mask: `[N, *S]` bool, True = the value counts. What is elsewhere has no influence, whatever it is (NaN
            too): y is 0 there, and so are the gradients.
        statistics: which mean and var: `batchnorm.Batch()` or another policy.
        axis: the channel axis of input and residual, if it is not the second; the mask has the other axes.

    Returns:
        y `[N, C, *S]`, in the input's dtype and layout; with a residual, in the promoted dtype of both.

    Raises:
        InputShapeError: (a ValueError and RuntimeError) sizes differ, or one value per channel in training.
        InputTypeError: (a TypeError and RuntimeError) integer input, mixed dtypes or devices.
        OptionError: (a ValueError) eps, activation, axis or policy out of range.

    Differs from torch: mean and variance are centred and wide, so accurate for any |mean|/std; a batch of
    fewer than two values that count leaves the running statistics alone; a 16-bit input takes parameters of
    its own dtype or float32 ones, and running statistics of any floating dtype.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
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
            mask=mask,
            statistics=statistics,
            axis=axis,
        )
        return y
    checks.check_tensor(input)
    check_policy(statistics, running_mean is not None and running_var is not None)
    running = RunningState(running_mean, running_var, momentum=momentum, sequential=statistics.is_sequential)
    groups = statistics.groups(training)
    call = Call(input, weight, bias, residual, mask, activation, eps, groups, running, statistics, training)
    if axis == 1:
        return dispatch.batch_norm(call)
    checks.check_axis(axis, input)
    residual = None if residual is None else residual.movedim(axis, 1)
    return dispatch.batch_norm(call._replace(x=input.movedim(axis, 1), residual=residual)).movedim(1, axis)


@one_node
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
    mask: Tensor | None = None,
    statistics: Policy = Batch(),  # noqa: B008 -- frozen
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Normalize each channel and return the moved running statistics instead of writing to them.

    As `batch_norm`, for `torch.func`: it writes to nothing, so `vmap`, `grad`, `jvp` and `functional_call`
    all go through it.

    Returns:
        (y, running_mean, running_var); a running statistic that was None stays None, and outside training
        both come back as they were. No gradient flows into the running statistics.
    """
    checks.check_tensor(input)
    check_policy(statistics, running_mean is not None and running_var is not None)
    running = RunningState(running_mean, running_var, momentum=momentum, sequential=statistics.is_sequential)
    groups = statistics.groups(training)
    call = Call(input, weight, bias, residual, mask, activation, eps, groups, running, statistics, training)
    mode, exporting = dispatch.mode_of(call), is_exporting()
    dispatch.check(call, mode, exporting=exporting)
    if exporting and dispatch.is_exported_as_stock(call, mode):
        new_mean, new_var = (None if t is None else t.clone() for t in (running_mean, running_var))
        call = call._replace(running=running._replace(mean=new_mean, var=new_var))
        return stock(call, measures=mode.measures, moves=mode.moves), new_mean, new_var
    y, batch, _ = dispatch.normalize(call, mode, exporting=exporting)
    if batch is None or not mode.moves:
        return y, running_mean, running_var
    after = moved(running, batch)
    new_mean, new_var = (
        new if old is None or new is None else new.to(old.dtype)
        for old, new in ((running_mean, after.mean), (running_var, after.var))
    )
    return y, new_mean, new_var


@one_node
def moments(input: Tensor, mask: Tensor | None = None) -> PooledMoments[Tensor]:
    """Return count, mean and centred second moment of each channel.

        mean = Σ x / n        m2 = Σ (x - mean)²        var = m2 / n        var_unbiased = m2 / (n - 1)

    Args:
        input: `[N, C, *S]`, floating, any layout.
        mask: `[N, *S]` bool, True = the value counts.

    Returns:
        count (scalar tensor), mean `[C]` and m2 `[C]`, in float64 (float32 on devices without it). They merge
        by `batchnorm.statistics.moments.merge`.
    """
    checks.check_tensor(input)
    checks.check_input(input)
    checks.check_mask(mask, input)
    count, mean, m2 = engine(input).moments(Call(input.detach(), mask=mask))
    return PooledMoments(count[0], mean[0], m2[0])


@one_node
def normalize_batch(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    statistics: Policy = Batch(),  # noqa: B008 -- frozen
    training: bool = True,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batches: Tensor | None = None,
) -> tuple[Tensor, PooledMoments[Tensor]]:
    """Normalize each channel by the batch, and return its moments: for layers that track their own.

    As `batch_norm`, but it moves nothing, and one value per channel is allowed (var = 0).

    Args:
        statistics: a policy that takes the moments of this process's batch, in this mode.
        training: the mode.
        running_mean, running_var: `[C]`, for a policy that looks at them.
        batches: how many have moved them, one integer; None = many.

    Returns:
        y, and the moments as of `moments`, `[C]`; with a policy that has groups of samples those of each
        group, `[G, C]`, and count `[G, 1]` or a number. No gradient flows into these.
    """
    checks.check_tensor(input)
    groups, running = statistics.groups(training), RunningState(running_mean, running_var, batches)
    call = Call(input, weight, bias, residual, mask, activation, eps, groups, running, statistics, training)
    mode = dispatch.Mode(measures=True, moves=False, needs_two=False, ranks=None, small_batch_fallback=False)
    exporting = is_exporting()
    dispatch.check(call, mode, exporting=exporting)
    y, batch, _ = dispatch.normalize(call, mode, exporting=exporting)
    assert batch is not None
    count, mean, m2 = batch if groups is not None else pooled_groups(batch)
    return y, PooledMoments(count, mean.detach(), m2.detach())


@_disable_dynamo  # no graph holds a process group; this decorator does not import Dynamo
def gather_ranks(values: Tensor, label: str) -> Tensor | None:
    """Gather a tensor over the default process group, for layers that pool moments themselves.

    Args:
        values: floating, of any shape, the same on all ranks; differentiable to any order.
        label: names the layer and the direction to the other ranks, which must give the same name.

    Returns:
        `[R, *values.shape]`, in the order of the ranks; None where there is one process.

    Raises:
        RankError: (a RuntimeError) a rank did not call this layer within the group's own timeout, or called
            another one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    ranks = sharing_ranks(None, timeout_of(distributed.group.WORLD))
    if ranks is None:
        return None
    wide = values.to(wide_dtype(values.device))
    return differentiable_gather(wide, numbered(ranks, values.device), label).to(values.dtype)
