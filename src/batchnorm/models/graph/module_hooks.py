"""Tells whether a module has hooks or a replaced forward, so that it cannot be bypassed."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has any hook around its forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def sees_output(module: nn.Module) -> bool:
    """Whether a hook of the module receives its output or the gradient of it."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_forward_replaced(module: nn.Module) -> bool:
    """Whether `forward` was set on the instance, so that the class no longer tells what it computes."""
    return "forward" in module.__dict__
