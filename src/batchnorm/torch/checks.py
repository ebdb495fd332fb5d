"""Checks the arguments of a call before anything is computed or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentTypeError, InputShapeError, InputTypeError, OptionError
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.layout import shows_values
from batchnorm.statistics.batch import Batch

from .call import HALVES, Call
from .quantization import REVERT_FIRST

# dtype of an input -> of the arithmetic, which running statistics have too.
_REALS = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
_Parameter, _strided, _int64 = nn.Parameter, torch.strided, torch.int64


def is_plain(call: Call) -> bool:
    """Whether a call is plain: common tensors on a CPU, normalized by the batch or by running statistics.

    The kernels for CPUs take such a call as it is, and no other check is needed. The conditions are written
    out here, because a dozen checks take longer than the kernel of a small layer.
    """
    x, weight, bias, _, mask, activation, eps, _, running, policy, training, nonfinite, _, _ = call
    if (
        type(x) is not Tensor
        or not x.is_cpu
        or x.layout is not _strided
        or x.is_nested
        or not shows_values(x)
        or type(policy) is not Batch
        or mask is not None
        or weight is None
        or bias is None
        or eps <= 0.0
        or (activation is not None and activation not in ACTIVATIONS)
    ):
        return False
    shape, dtype = x.shape, x.dtype
    real = _REALS.get(dtype)
    if len(shape) < 2 or shape[0] < 1 + training or not x.numel():
        return False
    channels, learned = shape[1], weight.dtype
    mean, var, batches, momentum, _, _, _, accumulator, warm_start = running
    if learned is not bias.dtype or (learned is not real and learned is not dtype):
        return False
    if weight.grad_fn is not None or bias.grad_fn is not None:  # a layer would keep their graph alive
        return False
    for vector, wanted in ((weight, learned), (bias, learned), (mean, real), (var, real)):
        if not (
            (type(vector) is _Parameter or type(vector) is Tensor)
            and vector.dtype is wanted
            and vector.is_cpu
            and vector.numel() == channels
            and vector.stride() == (1,)
            and shows_values(vector)
        ):
            return False
    if not (
        type(momentum) is float
        and accumulator is None
        and not warm_start
        and type(batches) is Tensor
        and batches.dtype is _int64
        and batches.is_cpu
        and not mean.requires_grad  # type: ignore[union-attr]
        and not var.requires_grad  # type: ignore[union-attr]
    ):
        return False
    return not training or not (
        nonfinite != "propagate"
        or mean.is_inference()  # type: ignore[union-attr]
        or var.is_inference()  # type: ignore[union-attr]
        or batches.is_inference()
    )


def check_module(model: object, verb: str) -> nn.Module:
    """Return a torch model; for anything else raise ArgumentTypeError, which says what to pass instead."""
    if isinstance(model, nn.Module):
        return model
    what, remedy = shown_type(model), ""
    if isinstance(model, type):
        what, remedy = f"the class {model.__name__}", f": pass an instance, {model.__name__}(...)"
    elif isinstance(model, Mapping):
        is_state = any(isinstance(value, Tensor) for value in model.values())
        remedy = ": load it into a model first" if is_state else ": pass each model, or an nn.ModuleDict"
    elif isinstance(model, list | tuple | set):
        remedy = f": call {verb} for each, or pass an nn.ModuleList"
    elif type(model).__module__.partition(".")[0] == "keras":
        what, remedy = f"a Keras {type(model).__name__}", ": batchnorm.keras has the verbs for Keras"
    raise ArgumentTypeError(f"{verb} takes a model or layer of torch (nn.Module); got {what}{remedy}")


def shown_type(value: object) -> str:
    """Return the type of a value with its article, for errors: `an int`, `a list`."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def not_a_tensor(input: object) -> InputTypeError:
    """Return the error for an input that is not a tensor."""
    remedy = ": torch.as_tensor makes one of it" if hasattr(input, "__array__") else ""
    return InputTypeError(f"expected a tensor, got {shown_type(input)}{remedy}")


def check_tensor(input: object) -> None:
    """Raise InputTypeError unless `input` is a tensor."""
    if not isinstance(input, Tensor):
        raise not_a_tensor(input)


def check_activation(activation: str | None) -> None:
    """Raise OptionError unless `activation` is None or the name of a fused activation."""
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise OptionError(f"activation must be None or one of {known}; got {activation!r}")


