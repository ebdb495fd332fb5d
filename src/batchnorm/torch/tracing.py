"""Tells which torch mode a call runs in: a transform, a backward, a recomputed forward, an export."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_transforming() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is active around this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched_cotangent(dy: Tensor) -> bool:
    """Whether `dy` is a batch of cotangents, of `torch.autograd.grad(is_grads_batched=True)`.

    That vectorizes over the backward alone, by a mechanism older than `torch.func`.
    """
    return torch._C._functorch.is_legacy_batchedtensor(dy)


def is_exporting() -> bool:
    """Whether torch.export, torch.jit.trace or make_fx records this call as operators."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return True
    return not torch.compiler.is_compiling() and get_proxy_mode() is not None


def is_in_backward() -> bool:
    """Whether this thread runs a backward."""
    return torch._C._current_graph_task_id() != -1


def is_recomputed() -> bool:
    """Whether this forward runs within a backward, because activation checkpointing repeats it.

    Its batch has moved the running statistics already, in the first pass.
    """
    return not torch.compiler.is_compiling() and is_in_backward()


def may_be_recomputed(training: bool) -> bool:
    """Whether activation checkpointing may repeat this forward later, within the backward.

    That is so without gradients in training (`checkpoint(use_reentrant=True)`), or where hooks decide what is
    saved for the backward (`use_reentrant=False`). In evaluation without gradients, which is mostly
    inference, it is so within the forward of an autograd Function.
    """
    if torch.compiler.is_compiling() or is_transforming() or torch.is_inference_mode_enabled():
        return False
    if torch.is_grad_enabled():
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return training or _is_within_function()


def _is_within_function() -> bool:
    """Whether a caller is the forward of an autograd Function: by convention its first argument is `ctx`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            return True
        frame = frame.f_back
    return False


_is_intercepted = torch._C._is_torch_function_mode_enabled
_number_of_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_current_backward = torch._C._current_graph_task_id


def is_watched() -> bool:
    """Whether torch compiles, traces, intercepts, differentiates forward or recomputes the current call.

    It does not look for transforms of `torch.func`: `may_hide_addresses` does.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or _is_intercepted()
        or _number_of_dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or _is_tracing()
        or _current_backward() != -1
    )


def may_hide_addresses(x: Tensor) -> bool:
    """Whether a tensor may have no address: under a transform of `torch.func`, in its wrapper, or all zero.

    A ZeroTensor (`torch._efficientzerotensor`) has no memory.
    """
    return is_transforming() or torch._C._functorch.is_functorch_wrapped_tensor(x) or x._is_zerotensor()
