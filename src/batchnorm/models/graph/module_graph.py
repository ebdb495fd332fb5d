"""Traces the forward of one block as a graph in which each child is a single call.

Networks with control flow, checks of shapes or loops cannot be traced as a whole, but most of their blocks
can. A graph holds for every input, and needs no example.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer

from .module_hooks import has_hooks, is_forward_replaced


class NotTraceableError(Exception):
    """The forward of a module cannot be traced; the message says why."""


@dataclass(frozen=True)
class Read:
    """A plain attribute that a forward read: the graph holds for this value only."""

    path: str
    name: str
    value: Any


@dataclass(frozen=True)
class Block:
    """The forward of one module.

    Attributes:
        graph: its calls; a child is one call, unless it is in `inlined`.
        inlined: paths of the children whose own calls are in the graph.
        reads: plain attributes that the graph depends on.
        lists: lists of modules whose children the forward calls, with the names of all children.
        rewritable: "" where a rewritten forward can replace this one, else why not.
    """

    graph: Graph
    inlined: tuple[str, ...]
    reads: tuple[Read, ...]
    lists: tuple[tuple[str, tuple[str, ...]], ...]
    rewritable: str


def traced(
    module: nn.Module, inlined: tuple[str, ...] = (), modes: tuple[bool, ...] = (True, False)
) -> Block:
    """Return the forward of a module as a graph; the module itself neither runs nor changes.

    Args:
        module: the block.
        inlined: paths of children whose own calls shall be in the graph.
        modes: training, evaluation or both; the graph must be the same in both.

    Raises:
        NotTraceableError: the forward has control flow that depends on an input, draws random numbers, keeps
            tensors in attributes, or is another in training than in evaluation.
    """
    if isinstance(module, torch.jit.ScriptModule) or is_forward_replaced(module):
        raise NotTraceableError("it is scripted, or its forward was replaced on the instance")
    for part in (module, *(module.get_submodule(path) for path in inlined)):
        if _has_optional_arguments(part):  # given as a symbol, None is not None
            raise NotTraceableError("its forward has optional arguments")
    for path in inlined:
        child = module.get_submodule(path)
        if has_hooks(child) or is_forward_replaced(child):
            raise NotTraceableError(f"{path} has hooks")
    graphs, reads = [], []
    for training in modes:
        graph, read = _trace(module, inlined, training)
        graphs.append(graph)
        reads += read
    if _text(graphs[0]) != _text(graphs[-1]):
        raise NotTraceableError("its forward is another in training than in evaluation")
    constants = {(read.path, read.name): read for read in reads}
    why_not = _rewritable(module, constants.values())
    return Block(graphs[0], inlined, tuple(constants.values()), _lists(module, graphs[0]), why_not)


def called(node: Node, module: nn.Module) -> nn.Module | None:
    """Return the child that a node of the graph of `module` calls; None for any other node."""
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def described(node: Node, module: nn.Module) -> str:
    """Return what a node of the graph of `module` calls, in words."""
    child = called(node, module)
    if child is None:
        return str(getattr(node.target, "__name__", node.target))
    return f"{node.target} ({type(child).__name__})"


def _has_optional_arguments(module: nn.Module) -> bool:
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters)


def _text(graph: Graph) -> str:
    return graph.python_code("self").src


def _trace(module: nn.Module, inlined: tuple[str, ...], training: bool) -> tuple[Graph, list[Read]]:
    reads: list[Read] = []
    shadow = _shadow(module, "", inlined, training, reads)
    try:
        with _no_random_numbers():
            graph = _BlockTracer(inlined).trace(shadow)
    except NotTraceableError:
        raise
    except Exception as error:  # a user's forward may raise anything when it is given symbols
        lines = str(error).strip().splitlines()
        raise NotTraceableError(lines[0] if lines else type(error).__name__) from error
    if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes):
        raise NotTraceableError("its forward makes tensors of its own")
    if any(isinstance(kept, Proxy) for part in vars(shadow).values() for kept in _items(part)):
        raise NotTraceableError("its forward keeps a tensor in an attribute")
    return graph, reads


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple, set)):
        return value
    return value.values() if isinstance(value, dict) else (value,)


class _BlockTracer(Tracer):
    proxy_buffer_attributes = True  # else a forward that counts in a buffer would count while it is traced

    def __init__(self, inlined: tuple[str, ...]) -> None:
        super().__init__()
        self._inlined = inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return module_qualified_name not in self._inlined

    def proxy(self, node: Node) -> Proxy:
        return _Symbol(node, self)


# Modules of torch that look at the class of a symbol while they trace.
_TRACING = ("torch.fx", "torch.utils._pytree", "torch.overrides", "torch.nn.parameter")


def _augmented(function: Any) -> Any:
    def assign(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


class _Symbol(Proxy):
    """A symbol that refuses to tell a forward its class, as `isinstance(x, Tensor)` would be false."""

    @property
    def __class__(self) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(_TRACING):
            return type(self)
        raise NotTraceableError("its forward asks for the class of a value")

    @__class__.setter
    def __class__(self, _cls: Any) -> None:
        raise AttributeError("__class__")


# fx has no augmented assignment: x += y would be x = x + y, which leaves the caller's x alone.
for _assign in (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift,
    operator.irshift,
):  # fmt: skip
    setattr(_Symbol, f"__{_assign.__name__}__", _augmented(_assign))


def _shadow(
    module: nn.Module, path: str, inlined: tuple[str, ...], training: bool, reads: list[Read]
) -> nn.Module:
    """Return a stand-in for tracing: the same children and tensors, but its own attributes.

    It records which plain attributes a forward reads, as they become constants of the graph.
    """
    cls = type(module)
    attributes = {k: v.copy() if isinstance(v, (dict, set, list)) else v for k, v in vars(module).items()}
    attributes["training"] = training

    def noting(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if name in attributes and not name.startswith("__") and name not in _OF_MODULE:
            reads.append(Read(path, name, value))
        return value

    shadow: nn.Module = object.__new__(type(cls.__name__, (cls,), {"__getattribute__": noting}))
    vars(shadow).update(attributes)
    for child in inlined:
        parent, _, name = child.rpartition(".")
        if parent == path:
            part = module.get_submodule(name)
            vars(shadow)["_modules"][name] = _shadow(part, child, inlined, training, reads)
    return shadow


_OF_MODULE = frozenset(vars(nn.Module()))


_CONSTANT = (type(None), bool, int, float, str, torch.dtype, FunctionType, BuiltinFunctionType, type)
_LISTS = (nn.ModuleList, nn.ModuleDict)


def _rewritable(module: nn.Module, reads: Iterable[Read]) -> str:
    cls = type(module)
    for read in reads:
        parts = read.value if isinstance(read.value, tuple) else (read.value,)
        if not all(isinstance(part, _CONSTANT) for part in parts):
            return f"{cls.__name__}.forward reads {read.name}, which may change"
    for name in ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"):
        if getattr(cls, name, None) is not getattr(nn.Module, name, None):
            return f"{cls.__name__} has a {name} of its own"
    return ""


def _lists(module: nn.Module, graph: Graph) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the module lists whose children are called, with their names: a loop over one is unrolled."""
    parents = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "call_module"}
    lists = {path: module.get_submodule(path) for path in sorted(parents)}
    return tuple((path, tuple(part._modules)) for path, part in lists.items() if isinstance(part, _LISTS))


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raise NotTraceableError if the block draws random numbers; restore the generators."""
    before, before_numpy, before_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
        is_same = (
            random.getstate() == before
            and all(map(np.array_equal, np.random.get_state(), before_numpy))
            and torch.equal(torch.get_rng_state(), before_torch)
        )
        if not is_same:
            raise NotTraceableError("its forward draws random numbers")
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
        torch.set_rng_state(before_torch)
