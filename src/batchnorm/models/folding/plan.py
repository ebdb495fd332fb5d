"""Plans the folds of a torch model: what its layers take, and in which words one stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from batchnorm.folding.plan import Neighbour, Planner, Step
from batchnorm.folding.table import Direction
from batchnorm.models.graph.flow import Call, Flow, Value
from batchnorm.models.norms.find import Found
from batchnorm.models.norms.kinds import BatchNormBase

from .affine import affine, own_activation, why_not_affine
from .arithmetic import place_within, why_not_identity, why_not_inputs
from .foldable_layers import absorber_of, inputs_of, outputs_of, why_not


class TorchPlanner(Planner[nn.Module]):
    """Plans for a torch model.

    Args:
        flow: of the model.
        norms: all of them.
        shared: norms and layers that calls outside of the flow may reach, with all of their names.
        unseen: tells why a norm has no call in the flow.
    """

    def __init__(
        self, flow: Flow, norms: list[Found], shared: dict[nn.Module, str], unseen: Callable[[Found], str]
    ) -> None:
        super().__init__(flow)
        self.norms = {found.module: found for found in norms}
        self.shared, self.unseen = shared, unseen

    def never(self, norm: nn.Module) -> str:
        found = self.norms[norm]
        if reason := why_not_affine(found):
            return reason
        if norm in self.shared:
            return f"it is shared ({self.shared[norm]}): pass example="
        if any(id(tensor) in self.flow.read for tensor in norm.state_dict(keep_vars=True).values()):
            return "something else reads its parameters or statistics"
        return self.changes_dtype(norm) if norm in self.calls else self.unseen(found)

    def takes(self, call: Call, direction: Direction) -> bool:
        kind = None if call.module is None else absorber_of(call.module)
        return kind is not None and (direction != "beside" or kind.family == "conv")

    def axis(self, norm: Call) -> int:  # noqa: ARG002 - of every norm
        return 1

    def blocks(self, value: Value, call: Call, *, leads_on: bool) -> str:
        what = "the block's input" if value.maker is None else value.maker.what
        return _read_elsewhere(value, call) or ("" if leads_on else f"before it is {what}")

    def not_after(self, norm: nn.Module) -> str:
        if own_activation(norm) is not None:
            return "after it is its own activation"
        has_residual = any(len(call.reads) != 1 for call in self.calls[norm])
        return "after it, a residual is added" if has_residual else ""

    def why_not(self, norm: nn.Module, beside: Neighbour[nn.Module]) -> str:
        layer, value, is_before = beside.layer, beside.value, beside.direction == "before"
        if is_before and (reason := _read_elsewhere(value, beside.reader)):
            return reason
        what = f"{beside.direction} it, {beside.call.what}"
        if reason := self._unchangeable(norm, layer):
            return f"{what} {reason}"
        kind, found = absorber_of(layer), affine(norm)
        assert kind is not None
        axis = 1 if value.shape is None else len(value.shape) - 1 - kind.axes
        channels = inputs_of(layer) if beside.direction == "after" else outputs_of(layer)
        is_input = beside.direction != "after" or beside.call.reads == [value]
        wanted = len(found.scale) if value.shape is None else value.shape[beside.axis]
        if not is_input or beside.axis != axis or channels != wanted:
            return f"{what} has its channels on another axis"
        if beside.direction == "beside":
            reason = why_not_identity(layer)
            return f"{what} {reason}" if reason else ""
        if not is_before and (reason := why_not_inputs(layer, found.shift)):
            return f"{what} {reason}"
        if self.rank(norm, beside) and _fixed_rank(norm):
            return f"the layer next to it has its channels on another axis ({type(norm).__name__})"
        return ""

    def folded(self, step: Step[nn.Module]) -> bool:
        return not step.adds and own_activation(step.norm) is None

    def fits(self, layer: nn.Module, into: nn.Module) -> bool:
        kinds = (absorber_of(layer), absorber_of(into))
        if any(kind is None or kind.family != "conv" for kind in kinds):
            return False
        is_fixed = self._unchangeable(into, layer) or self._unchangeable(layer, into)
        return not is_fixed and place_within(layer, into) is not None

    def rank(self, norm: nn.Module, beside: Neighbour[nn.Module]) -> int | None:
        kind = absorber_of(beside.layer)
        assert kind is not None
        rank = 2 + kind.axes  # the layer's input has a batch axis, or else the norm would not take its output
        return None if beside.value.shape is not None or _fixed_rank(norm) == rank else rank

    def _unchangeable(self, norm: nn.Module, layer: nn.Module) -> str:
        """Return why a layer's weights cannot be others: another use, or no plain numbers."""
        if any(id(tensor) in self.flow.read for tensor in layer.parameters()):
            return "has a weight that something else reads"
        if layer in self.shared:
            return f"is shared ({self.shared[layer]}): pass example="
        if not isinstance(norm, BatchNormBase) and _dtype(layer) != _dtype(norm):
            return f"computes in {_dtype(layer)}, the norm in {_dtype(norm)}"
        return why_not(layer)


def _read_elsewhere(value: Value, call: Call) -> str:
    """Return why what `call` reads cannot change: what else reads it; "" if nothing does."""
    if len(value.readers) == 1:
        return ""
    others = " and ".join(sorted({reader.what for reader in value.readers if reader is not call}))
    return f"its input is read {len(value.readers)} times ({others or 'by itself'})"


def _fixed_rank(norm: nn.Module) -> int | None:
    """Return the one rank of input that a norm takes; None if it takes several."""
    return 4 if isinstance(norm, nn.BatchNorm2d) else 5 if isinstance(norm, nn.BatchNorm3d) else None


def _dtype(module: nn.Module) -> torch.dtype:
    return next(tensor.dtype for tensor in (*module.parameters(), *module.buffers()))
