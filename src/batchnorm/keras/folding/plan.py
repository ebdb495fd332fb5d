"""What folds into what, and why not: decided on the graph alone, before anything is copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras

from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.norms import measures, norms_within

from .arithmetic import KINDS
from .graph import Call, Graph, Value, graph
from .table import Direction, FoldRow, FoldTable

_NORMS = (keras.layers.BatchNormalization, BatchNormalization)

# They hand on their input as it is at inference, so a normalization may be folded through them.
_IDENTITIES = (
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
)


class Step(NamedTuple):
    """One normalization that is folded, into the layer before or after it."""

    norm: Any
    name: str
    layer: Any
    direction: Direction


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order, and what is told of it.

    Attributes:
        steps: several may fold into one layer; they compose in their order.
        table: every normalization, the ones left included.
        graph: of the model.
    """

    steps: tuple[Step, ...]
    table: FoldTable
    graph: Graph


class _Impossible(Exception):  # noqa: N818 - a reason on its way to the table, not an error
    """Why a normalization does not fold in one direction."""


def plan(model: Any) -> Plan:
    """Decide for every normalization of a model: into the layer before it, else into the one after.

    A normalization that is folded makes room for the next: of two in a row both may fold into one layer. So
    passes over those that are left go on until one folds nothing.
    """
    planner = _Planner(graph(model))
    names = {id(norm): name for name, norm in norms_within(model)}
    reasons = {id(norm): planner.never(norm, name) for name, norm in norms_within(model)}
    waiting = [call for call in planner.graph.calls if reasons.get(id(call.layer), "no norm") is None]
    progress = True
    while progress:
        left = []
        for call in waiting:
            reasons[id(call.layer)] = planner.fold(call, names[id(call.layer)])
            if reasons[id(call.layer)]:
                left.append(call)
        progress, waiting = len(left) < len(waiting), left
    steps = {id(step.norm): step for step in planner.steps}
    rows = []
    for norm, name in names.items():
        step = steps.get(norm)
        into = planner.call_of[id(step.layer)].name if step else None
        rows.append(FoldRow(name, into, step.direction if step else None, reasons[norm] or ""))
    return Plan(tuple(planner.steps), FoldTable(model.name, tuple(rows)), planner.graph)


