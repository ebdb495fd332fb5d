"""Decides which batch normalizations fold into which layers, and why the others stay, on the flow of a model.

A framework says what its layers can take and names its reasons, in the abstract methods of `Planner`. The
order of attempts, the walk through the flow and the account of a layer's calls are here. Another way to fold
is another attempt in `Planner._fold`, which returns a `Step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic

from .flow import Call, Concatenation, Flow, Layer, Sum, Value, origin
from .parallel import Merge, merges
from .sums import Term, whole_sum
from .table import Direction, FoldRow


@dataclass(frozen=True)
class Part(Generic[Layer]):
    """What one layer takes of a norm.

    Attributes:
        layer: which.
        start: before a norm, the first of the norm's channels that are the layer's outputs; after it, the
            first of the layer's inputs that are the norm's channels.
        shift: by what it takes the norm's shift: 1, -1 where it is subtracted, or 0 where another layer of a
            sum takes it; beside a norm, the sign of the norm's output relative to the layer's.
    """

    layer: Layer
    start: int = 0
    shift: int = 1


@dataclass(frozen=True)
class Step(Generic[Layer]):
    """One norm that is folded.

    Attributes:
        norm: which.
        into: the layers that take it; several where it is called behind several, or several read it.
        direction: whether they are before it, after it, or read the same and are added to it.
        adds: it is called with a residual, which is still to be added.
        rank: of its input, where the fold holds for that one only; None where the norm takes no other.
        is_overwritten: beside it, whether the sum is written over what it gives.
    """

    norm: Layer
    into: tuple[Part[Layer], ...]
    direction: Direction
    adds: bool = False
    rank: int | None = None
    is_overwritten: bool = False


@dataclass(frozen=True)
class Neighbour(Generic[Layer]):
    """A call of a layer next to a call of a norm, which may take it.

    Attributes:
        call: of the layer.
        direction: whether it is before or after the norm, or beside it.
        value: what it makes, or reads, of the norm.
        reader: the call that reads this value: before a norm, itself or the first of what hands it on.
        axis: of the value, the norm's channels.
        start: as of `Part`.
        shift: as of `Part`.
    """

    call: Call[Layer]
    direction: Direction
    value: Value[Layer]
    reader: Call[Layer]
    axis: int
    start: int = 0
    shift: int = 1

    @property
    def layer(self) -> Layer:
        """The layer that is called."""
        assert self.call.module is not None
        return self.call.module


@dataclass
class FoldPlan(Generic[Layer]):
    """Decisions for a model.

    Attributes:
        steps: in this order; several may go into one layer, and compose in their order.
        reasons: norm -> why it stays.
        merges: after the steps, the layers that become part of one beside them.
    """

    steps: list[Step[Layer]] = field(default_factory=list)
    reasons: dict[Layer, str] = field(default_factory=dict)
    merges: list[Merge[Layer]] = field(default_factory=list)

    def of(self, twins: Mapping[Layer, Layer]) -> FoldPlan[Layer]:
        """Return the same decisions for a copy of the model, given each layer's twin."""
        steps = [
            replace(
                step,
                norm=twins[step.norm],
                into=tuple(replace(part, layer=twins[part.layer]) for part in step.into),
            )
            for step in self.steps
        ]
        merged = [replace(one, layer=twins[one.layer], into=twins[one.into]) for one in self.merges]
        return FoldPlan(steps, {twins[norm]: reason for norm, reason in self.reasons.items()}, merged)

    def rows(self, names: Mapping[Layer, str]) -> dict[Layer, FoldRow]:
        """Return what to say of each norm, given the names of all layers."""
        merged = {merge.layer: merge.into for merge in self.merges}

        def place(layer: Layer) -> str:
            whole = layer
            while whole in merged:
                whole = merged[whole]
            return names[layer] if whole is layer else f"{names[layer]} within {names[whole]}"

        left = {norm: FoldRow(names[norm], None, None, reason) for norm, reason in self.reasons.items()}
        return left | {
            step.norm: FoldRow(
                names[step.norm], ", ".join(place(part.layer) for part in step.into), step.direction, ""
            )
            for step in self.steps
        }


class _Impossible(Exception):  # noqa: N818 - a reason on its way to the table, not an error
    """Why a norm does not fold in one direction."""