def check_small_batch(value: object, tracked: bool) -> None:
    """Raise OptionError unless `small_batch` is valid; "running" needs running statistics."""
    check_choice("small_batch", value, ("raise", "running"))
    if value == "running" and not tracked:
        raise _untracked('small_batch="running" normalizes by running statistics')


def check_nonfinite(value: object, tracked: bool) -> None:
    """Raise OptionError unless `nonfinite` is valid; "skip" needs running statistics."""
    check_choice("nonfinite", value, ("propagate", "skip", "raise"))
    if value == "skip" and not tracked:
        raise _untracked('nonfinite="skip" leaves running statistics as they are')


def check_warm_start(value: object, tracked: bool) -> None:
    """Raise OptionError unless `warm_start` is True or False; True needs running statistics."""
    if not isinstance(value, bool):
        raise OptionError(f"warm_start must be True or False; got {value!r}")
    if value and not tracked:
        raise _untracked("warm_start=True begins running statistics with the first batch's")


def _untracked(what: str) -> OptionError:
    """Return the error for an option of a layer that has no running statistics."""
    return OptionError(f"{what}, and this layer has none: make it with track_running_stats=True")


def check_eps(eps: float, training: bool) -> None:
    """Raise OptionError unless eps > 0 in training, eps >= 0 otherwise."""
    if training and eps <= 0.0:
        raise OptionError(
            f"batch_norm eps must be positive during training, but got {eps}: the default is 1e-5"
        )
    if eps < 0.0:
        raise OptionError(f"batch_norm eps must be non-negative, but got {eps}: the default is 1e-5")


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raise OptionError unless an option has one of the known values."""
    if value not in known:
        words = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise OptionError(f"{name} must be {words}; got {value!r}")


def check_axis(axis: int, input: Tensor) -> None:
    """Raise OptionError unless `axis` is an axis of the input other than the first."""
    if not isinstance(axis, int) or not -input.dim() < axis < input.dim() or axis == 0:
        raise OptionError(
            f"axis must be one of the input's {input.dim()} dimensions, and not the first, which is the "
            f"batch; got {axis!r}"
        )


def check_input(input: Tensor) -> None:
    """Raise unless `input` is dense, floating and has channels."""
    if input.is_quantized:
        raise InputTypeError(f"the input is quantized, {_dtype(input)}; {REVERT_FIRST}")
    check_dense("the input", input)
    if not input.is_floating_point():
        raise InputTypeError(f"expected a floating-point input, got {_dtype(input)}: {_to_floating(input)}")
    if input.dim() < 2:
        if input.numel() == 0:  # the stock function accepts an empty 1-D tensor, too
            return
        raise InputShapeError(
            f"expected an input [N, C, ...] of two or more dimensions, got shape {list(input.shape)}: "
            "add a batch axis with .unsqueeze(0)"
        )


def _to_floating(input: Tensor) -> str:
    """Return the remedy for a tensor that is not floating-point."""
    if input.is_complex():
        return "normalize .real and .imag by a layer each, or torch.view_as_real of it as twice the channels"
    return "convert it with .float()"


def is_mkldnn(tensor: Tensor) -> bool:
    """Whether a tensor has MKL-DNN's opaque layout."""
    return tensor.layout is torch._mkldnn  # type: ignore[attr-defined]


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise InputTypeError for nested, sparse and MKL-DNN tensors."""
    if tensor.is_nested:
        raise InputTypeError(
            f"{name} is a nested tensor ({tensor.layout}), which has no axis of channels: normalize "
            "its .values() [values, C] (layout=torch.jagged), or pad it with torch.nested.to_padded_tensor "
            "to [N, C, L] and pass the lengths of its sequences as lengths="
        )
    if is_mkldnn(tensor):
        raise InputTypeError(f"{name} is an MKL-DNN tensor: pass its .to_dense()")
    if tensor.layout is not torch.strided:
        raise InputTypeError(
            f"{name} is a sparse tensor ({tensor.layout}), and its zeros count too: pass its .to_dense(), or "
            "normalize its .values() where they are [values, C]"
        )


def is_single(input: Tensor) -> bool:
    """Whether an input has one value per channel."""
    return input.dim() > 1 and input.shape[0] * math.prod(input.shape[2:]) == 1


def too_few(input: Tensor, remedies: str) -> InputShapeError:
    """Return the error for an input of one value per channel, which begins with torch's own text."""
    return InputShapeError(
        f"Expected more than 1 value per channel when training, got input size {input.size()}: "
        f"one value has no variance; {remedies}"
    )


