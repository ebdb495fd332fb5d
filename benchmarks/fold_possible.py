"""Counts the norms that a neighbour could absorb in exact arithmetic, on the graph that autograd records.

It knows nothing of how `fold` finds what it folds. What autograd does not see, such as a tensor's use in a
choice, makes the count too large, never too small, but for norms next to norms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.models.norms.find import find_norms
from batchnorm.models.verify import call

_LAID_OUT = (
    "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Transpose", "Permute", "T", "Clone",
    "Slice",
)  # fmt: skip
_PRODUCTS = ("Addmm", "Mm")
_CONVOLUTION = "Convolution"
_AVERAGES = (
    "MeanBackward1", "AvgPool2D", "AdaptiveAvgPool2D", "UpsampleNearest2D", "UpsampleBilinear2D",
    "UpsampleBicubic2D",
)  # fmt: skip
_SUMS = ("Add", "Sub")
_CAT = "Cat"
_CHANNELS = (1, 2**64 - 3)  # as autograd keeps the axes 1 and -3
_Edge = tuple[Any, int]


class _Mark(torch.autograd.Function):
    """A node of its own for each side of a norm's call."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy


def possible(model: nn.Module, example: Any) -> set[str]:
    """Return the names of the norms that run on an example and that a layer next to them could absorb."""
    graph = _Graph(model, example)
    return {name for name in graph.ins if graph.before(name) or graph.after(name) or graph.beside(name)}