class Planner(ABC, Generic[Layer]):
    """Plans on a flow, which it changes: it is the flow as it is after the steps so far.

    Args:
        flow: of the model.
    """

    def __init__(self, flow: Flow[Layer]) -> None:
        self.flow = flow
        self.calls = flow.by_module()
        self.gone: set[Call[Layer]] = set()  # calls of norms beside a layer: what they add is zero now

    @abstractmethod
    def never(self, norm: Layer) -> str:
        """Return why a norm folds in neither direction, whatever is around it; "" if it may."""

    @abstractmethod
    def takes(self, call: Call[Layer], direction: Direction) -> bool:
        """Whether a call is one of a layer that can take the norm it is before, after or beside."""

    @abstractmethod
    def axis(self, norm: Call[Layer]) -> int:
        """Return the channel axis of a norm's input."""

    @abstractmethod
    def blocks(self, value: Value[Layer], call: Call[Layer], *, leads_on: bool) -> str:
        """Return why no layer before `call`, which reads `value`, can change that; "" if one may.

        Args:
            value: on the way from a norm to a layer before it, which has not made it.
            call: the norm, or what hands on the value to it.
            leads_on: whether the value is only handed on, too; otherwise there is a reason.
        """

    @abstractmethod
    def not_after(self, norm: Layer) -> str:
        """Return what keeps a norm from any layer after it; "" if nothing does."""

    @abstractmethod
    def why_not(self, norm: Layer, beside: Neighbour[Layer]) -> str:
        """Return why a layer that `takes` norms cannot take the one that it is next to; "" if it can."""

    @abstractmethod
    def folded(self, step: Step[Layer]) -> bool:
        """Take note of a step; return whether it leaves nothing where the norm was."""

    def described(self, call: Call[Layer]) -> str:
        """Return a call in words."""
        return call.what

    def rank(self, _norm: Layer, _beside: Neighbour[Layer]) -> int | None:
        """Return the rank of input for which alone a norm may go into a layer; None for any that runs."""
        return None

    def read_by_several(self, _value: Value[Layer]) -> str:
        """Return why the layers that read a value cannot each take the norm before it; "" if they can."""
        return ""

    def fits(self, _layer: Layer, _into: Layer) -> bool:
        """Whether a layer of the same input, added to another, can be part of that one."""
        return False

    def plan(self, norms: Iterable[Layer]) -> FoldPlan[Layer]:
        """Decide for every norm: into what is before all of its calls, else after them, else beside them.

        A norm that is folded makes room for the next: of two in a row both may go into one layer. So passes
        over those that are left go on until one folds nothing.
        """
        decided: FoldPlan[Layer] = FoldPlan(reasons={norm: self.never(norm) for norm in norms})
        waiting = [norm for norm, reason in decided.reasons.items() if not reason]
        progress = True
        while progress:
            left = [norm for norm in waiting if not self._fold(norm, decided)]
            progress, waiting = len(left) < len(waiting), left
        decided.merges = merges(self.flow, self.fits)
        return decided

    def changes_dtype(self, norm: Layer) -> str:
        """Return which dtype a norm turns into which other, as a reason; "" if none."""
        for call in self.calls[norm]:
            if call.reads and call.reads[0].dtype != call.gives[0].dtype:
                return f"it turns {call.reads[0].dtype} into {call.gives[0].dtype}"
        return ""

    def _fold(self, norm: Layer, decided: FoldPlan[Layer]) -> bool:
        """Add a step for a norm, or note why there is none."""
        reasons = []
        for attempt in (self._before, self._after, self._beside):
            try:
                step = attempt(norm)
            except _Impossible as why:
                reasons += [str(why)] if str(why) else []
                continue
            decided.steps.append(step)
            del decided.reasons[norm]
            if step.direction == "beside":
                (call,) = self.calls[norm]
                call.reads[0].readers.remove(call)
                self.gone.add(call)
            elif self.folded(step):
                for call in self.calls[norm]:
                    call.axes = "same"
            return True
        decided.reasons[norm] = "; ".join(reasons)
        return False

    def _before(self, norm: Layer) -> Step[Layer]:
        """Return the step into the layers before a norm, or say why not."""
        found = []
        for call in self.calls[norm]:
            sources = self._sources(_input(call), self.axis(call), call)
            for source in sources:
                _refuse(self.why_not(norm, source))
            found += sources
        return self._step(norm, found, "for this norm")

    def _sources(
        self, value: Value[Layer], axis: int, reader: Call[Layer], start: int = 0, shift: int = 1
    ) -> list[Neighbour[Layer]]:
        """Return the layers that a value is made by, past what only hands it on, joins it or averages it.

        Args:
            value: that `reader` reads.
            axis: of the value, the norm's channels.
            reader: the norm, or what hands on the value to it.
            start: the first of the norm's channels that the value has.
            shift: by what the value takes the norm's shift.
        """
        maker = value.maker
        if maker is not None and self.takes(maker, "before"):
            return [Neighbour(maker, "before", value, reader, axis, start, shift)]
        before = None if maker is None else maker.axis_before(axis)
        joins = None if maker is None else maker.joins
        is_joined = isinstance(joins, Sum) or joins == Concatenation(axis)
        _refuse(self.blocks(value, reader, leads_on=before is not None or is_joined))
        assert maker is not None
        if not is_joined:
            assert before is not None
            return self._sources(_input(maker), before, maker, start, shift)
        try:
            return self._joined_sources(maker, axis, start, shift)
        except _Impossible as why:
            raise _Impossible(f"before it is {self.described(maker)}, and {why}") from None

    def _joined_sources(self, call: Call[Layer], axis: int, start: int, shift: int) -> list[Neighbour[Layer]]:
        """Return the layers that make the inputs of a sum or a concatenation; arguments as of `_sources`."""
        found: list[Neighbour[Layer]] = []
        for number, part in enumerate(call.reads):
            if not isinstance(call.joins, Sum):
                found += self._sources(part, axis, call, start + call.start_in(number, axis), shift)
            elif not self.is_zero(part):
                found += self._sources(part, axis, call, start, shift * call.joins.signs[number])
                shift = 0  # the first one takes it
        return found

    def is_zero(self, value: Value[Layer]) -> bool:
        """Whether a value is zero now, because the norm that made it has gone into a layer beside it."""
        return origin(value).maker in self.gone

    def _after(self, norm: Layer) -> Step[Layer]:
        """Return the step into the layers after a norm, or say why not."""
        _refuse(self.not_after(norm))
        found = []
        for call in self.calls[norm]:
            consumers = self._consumers(call.gives[0], self.axis(call))
            for consumer in consumers:
                _refuse(self.why_not(norm, consumer))
            found += consumers
        if not found:
            raise _Impossible("nothing reads its output")
        return self._step(norm, found, "on this norm's output")

    def _consumers(self, value: Value[Layer], axis: int, start: int = 0) -> list[Neighbour[Layer]]:
        """Return the layers that read a value, past what hands on, averages or concatenates it."""
        _refuse(self.read_by_several(value))
        found = []
        for reader in value.readers:
            if self.takes(reader, "after"):
                found.append(Neighbour(reader, "after", value, reader, axis, start))
                continue
            behind, number = reader.axis_behind(axis), reader.reads.index(value)
            if reader.joins == Concatenation(axis) and reader.reads.count(value) == 1:
                found += self._consumers(reader.gives[0], axis, start + reader.start_in(number, axis))
                continue
            if behind is None or number:
                raise _Impossible(f"after it is {self.described(reader)}")
            found += self._consumers(reader.gives[0], behind, start)
        return found

    def _beside(self, norm: Layer) -> Step[Layer]:
        """Return the step into a layer that reads the same as a norm and is added to it, or say why not."""
        calls = self.calls[norm]
        terms = whole_sum(calls[0].gives[0]) if len(calls) == 1 and len(calls[0].gives) == 1 else []
        if len(terms) < 2 or self.not_after(norm):
            raise _Impossible("")
        own = next(place for place, term in enumerate(terms) if term.value.maker is calls[0])
        reasons = [f"beside it, no layer that reads the same is added to {self.described(calls[0])}"]
        for term in terms:
            call = term.value.maker
            if call is None or not self._reads_the_same(call, calls[0]):
                continue
            beside = Neighbour(call, "beside", term.value, call, self.axis(calls[0]))
            reason = self._why_not_beside(norm, beside, term, terms[own])
            if not reason:
                part = Part(beside.layer, 0, term.sign * terms[own].sign)
                return Step(norm, (part,), "beside", is_overwritten=terms[own].is_written)
            reasons.append(reason)
        raise _Impossible(reasons[-1])

    def _reads_the_same(self, call: Call[Layer], norm: Call[Layer]) -> bool:
        """Whether a call is one of a layer that reads what a norm does and could take it."""
        return self.takes(call, "beside") and origin(_input(call)) is origin(_input(norm))

    def _why_not_beside(
        self, norm: Layer, beside: Neighbour[Layer], term: Term[Layer], own: Term[Layer]
    ) -> str:
        """Return why a layer, which gives `term`, cannot take a norm that it is added to."""
        what = f"beside it, {beside.call.what}"
        if not own.is_alone:
            return f"{what} is added, but something else reads the norm's output too"
        if not term.is_alone:
            return f"{what} is read by something else too"
        if len(self.calls[beside.layer]) != 1:
            return f"{what} is called {len(self.calls[beside.layer])} times"
        return self.why_not(norm, beside)

    def _step(self, norm: Layer, found: list[Neighbour[Layer]], how: str) -> Step[Layer]:
        """Return the step into the layers next to a norm if each of their calls is next to it."""
        direction = found[0].direction
        times = Counter(beside.layer for beside in found)
        for layer, count in times.items():
            calls = self.calls[layer]
            if count != len(calls):
                raise _Impossible(
                    f"{direction} it, {calls[0].what} is called {len(calls)} times, {count} of them {how}"
                )
        parts = list(dict.fromkeys(Part(beside.layer, beside.start, beside.shift) for beside in found))
        if len(parts) != len(times):
            raise _Impossible(f"{direction} it, a layer is called for different channels of this norm")
        ranks = {self.rank(norm, beside) for beside in found}
        if len(ranks) != 1:
            raise _Impossible(f"{direction} it are layers for inputs of several ranks")
        adds = any(len(call.reads) > 1 for call in self.calls[norm])
        return Step(norm, tuple(parts), direction, adds, ranks.pop())


def _refuse(reason: str) -> None:
    if reason:
        raise _Impossible(reason)


def _input(call: Call[Layer]) -> Value[Layer]:
    if not call.reads:
        raise _Impossible(f"what {call.what} reads is not known")
    return call.reads[0]
