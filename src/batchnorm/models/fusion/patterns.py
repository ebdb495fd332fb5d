"""Matches norm → (add →) activation in the graph of a block."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Graph, Node

from batchnorm.models.graph.module_graph import called, described
from batchnorm.models.graph.module_hooks import has_hooks
from batchnorm.models.norms.activations import call_activation, module_activation

_ADDS = (operator.add, torch.add)
_IN_PLACE = (operator.iadd,)


@dataclass(frozen=True)
class Site:
    """A call of a norm and the calls behind it that become one layer with it.

    Attributes:
        norm: the call of the norm.
        path: of the norm in the block.
        add: the addition behind it, or None.
        residual: what is added; None without an addition.
        in_place: the addition writes into the norm's output.
        act: the call of the activation, or None (then there is an addition).
        activation: its name, or None.
        passed: calls of nn.Identity in between.
    """

    norm: Node
    path: str
    add: Node | None
    residual: Node | None
    in_place: bool
    act: Node | None
    activation: str | None
    passed: tuple[Node, ...]

    def __str__(self) -> str:
        return ", ".join(part for part in ("add" if self.add else None, self.activation) if part)


def site_of(call: Node, module: nn.Module, *, is_end: bool = False) -> Site | str:
    """Return what can become one layer with the norm that `call` calls, or why nothing can.

    Args:
        call: in the graph of `module`.
        module: the block.
        is_end: `call` is of a child that ends with the norm, so that its input is not the norm's.
    """
    if not is_end and (len(call.args) != 1 or call.kwargs):
        return "it is called with more than its input"
    passed: list[Node] = []
    reader = _only_reader(call, module, passed)
    if isinstance(reader, str):
        return reader
    act = _activation(reader, module)
    if act is not None:
        return Site(call, str(call.target), None, None, False, reader, act, tuple(passed))
    behind = passed[-1] if passed else call
    addition = _addition(reader, behind)
    if addition is None:
        return f"its output goes to {described(reader, module)}"
    residual, in_place = addition
    if not is_end and _is_read_between(call.args[0], call, reader):
        return "its input is read again before the addition"
    after: list[Node] = []
    last = _only_reader(reader, module, after)
    act = None if isinstance(last, str) else _activation(last, module)
    if isinstance(last, str) or act is None:
        return Site(call, str(call.target), reader, residual, in_place, None, None, tuple(passed))
    return Site(call, str(call.target), reader, residual, in_place, last, act, (*passed, *after))


def tail(graph: Graph, module: nn.Module, is_tail: Callable[[nn.Module], bool]) -> str | None:
    """Return the path of the child whose output is exactly the output of the graph, if `is_tail` of it."""
    (end,) = (node for node in graph.nodes if node.op == "output")
    last = end.args[0]
    while isinstance(last, Node) and len(last.users) == 1 and (child := called(last, module)) is not None:
        if is_tail(child):
            return str(last.target)
        if not _is_identity(child):
            return None
        last = last.args[0] if last.args else None
    return None


def _only_reader(node: Node, module: nn.Module, passed: list[Node]) -> Node | str:
    while True:
        if len(node.users) != 1:
            return f"its output is read {len(node.users)} times" if node.users else "nothing reads its output"
        (reader,) = node.users
        if reader.op == "output":
            return "its output is the block's"
        child = called(reader, module)
        if child is None or not _is_identity(child):
            return reader
        passed.append(reader)
        node = reader


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and not has_hooks(module)


def _activation(node: Node, module: nn.Module) -> str | None:
    child = called(node, module)
    if child is None:
        return call_activation(node)
    return module_activation(child) if len(node.args) == 1 else None


def _addition(node: Node, norm: Node) -> tuple[Node, bool] | None:
    """Return what is added to the norm's output and whether in place; None for anything else."""
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    is_function = node.op == "call_function" and node.target in (*_ADDS, *_IN_PLACE)
    if not (is_method or is_function) or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    in_place = node.target in (*_IN_PLACE, "add_")
    if in_place and first is not norm:
        return None  # it writes into the other operand
    other = second if first is norm else first
    return (other, in_place) if isinstance(other, Node) and other is not norm else None


def _is_read_between(node: object, call: Node, addition: Node) -> bool:
    """Whether another call reads, and may write to, the norm's input before the addition."""
    if not isinstance(node, Node):
        return True
    return any(call < reader < addition for reader in node.users if reader is not call)
