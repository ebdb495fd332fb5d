"""Builds the stock layer that `torch.jit.script` compiles in place of ours, which it cannot compile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from batchnorm.errors import OptionError
from batchnorm.statistics.policy import Policy

from .contexts.accumulation import Accumulator
from .contexts.checkpointing import Scope

_STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRACE = "use torch.jit.trace or torch.export"
# Remedies for options that a copy cannot simply reset to the stock value, or where something simpler helps.
_REMEDIES = {
    "activation": f"{_TRACE}, or script a copy after batchnorm.revert(copy), where it is a module",
    "statistics": f"{_TRACE}, or for evaluation script a copy after batchnorm.convert(copy, Batch())",
    "domains": f"{_TRACE} within batchnorm.domain",
}


class ScriptableLayer(Protocol):
    """The attributes of a layer that `stock_twin` reads and does not copy."""

    _buffers: dict[str, Tensor | None]
    _accumulator: Accumulator | None
    _scope: Scope | None

    @property
    def statistics(self) -> Policy:
        """The statistics policy."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input."""


def stock_twin(
    layer: ScriptableLayer,
    *,
    forward: Callable[..., Tensor],
    own: Collection[str],
    options: Mapping[str, Any],
    changed: Mapping[str, Any],
) -> nn.Module:
    """Return a stock layer with the tensors, hooks and modes of `layer`.

    Args:
        layer: one of our layers.
        forward: the forward of our layers; a subclass that overrides it is refused.
        own: names of the attributes that no stock layer has.
        options: the options that no stock layer has, each with the value that computes what stock does.
        changed: those options of `layer` that differ from it.

    Raises:
        OptionError: no stock layer computes what this one does.
    """
    stock = next((kind for kind in _STOCK if isinstance(layer, kind)), None)
    if stock is None or type(layer).forward is not forward:
        raise _refused(layer, f"a {type(layer).__name__}", f"no stock layer computes the same: {_TRACE}")
    for name, value in changed.items():
        usual = f"{_TRACE}, or script a copy with layer.{name} = {options[name]!r}"
        remedy = _REMEDIES.get(name, usual)
        if name == "statistics" and layer.statistics.measures(training=False):
            remedy = f"{_TRACE}: it adapts to each batch in evaluation, which no stock layer does"
        raise _refused(layer, f"a layer with {name}={value!r}", remedy)
    if layer._accumulator is not None or (layer._scope is not None and layer._scope.masked is not None):
        raise _refused(
            layer,
            "a layer within batchnorm.mask or batchnorm.accumulate, which no stock layer heeds",
            "script it outside of the block",
        )
    twin = stock.__new__(stock)
    twin.__dict__.update({name: value for name, value in vars(layer).items() if name not in own})
    twin._buffers = {name: buffer for name, buffer in layer._buffers.items() if name != "skipped"}
    return twin


def _refused(layer: ScriptableLayer, what: str, remedy: str) -> OptionError:
    """Return the error for a layer that cannot be scripted."""
    return OptionError(f"torch.jit.script cannot compile {what}: {remedy}", type(layer).__name__)
