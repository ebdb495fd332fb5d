"""What folds into what, and why not: decided on the flow of a model, before anything changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.models.graph.flow import Call, Flow, Value
from batchnorm.models.norms.find import Found

from .affine import affine, own_activation, why_not_affine
from .arithmetic import why_not_inputs
from .foldable_layers import Absorber, absorber_of, inputs_of, outputs_of, why_not

Direction = Literal["before", "after"]


@dataclass(frozen=True)
class Step:
    """One norm that is folded.

    Attributes:
        norm: which.
        into: the layers that take it; several where it is called behind several, or several read it.
        direction: whether they are before or after it.
        adds: it is called with a residual, which is still to be added.
        rank: of its input, where the fold holds for that one only; None where the norm takes no other.
    """

    norm: nn.Module
    into: tuple[nn.Module, ...]
    direction: Direction
    adds: bool
    rank: int | None


@dataclass
class FoldPlan:
    """Decisions for a model.

    Attributes:
        steps: in this order; several may go into one layer.
        reasons: norm -> why it stays.
    """

    steps: list[Step] = field(default_factory=list)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


class _Impossible(Exception):  # noqa: N818 - a reason on its way to the table, not an error
    """Why a norm does not fold in one direction."""


def plan_on(flow: Flow, norms: list[Found], shared: dict[nn.Module, str]) -> FoldPlan:
    """Decide for every norm: into what is before all of its calls, else into what is after them.

    A norm that is folded makes room for the next, so passes over those that are left go on until one folds
    nothing.

    Args:
        flow: of the model.
        norms: all of them.
        shared: norms and layers that calls outside of the flow may reach, with all of their names.
    """
    planner = _Planner(flow, shared)
    waiting = []
    for found in norms:
        reason = why_not_affine(found)
        if not reason and found.module in shared:
            reason = f"it is shared ({shared[found.module]}): pass example="
        if reason:
            planner.plan.reasons[found.module] = reason
        elif any(id(tensor) in flow.read for tensor in found.module.state_dict(keep_vars=True).values()):
            planner.plan.reasons[found.module] = "something else reads its parameters or statistics"
        elif found.module in planner.calls:
            waiting.append(found.module)
    progress = True
    while progress:
        left = [norm for norm in waiting if not planner.fold(norm)]
        progress, waiting = len(left) < len(waiting), left
    return planner.plan


class _Planner:
    """The flow as it is after the steps so far."""

    def __init__(self, flow: Flow, shared: dict[nn.Module, str]) -> None:
        self.flow = flow
        self.shared = shared
        self.calls = flow.by_module()
        self.plan = FoldPlan()
        self.empty: set[nn.Module] = set()  # norms that were folded and left nothing behind

    def fold(self, norm: nn.Module) -> bool:
        """Add a step for a norm, or note why there is none."""
        for call in self.calls[norm]:
            if call.reads and call.reads[0].dtype != call.gives[0].dtype:
                self.plan.reasons[norm] = f"it turns {call.reads[0].dtype} into {call.gives[0].dtype}"
                return False
        reasons = []
        for find in (self._before, self._after):
            try:
                step = find(norm)
            except _Impossible as why:
                reasons.append(str(why))
                continue
            self.plan.steps.append(step)
            self.plan.reasons.pop(norm, None)
            if not step.adds and own_activation(norm) is None:
                self.empty.add(norm)
            return True
        self.plan.reasons[norm] = "; ".join(reasons)
        return False

    def _before(self, norm: nn.Module) -> Step:
        """Return the step into the layers before a norm, or say why not."""
        times: Counter[nn.Module] = Counter()
        ranks = set()
        for call in self.calls[norm]:
            source, axis = self._source(call)
            layer = source.module
            assert layer is not None
            kind = self._changeable(norm, source, "before")
            made = source.gives[0].shape
            channels = 1 if made is None else len(made) - 1 - kind.axes
            if axis != channels or outputs_of(layer) != len(affine(norm).scale):
                raise _Impossible(f"before it, {source.what} has its channels on another axis")
            times[layer] += 1
            ranks.add(_rank(norm, call, kind))
        self._check_every_call(times, "before", "for this norm")
        return self._step(norm, times, "before", ranks)

    def _source(self, call: Call) -> tuple[Call, int]:
        """Return the layer whose output a norm reads, past what only hands it on, and its channel axis."""
        value, axis = _input(call), 1
        while True:
            if len(value.readers) != 1:
                others = " and ".join(sorted({reader.what for reader in value.readers if reader is not call}))
                raise _Impossible(f"its input is read {len(value.readers)} times ({others or 'by itself'})")
            maker = value.maker
            if maker is None:
                raise _Impossible("before it is the block's input")
            if maker.module is not None and absorber_of(maker.module) is not None:
                return maker, axis
            before = axis if maker.module in self.empty else maker.axis_before(axis)
            if before is None:
                raise _Impossible(f"before it is {maker.what}")
            value, axis, call = _input(maker), before, maker

    def _after(self, norm: nn.Module) -> Step:
        """Return the step into the layers after a norm, or say why not."""
        if own_activation(norm) is not None:
            raise _Impossible("after it is its own activation")
        if any(len(call.reads) != 1 for call in self.calls[norm]):
            raise _Impossible("after it, a residual is added")
        shift = affine(norm).shift
        times: Counter[nn.Module] = Counter()
        ranks = set()
        for call in self.calls[norm]:
            for reader, value, axis in self._consumers(call.gives[0], 1):
                layer = reader.module
                assert layer is not None
                kind = self._changeable(norm, reader, "after")
                shape = value.shape
                channels = 1 if shape is None else len(shape) - 1 - kind.axes
                if reader.reads != [value] or axis != channels or inputs_of(layer) != len(shift):
                    raise _Impossible(f"after it, {reader.what} has its channels on another axis")
                if reason := why_not_inputs(layer, kind, shift):
                    raise _Impossible(f"after it, {reader.what} {reason}")
                times[layer] += 1
                ranks.add(_rank(norm, call, kind))
        if not times:
            raise _Impossible("nothing reads its output")
        self._check_every_call(times, "after", "on this norm's output")
        return self._step(norm, times, "after", ranks)

    def _check_every_call(self, times: Counter[nn.Module], where: str, how: str) -> None:
        """Raise unless every call of a layer is one of those that this norm is next to."""
        for layer, count in times.items():
            calls = self.calls[layer]
            if count != len(calls):
                raise _Impossible(
                    f"{where} it, {calls[0].what} is called {len(calls)} times, {count} of them {how}"
                )

    def _consumers(self, value: Value, axis: int) -> list[tuple[Call, Value, int]]:
        """Return the layers that read a value, past what only hands it on, with the channel axis there."""
        found = []
        for reader in value.readers:
            if reader.module is not None and absorber_of(reader.module) is not None:
                found.append((reader, value, axis))
                continue
            behind = axis if reader.module in self.empty else reader.axis_behind(axis)
            if behind is None or not reader.reads or reader.reads[0] is not value:
                raise _Impossible(f"after it is {reader.what}")
            found += self._consumers(reader.gives[0], behind)
        return found

    def _changeable(self, norm: nn.Module, call: Call, where: Direction) -> Absorber:
        """Return how a layer takes a map; raise if its weights serve something else or cannot change."""
        layer = call.module
        assert layer is not None
        kind = absorber_of(layer)
        assert kind is not None
        reason = why_not(layer)
        if not isinstance(norm, _BatchNorm) and _dtype(layer) != _dtype(norm):
            reason = f"computes in {_dtype(layer)}, the norm in {_dtype(norm)}"
        if layer in self.shared:
            reason = f"is shared ({self.shared[layer]}): pass example="
        if any(id(tensor) in self.flow.read for tensor in layer.parameters()):
            reason = "has a weight that something else reads"
        if reason:
            raise _Impossible(f"{where} it, {call.what} {reason}")
        return kind

    def _step(
        self, norm: nn.Module, layers: Counter[nn.Module], direction: Direction, ranks: set[int | None]
    ) -> Step:
        if len(ranks) != 1:
            raise _Impossible(f"{direction} it are layers for inputs of several ranks")
        adds = any(len(call.reads) > 1 for call in self.calls[norm])
        return Step(norm, tuple(layers), direction, adds, ranks.pop())


def _input(call: Call) -> Value:
    if not call.reads:
        raise _Impossible(f"what {call.what} reads is not known")
    return call.reads[0]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(tensor.dtype for tensor in (*module.parameters(), *module.buffers()))


def _rank(norm: nn.Module, call: Call, kind: Absorber) -> int | None:
    """Return the rank that a fold rests on where nothing has run and the norm takes others too."""
    if call.gives[0].shape is not None:
        return None
    rank = 2 + kind.axes  # the layer's input has a batch axis, or else the norm would not take its output
    fixed = 4 if isinstance(norm, nn.BatchNorm2d) else 5 if isinstance(norm, nn.BatchNorm3d) else None
    if fixed not in (None, rank):
        raise _Impossible(f"the layer next to it has its channels on another axis ({type(norm).__name__})")
    return None if fixed == rank else rank


def shown(step: Step, names: dict[nn.Module, str]) -> str:
    """Return where a norm goes in words, such as `layer1.0.conv1 (before)`."""
    return f"{', '.join(names[layer] for layer in step.into)} ({step.direction})"