@dataclass
class _Planner:
    """The graph as it is after the steps so far."""

    graph: Graph
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.times = Counter(id(call.layer) for call in self.graph.calls)
        self.call_of = {id(call.layer): call for call in self.graph.calls}
        self.giver = {value.number: call for call in self.graph.calls for value in call.gives}
        self.same: dict[int, int] = {}  # a folded normalization's output -> its input
        self.activation: dict[int, Any] = {}  # a layer -> the activation that a step gave it
        self.gone: set[int] = set()

    def never(self, norm: Any, name: str) -> str | None:
        """Return why a normalization folds in neither direction, whatever is around it; None if it may."""
        call, times = self.call_of.get(id(norm)), self.times[id(norm)]
        if call is None:
            around = name.rpartition("/")[0]
            return f"inside {around}, which has no graph" if around else "not in the graph of the model"
        if type(norm) not in _NORMS:
            return f"of a class of its own, {type(norm).__name__}"
        if times > 1 or id(norm) in self.graph.held:
            return f"shared: called {times} times" if times > 1 else "shared: held by another layer too"
        if call.trains and measures(norm, training=True):
            return "called with training=True: it normalizes by the batch"
        if measures(norm, training=False):
            return f"statistics={norm.statistics}: it normalizes by the batch at inference too"
        if call.reads[0].dtype != call.gives[0].dtype:
            return f"it turns {call.reads[0].dtype} into {call.gives[0].dtype}"
        activation = _activation(norm)
        if isinstance(activation, keras.layers.Layer) and activation.weights:
            return f"its activation {activation.name} has weights"
        return None

    def fold(self, norm: Call, name: str) -> str | None:
        """Add a step for a normalization and return None, or return the reasons why there is none."""
        reasons = []
        attempts: tuple[tuple[Direction, Callable[[Call], Any]], ...] = (
            ("before", self._before),
            ("after", self._after),
        )
        for direction, find in attempts:
            try:
                layer = find(norm)
            except _Impossible as why:
                reasons.append(str(why))
                continue
            self.steps.append(Step(norm.layer, name, layer, direction))
            self.same[norm.gives[0].number] = norm.reads[0].number
            self.gone.add(id(norm.layer))
            if not _is_linear(_activation(norm.layer)):
                self.activation[id(layer)] = _activation(norm.layer)
            return None
        return "; ".join(reasons)

    def _before(self, norm: Call) -> Any:
        """Return the layer before `norm` that takes it, or say why not."""
        tensor = self._tensor(norm.reads[0])
        while (call := self.giver.get(tensor)) and self._is_identity(call):
            self._only_reader(tensor, f"the output of {call.name}")
            tensor = self._tensor(call.reads[0])
        if call is None:
            raise _Impossible("before it is the model's input")
        if type(call.layer) not in KINDS:
            raise _Impossible(f"before it is {_described(call)}")
        self._can_change(call)
        activation = self.activation.get(id(call.layer), _activation(call.layer))
        if not _is_linear(activation):
            raise _Impossible(f"before it is the activation {_name(activation)} of {call.name}")
        _same_axis(norm, call)
        self._only_reader(tensor, f"the output of {call.name}")
        return call.layer

    def _after(self, norm: Call) -> Any:
        """Return the layer after `norm` that takes it, or say why not."""
        activation = _activation(norm.layer)
        if not _is_linear(activation):
            raise _Impossible(f"after it is its own activation {_name(activation)}")
        tensor = self._tensor(norm.gives[0])
        while self._is_identity(call := self._only_reader(tensor, "its output")):
            tensor = self._tensor(call.gives[0])
        kind = KINDS.get(type(call.layer))
        if kind is None or kind.scale_inputs is None:
            raise _Impossible(f"after it is {_described(call)}")
        self._can_change(call)
        padding = getattr(call.layer, "padding", "valid")
        if padding != "valid" and max(call.layer.kernel_size) > 1:
            raise _Impossible(
                f"after it, {call.name} pads (padding={padding!r}) with zeros that it would not shift"
            )
        _same_axis(norm, call)
        return call.layer

    def _tensor(self, value: Value) -> int:
        """The number of a tensor, now that some normalizations are gone."""
        number = value.number
        while number in self.same:
            number = self.same[number]
        return number

    def _only_reader(self, tensor: int, what: str) -> Call:
        """Return the one call that reads a tensor; more of them, or the model's outputs, are a reason."""
        if tensor in map(self._tensor, self.graph.outputs):
            raise _Impossible(f"{what} is an output of the model")
        readers = [
            call
            for call in self.graph.calls
            if id(call.layer) not in self.gone and tensor in map(self._tensor, call.reads)
        ]
        if len(readers) != 1:
            raise _Impossible(f"{what} is read by {' and '.join(call.name for call in readers) or 'nothing'}")
        return readers[0]

    def _is_identity(self, call: Call) -> bool:
        if call.trains or len(call.reads) != 1:
            return False
        if type(call.layer) is keras.layers.Activation:
            return _is_linear(_activation(call.layer))
        return type(call.layer) in _IDENTITIES

    def _can_change(self, call: Call) -> None:
        """Raise if the layer's weights serve something else too, or are not plain numbers."""
        layer, times = call.layer, self.times[id(call.layer)]
        if times > 1 or id(layer) in self.graph.held:
            raise _Impossible(f"{call.name} is shared" + (f": called {times} times" if times > 1 else ""))
        if layer.quantization_mode is not None:
            raise _Impossible(f"{call.name} is quantized ({layer.quantization_mode})")
        if getattr(layer, "lora_enabled", False):
            raise _Impossible(f"{call.name} has LoRA weights")


def _activation(layer: Any) -> Any:
    """A stock normalization has none."""
    return getattr(layer, "activation", None)


def _is_linear(activation: Any) -> bool:
    return activation is None or activation is keras.activations.linear


def _name(activation: Any) -> str:
    return str(getattr(activation, "__name__", None) or getattr(activation, "name", activation))


def _described(call: Call) -> str:
    return f"{call.name} ({type(call.layer).__name__})"


def _same_axis(norm: Call, call: Call) -> None:
    """Raise unless the normalization's axis is the layer's channel axis."""
    rank = norm.reads[0].rank
    axis = norm.layer.axis % rank
    channels = 1 if getattr(call.layer, "data_format", "channels_last") == "channels_first" else rank - 1
    if axis != channels:
        raise _Impossible(f"its axis {axis} is not the channel axis {channels} of {call.name}")
