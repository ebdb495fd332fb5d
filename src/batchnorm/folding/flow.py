"""Represents which calls make and read each value of a model: a graph, a traced forward or a recorded run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

Layer = TypeVar("Layer")
Axes = tuple[int | None, ...] | Literal["same"] | None


@dataclass(frozen=True)
class Concatenation:
    """How a call joins its inputs: side by side along `axis`."""

    axis: int


@dataclass(frozen=True)
class Sum:
    """How a call joins its inputs, all of one shape and dtype: it adds them.

    Attributes:
        signs: 1 or -1 for each input.
        in_place: whether the sum is written over the first input.
    """

    signs: tuple[int, ...]
    in_place: bool = False


@dataclass(eq=False)
class Value(Generic[Layer]):
    """A tensor at one point of a forward.

    Attributes:
        maker: the call that returned it; None for inputs, parameters and constants.
        shape: on the example, or in the graph, where open sizes are None; None without both.
        dtype: likewise.
        readers: one entry for each time that a call reads it.
        aliased: how often an operator returned it as it is, such as `detach`: gradients may differ.
    """

    maker: Call[Layer] | None = None
    shape: tuple[int | None, ...] | None = None
    dtype: object = None
    readers: list[Call[Layer]] = field(default_factory=list)
    aliased: int = 0


@dataclass(eq=False)
class Call(Generic[Layer]):
    """A call of a module or of an operation.

    Attributes:
        what: its description in reasons.
        module: the module; None for an operation.
        reads: its inputs, that of a layer first.
        gives: its outputs.
        axes: for a call that only rearranges its first input, or averages it along other axes: for each axis
            of the output the same axis of the input, or None; "same" for a call that returns its first input;
            None for any other call.
        joins: how it puts its inputs together; None for any other call.
    """

    what: str
    module: Layer | None
    reads: list[Value[Layer]]
    gives: list[Value[Layer]] = field(default_factory=list)
    axes: Axes = None
    joins: Concatenation | Sum | None = None

    def __post_init__(self) -> None:
        for value in self.reads:
            value.readers.append(self)

    def give(self, shape: tuple[int | None, ...] | None = None, dtype: object = None) -> Value[Layer]:
        """Return a new output of this call."""
        value = Value(self, shape, dtype)
        self.gives.append(value)
        return value

    def axis_before(self, axis: int) -> int | None:
        """Return the axis of the first input that becomes `axis` of the output."""
        if self.axes is None or self.axes == "same":
            return None if self.axes is None else axis
        return self.axes[axis]

    def axis_behind(self, axis: int) -> int | None:
        """Return the axis of the output that `axis` of the first input becomes."""
        if self.axes is None or self.axes == "same":
            return None if self.axes is None else axis
        return self.axes.index(axis) if axis in self.axes else None

    def start_in(self, number: int, axis: int) -> int:
        """Return where input `number` of a concatenation begins along `axis` of its output."""
        sizes = [None if value.shape is None else value.shape[axis] for value in self.reads[:number]]
        return sum(size or 0 for size in sizes)


def origin(value: Value[Layer]) -> Value[Layer]:
    """Return the value that calls which return their input have handed on."""
    while value.maker is not None and value.maker.axes == "same":
        value = value.maker.reads[0]
    return value


@dataclass
class Flow(Generic[Layer]):
    """The calls of a model, or of some of its blocks.

    Attributes:
        calls: in the order of the forward.
        read: ids of the parameters that a forward reads other than by calling their layer.
    """

    calls: list[Call[Layer]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)

    def by_module(self) -> defaultdict[Layer, list[Call[Layer]]]:
        """Return the calls of each module."""
        found: defaultdict[Layer, list[Call[Layer]]] = defaultdict(list)
        for call in self.calls:
            if call.module is not None:
                found[call.module].append(call)
        return found


def joined(flows: Iterable[Flow[Layer]]) -> Flow[Layer]:
    """Return the calls of several flows as one."""
    whole: Flow[Layer] = Flow()
    for flow in flows:
        whole.calls += flow.calls
        whole.read |= flow.read
    return whole
