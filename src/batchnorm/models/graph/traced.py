"""The flow of a block's own forward, read off its graph: it holds for every input."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from .blocks import Block
from .flow import Call, Flow, Value
from .hooks import has_hooks

# They hand on their input as it is in evaluation.
IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_DROPOUTS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
)
_ABOUT = ("size", "dim", "numel", "shape", "dtype", "device", "ndim")  # they tell of a tensor, not its values


def traced_flow(module: nn.Module, block: Block) -> Flow:
    """Return the calls in the forward of `module`, as its graph in evaluation; a child is one call."""
    flow = Flow()
    values: dict[Node, Value] = {}
    for node in block.graph.nodes:
        if node.op == "placeholder":
            values[node] = Value()
        elif node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(module)
            flow.read.add(id(tensor))
            values[node] = Value()
        elif not _is_about(node):
            call = _call(module, node, values)
            flow.calls.append(call)
            values[node] = call.give()
        else:
            values[node] = Value()
    return flow


def _call(module: nn.Module, node: Node, values: dict[Node, Value]) -> Call:
    reads = [values[read] for read in _read(node)]
    if node.op == "output":
        return Call("the end of its block", None, reads)
    if node.op != "call_module":
        name = str(getattr(node.target, "__name__", node.target))
        return Call(name, None, reads, axes="same" if _is_dropout_in_evaluation(node) else None)
    child = module.get_submodule(str(node.target))
    is_plain = type(child) in IDENTITIES and not has_hooks(child)
    is_first = bool(node.args) and isinstance(node.args[0], Node)
    called = child if is_first else None  # its input is given by name: nothing is known of it
    what = f"{node.target} ({type(child).__name__})"
    return Call(what, called, reads, axes="same" if is_plain and is_first else None)


def _read(node: Node) -> list[Node]:
    """Return what a node reads, once for each time, in the order of its arguments."""
    found: list[Node] = []

    def visit(part: Any) -> None:
        if isinstance(part, Node):
            found.append(part)
        elif isinstance(part, (tuple, list)):
            for item in part:
                visit(item)
        elif isinstance(part, dict):
            for item in part.values():
                visit(item)
        elif isinstance(part, slice):
            visit((part.start, part.stop, part.step))

    visit((node.args, node.kwargs))
    return found


def _is_about(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _ABOUT
    return node.op == "call_function" and node.target is getattr and node.args[1] in _ABOUT


def _is_dropout_in_evaluation(node: Node) -> bool:
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train"))
    return training is False and isinstance(node.args[0], Node)