def check_groups(input: Tensor, size: int, smallest: int, remedies: str) -> None:
    """Raise unless the smallest of the groups of `size` samples has more than one value per channel."""
    if smallest == 1:
        raise InputShapeError(
            f"Expected more than 1 value per channel when training, got input size {input.size()} in ghost "
            f"batches of {size}, of which the last has one value, and so no variance; use another size, or "
            f"{remedies}"
        )


def check_mask(mask: Tensor | None, input: Tensor) -> None:
    """Raise unless `mask` is None or bool, `[N, *S]` for an input `[N, C, *S]`, on its device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = _dtype(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputTypeError(f"mask must be a bool tensor, True = the value counts; got {got}")
    wanted = (*input.shape[:1], *input.shape[2:])
    if mask.shape != wanted:
        raise InputShapeError(
            f"mask must have shape {list(wanted)} for an input of shape {list(input.shape)}, which is that "
            f"without the channels; got {list(mask.shape)}"
        )
    if mask.device != input.device:
        raise InputTypeError(f"mask is on {mask.device} and the input on {input.device}: move one of them")


def mask_of_lengths(lengths: Tensor, input: Tensor) -> Tensor:
    """Return the mask `[N, L]` of sequences with `lengths` `[N]`, for an input `[N, C, L]`; or raise."""
    if input.dim() != 3:
        raise OptionError(
            f"lengths are those of sequences, inputs [N, C, L]; got an input of shape {list(input.shape)}: "
            "pass mask= instead"
        )
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        got = _dtype(lengths) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise InputTypeError(f"lengths must be a tensor of integers, [N]; got {got}")
    if lengths.shape != input.shape[:1]:
        raise InputShapeError(
            f"lengths must have one number per sample, [{input.shape[0]}]; got shape {list(lengths.shape)}"
        )
    lengths = lengths.to(input.device)
    # Not checked on a GPU, where the host would have to wait.
    if input.is_cpu and not torch.compiler.is_compiling() and lengths.numel():
        least, most = lengths.min().item(), lengths.max().item()
        if least < 0 or most > input.shape[2]:
            raise OptionError(
                f"lengths must be 0 to {input.shape[2]}, the length of the input; got {least} to {most}"
            )
    return torch.arange(input.shape[2], device=input.device) < lengths.unsqueeze(1)


def check_vector(name: str, vector: Tensor | None, input: Tensor) -> None:
    """Raise unless `vector` is None or one value per channel of `input`, `[C]`, on the same device."""
    if vector is None:
        return
    channels = input.shape[1] if input.dim() > 1 else 0
    if vector.numel() != channels:
        raise InputShapeError(
            f"{name} should contain {channels} elements not {vector.numel()}: the input of shape "
            f"{list(input.shape)} has {channels} channels (axis 1)"
        )
    if vector.dim() != 1:  # another shape of the same size would broadcast along another axis
        raise InputShapeError(
            f"{name} has shape {list(vector.shape)}, and must have one axis, of {channels}: .flatten() it"
        )
    if vector.device != input.device:
        raise InputTypeError(
            f"{name} is on {vector.device} and the input on {input.device}: "
            "move the model or the input with .to()"
        )


def check_running(
    running_mean: Tensor | None, running_var: Tensor | None, input: Tensor, *, given: bool
) -> None:
    """Raise unless both running statistics fit the input; `given`: the call normalizes by them."""
    if not given and (running_mean is None) is not (running_var is None):
        raise OptionError(
            "running_mean and running_var must either both be None or neither be None; got "
            f"{'running_var' if running_mean is None else 'running_mean'} alone"
        )
    if given and (running_mean is None or running_var is None):
        raise OptionError(
            "expected running_mean and running_var outside training, got None: "
            "pass training=True to normalize by the batch's own statistics"
        )
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        check_vector(name, running, input)
        if running is not None and not running.is_floating_point():
            raise InputTypeError(f"{name} is {_dtype(running)}: running statistics are floating-point")


def check_constant(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise InputTypeError, as torch does, where a gradient of running statistics would be needed."""
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and running.requires_grad and torch.is_grad_enabled():
            raise InputTypeError(
                f"{name} requires grad, and batch_norm is not differentiable with respect to it: call "
                f".requires_grad_(False) on it, or pass {name}.detach()"
            )


def check_parameter(name: str, parameter: Tensor | None, input: Tensor) -> None:
    """As `check_vector`; the dtype must be the input's, or float32 for a 16-bit input."""
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
    check_dense("residual", residual)
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
    """Return the name of a tensor's dtype, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")