class _Graph:
    def __init__(self, model: nn.Module, example: Any) -> None:
        self.ins: defaultdict[str, list[Any]] = defaultdict(list)
        self.outs: defaultdict[str, list[Any]] = defaultdict(list)
        self.readers: defaultdict[_Edge, list[Any]] = defaultdict(list)
        names = {found.module: found.name for found in find_norms(model)}
        self.channels = {name: len(norm.running_mean) for norm, name in names.items()}

        def begin(norm: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            marked = _Mark.apply(x)
            self.ins[names[norm]].append(marked.grad_fn)
            return (marked, *args[1:])

        def end(norm: nn.Module, _args: Any, y: Tensor) -> Any:
            marked = _Mark.apply(y)
            self.outs[names[norm]].append(marked.grad_fn)
            return marked

        handles = [norm.register_forward_pre_hook(begin) for norm in names]
        handles += [norm.register_forward_hook(end) for norm in names]
        needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            model.requires_grad_(True)
            with torch.enable_grad():
                outputs = pytree.tree_leaves(call(model.eval(), example))
        finally:
            for handle in handles:
                handle.remove()
            for parameter, value in needed:
                parameter.requires_grad_(value)
        ends = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        for leaf in ends:
            self.readers[leaf.grad_fn, leaf.output_nr].append("output")
        self._walk([leaf.grad_fn for leaf in ends] + [n for nodes in self.ins.values() for n in nodes])

    def _walk(self, roots: Iterable[Any]) -> None:
        waiting, seen = list(roots), set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            for other, number in node.next_functions:
                if other is not None:
                    self.readers[other, number].append(node)
                    waiting.append(other)

    def before(self, name: str) -> bool:
        """Return whether a norm reads only layers that have no other reader, and weights of their own."""
        sources: list[Any] = []
        for node in self.ins[name]:
            found = self._sources(node.next_functions[0])
            if found is None:
                return False
            is_whole = len(found) == 1
            if is_whole and not self._fits(found[0], self.channels[name], outputs=True):
                return False
            sources += found
        return self._serve_only(sources) and len(sources) == len({id(source) for source in sources})

    def _sources(self, edge: _Edge) -> list[Any] | None:
        """Return the layers that alone make a value, past layouts, averages, sums and concatenations."""
        node = edge[0]
        if node is None or len(self.readers[edge]) != 1:
            return None
        if self._weight(node):
            return [node]
        parts = [edge for edge in node.next_functions if edge[0] is not None]
        if _is(node, _SUMS) or (_is(node, (_CAT,)) and node._saved_dim in _CHANNELS):
            if _is(node, (_CAT,)) and len(parts) < len(node.next_functions):
                return None
            found = [self._sources(part) for part in parts]
            return None if None in found else [layer for layers in found for layer in layers or ()]
        return self._sources(node.next_functions[0]) if _hands_on(node) else None

    def beside(self, name: str) -> bool:
        """Return whether a convolution of a norm's input that could give it back is added to the norm."""
        if len(self.ins[name]) != 1:
            return False
        (own,), (node,) = self.ins[name], self.outs[name]
        while len(readers := self.readers[node, 0]) == 1 and readers != ["output"] and _is(readers[0], _SUMS):
            node = readers[0]
        if node is self.outs[name][0]:
            return False
        input_ = own.next_functions[0]
        return any(
            _gives_its_input(term) and term.next_functions[0] == input_ and self._serve_only([term])
            for term in self._terms((node, 0))
        )

    def _terms(self, edge: _Edge) -> Iterable[Any]:
        """Yield the nodes that are added, past norms that the layer before them takes."""
        node = edge[0]
        marked = [name for name, nodes in self.outs.items() if node in nodes]
        if marked and self.before(marked[0]):
            yield from self._terms(self.ins[marked[0]][0].next_functions[0])
        elif node is not None and _is(node, _SUMS):
            for part in node.next_functions:
                yield from self._terms(part)
        elif node is not None and len(self.readers[edge]) == 1:
            yield node

    def after(self, name: str) -> bool:
        """Return whether all readers of a norm are layers without padding, and with weights of their own."""
        layers: list[Any] = []
        joined = False
        waiting = list(self.outs[name])
        while waiting:
            node = waiting.pop()
            readers = self.readers[node, 0]
            if not readers:
                return False
            for reader in readers:
                is_joined = reader != "output" and _is(reader, (_CAT,)) and reader._saved_dim in _CHANNELS
                if reader != "output" and (_hands_on(reader) or is_joined):
                    joined = joined or is_joined
                    waiting.append(reader)
                elif (
                    reader == "output"
                    or not self._weight(reader)
                    or not _is_unpadded(reader)
                    or not (joined or self._fits(reader, self.channels[name], outputs=False))
                ):
                    return False
                else:
                    layers.append(reader)
        return self._serve_only(layers)

    def _weight(self, node: Any) -> Any:
        """Return the parameter's node that a layer multiplies by, or None for any other node."""
        if _is(node, (_CONVOLUTION,)):
            return node.next_functions[1][0]
        if not _is(node, _PRODUCTS):
            return None
        factor = node.next_functions[-1][0]
        while factor is not None and _is(factor, _LAID_OUT):
            factor = factor.next_functions[0][0]
        return factor if factor is not None and type(factor).__name__ == "AccumulateGrad" else None

    def _fits(self, node: Any, channels: int, *, outputs: bool) -> bool:
        """Return whether a product has as many channels as the norm; a convolution always has."""
        weight = self._weight(node)
        return _is(node, (_CONVOLUTION,)) or weight.variable.shape[0 if outputs else 1] == channels

    def _serve_only(self, layers: list[Any]) -> bool:
        for layer in layers:
            waiting = [self._weight(layer)]
            while waiting:
                for reader in self.readers[waiting.pop(), 0]:
                    if reader != "output" and _is(reader, _LAID_OUT):
                        waiting.append(reader)
                    elif reader not in layers:
                        return False
        return True


def _is(node: Any, kinds: tuple[str, ...]) -> bool:
    return str(node.name()).removesuffix("0").removesuffix("Backward") in kinds


def _is_unpadded(node: Any) -> bool:
    return not _is(node, (_CONVOLUTION,)) or not (any(node._saved_padding) or node._saved_transposed)


def _hands_on(node: Any) -> bool:
    """Return whether a node lays its input out anew, or averages data within each channel."""
    if _is(node, ("AvgPool2D",)) and any(node._saved_padding) and node._saved_count_include_pad:
        return False
    return _is(node, (*_LAID_OUT, *_AVERAGES))


def _gives_its_input(node: Any) -> bool:
    """Return whether a node is a convolution of which some weights return the input."""
    if not _is(node, (_CONVOLUTION,)) or node._saved_transposed or any(s != 1 for s in node._saved_stride):
        return False
    weight = node.next_functions[1][0]
    shape = getattr(weight, "variable", torch.empty(0)).shape
    if len(shape) < 3 or shape[0] != shape[1] * node._saved_groups:
        return False
    sizes = zip(shape[2:], node._saved_dilation, node._saved_padding, strict=True)
    return all(size % 2 and 2 * pad == step * (size - 1) for size, step, pad in sizes)
