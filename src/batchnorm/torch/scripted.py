"""The stock layer that `torch.jit.script` compiles in place of ours, which it cannot read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from batchnorm.errors import OptionError

if TYPE_CHECKING:
    from .layers import _Layer

_STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRACE = "use torch.jit.trace or torch.export"
# Remedies, where setting the option of a copy to the usual value is none, or not the simplest.
_REMEDIES = {
    "activation": f"{_TRACE}, or script a copy after batchnorm.revert(copy), where it is a module",
    "statistics": f"{_TRACE}, or for evaluation script a copy after batchnorm.convert(copy, Batch())",
    "domains": f"{_TRACE} within batchnorm.domain",
}


def stock_twin(layer: _Layer) -> nn.Module:
    """Return a stock layer with the tensors, hooks and modes of `layer`.

    Raises:
        OptionError: no stock layer computes what this one does.
    """
    from .layers import OPTIONS, OURS, _Layer, beyond_stock

    stock = next((kind for kind in _STOCK if isinstance(layer, kind)), None)
    if stock is None or type(layer).forward is not _Layer.forward:
        raise _refused(layer, f"a {type(layer).__name__}", f"no stock layer computes the same: {_TRACE}")
    for name, value in beyond_stock(layer).items():
        usual = f"{_TRACE}, or script a copy with layer.{name} = {OPTIONS[name]!r}"
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
    twin.__dict__.update({name: value for name, value in vars(layer).items() if name not in OURS})
    twin._buffers = {name: buffer for name, buffer in layer._buffers.items() if name != "skipped"}
    return twin


def _refused(layer: _Layer, what: str, remedy: str) -> OptionError:
    return OptionError(f"torch.jit.script cannot compile {what}: {remedy}", type(layer).__name__)
