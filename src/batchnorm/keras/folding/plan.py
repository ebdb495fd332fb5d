"""Plans the folds of a Keras model: what its layers take, and in which words one stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import keras

from batchnorm.folding.plan import Neighbour, Planner, Step
from batchnorm.folding.table import Direction, FoldTable
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.norms import measures, norms_within

from .arithmetic import FAMILIES
from .graph import Call, Graph, Value, activation_of, graph

_NORMS = (keras.layers.BatchNormalization, BatchNormalization)


@dataclass(frozen=True)
class Plan:
    """The steps of a fold, in their order, and the table that reports them.

    Attributes:
        steps: several may fold into one layer; they compose in their order.
        table: every normalization, the ones left included.
        graph: of the model.
        norms: every normalization with its qualified name.
    """

    steps: list[Step[keras.Operation]]
    table: FoldTable
    graph: Graph
    norms: Mapping[keras.Operation, str]


def plan(model: keras.Model) -> Plan:
    """Decide for every normalization of a model, in the order of its graph."""
    found = graph(model)
    norms = {norm: name for name, norm in norms_within(model)}
    names = {call.module: call.what for call in found.calls} | norms
    called = [call.module for call in found.calls if call.module in norms]
    decided = _Planner(found, norms).plan(dict.fromkeys([*called, *norms]))
    rows = decided.rows(names)
    return Plan(decided.steps, FoldTable(model.name, tuple(rows[norm] for norm in norms)), found, norms)


class _Planner(Planner[keras.Operation]):
    def __init__(self, graph: Graph, norms: Mapping[keras.Operation, str]) -> None:
        super().__init__(graph)
        self.graph, self.norms = graph, norms
        self.order = {call: number for number, call in enumerate(graph.calls)}
        self.gone: set[keras.Operation] = set()
        self.activation: dict[keras.Operation, object] = {}  # a layer -> the activation that a step gave it

    def never(self, norm: keras.Operation) -> str:
        calls = self.calls[norm]
        if not calls:
            around = self.norms[norm].rpartition("/")[0]
            return f"inside {around}, which has no graph" if around else "not in the graph of the model"
        if type(norm) not in _NORMS:
            return f"of a class of its own, {type(norm).__name__}"
        if len(calls) > 1:
            return f"shared: called {len(calls)} times"
        if id(norm) in self.graph.held:
            return "shared: held by another layer too"
        if calls[0] in self.graph.training and measures(norm, training=True):
            return "called with training=True: it normalizes by the batch"
        if measures(norm, training=False):
            return f"statistics={norm.statistics}: it normalizes by the batch at inference too"
        activation = activation_of(norm)
        if isinstance(activation, keras.layers.Layer) and activation.weights:
            return self.changes_dtype(norm) or f"its activation {activation.name} has weights"
        return self.changes_dtype(norm)

    def takes(self, call: Call, direction: Direction) -> bool:
        family = FAMILIES.get(type(call.module))
        if family is None or direction == "beside":
            return False
        return direction == "before" or family != "transposed"

    def axis(self, norm: Call) -> int:
        layer: keras.layers.BatchNormalization = norm.module
        return int(layer.axis % _rank(norm.reads[0]))

    def described(self, call: Call) -> str:
        return f"{call.what} ({type(call.module).__name__})"

    def blocks(self, value: Value, call: Call, *, leads_on: bool) -> str:  # noqa: ARG002
        maker = value.maker
        if maker is None:
            return "before it is the model's input"
        if not leads_on:
            return f"before it is {self.described(maker)}"
        is_gone = maker.module in self.gone  # what it reads is in its place, and is looked at next
        return "" if is_gone else self._several(value, f"the output of {maker.what}")

    def read_by_several(self, value: Value) -> str:
        return self._several(value, "its output")

    def not_after(self, norm: keras.Operation) -> str:
        activation = activation_of(norm)
        return "" if activation is None else f"after it is its own activation {_name(activation)}"

    def why_not(self, _norm: keras.Operation, beside: Neighbour[keras.Operation]) -> str:
        layer, value, name = beside.layer, beside.value, beside.call.what
        if reason := self._unchangeable(layer):
            return f"{name} {reason}"
        if beside.direction == "before":
            activation = self.activation.get(layer, activation_of(layer))
            if activation is not None:
                return f"before it is the activation {_name(activation)} of {name}"
        else:
            padding = getattr(layer, "padding", "valid")
            if padding != "valid" and max(layer.kernel_size) > 1:
                return f"after it, {name} pads (padding={padding!r}) with zeros that it would not shift"
        is_first = getattr(layer, "data_format", "channels_last") == "channels_first"
        channels = 1 if is_first else _rank(value) - 1
        if beside.axis != channels:
            return f"its axis {beside.axis} is not the channel axis {channels} of {name}"
        return self._several(value, f"the output of {name}") if beside.direction == "before" else ""

    def folded(self, step: Step[keras.Operation]) -> bool:
        if (activation := activation_of(step.norm)) is not None:
            self.activation[step.into[0].layer] = activation
        self.gone.add(step.norm)
        return True

    def _several(self, value: Value, what: str) -> str:
        """Return why a tensor cannot change: the model returns it, or not exactly one call reads it."""
        readers = set(self._readers(value))
        if any(reader.module is None for reader in readers):
            return f"{what} is an output of the model"
        names = " and ".join(reader.what for reader in sorted(readers, key=self.order.__getitem__))
        return "" if len(readers) == 1 else f"{what} is read by {names or 'nothing'}"

    def _readers(self, value: Value) -> Iterator[Call]:
        """Yield the calls that read a tensor, now that some normalizations are gone."""
        for reader in value.readers:
            if reader.module not in self.gone:
                yield reader
            elif reader.reads[0] is value:
                yield from self._readers(reader.gives[0])

    def _unchangeable(self, layer: keras.layers.Layer) -> str:
        """Return why a layer's weights cannot change: another use, or no plain numbers."""
        times = len(self.calls[layer])
        if times > 1 or id(layer) in self.graph.held:
            return "is shared" + (f": called {times} times" if times > 1 else "")
        if layer.quantization_mode is not None:
            return f"is quantized ({layer.quantization_mode})"
        return "has LoRA weights" if getattr(layer, "lora_enabled", False) else ""


def _rank(value: Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _name(activation: object) -> str:
    return str(getattr(activation, "__name__", None) or getattr(activation, "name", activation))
