"""Reads the flow of a block off the graph of its forward, which holds for every input."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from .flow import Call, Flow, Value
from .module_graph import Block, called, described
from .module_hooks import has_hooks

# In evaluation they return their input.
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
_METADATA = ("size", "dim", "numel", "shape", "dtype", "device", "ndim")


def traced_flow(module: nn.Module, block: Block) -> Flow:
    """Return the calls in the forward of `module`, as its graph in evaluation; a child is one call."""
    flow = Flow()
    values: dict[Node, Value] = {}
    for node in block.graph.nodes:
        if node.op == "placeholder" or _is_metadata(node):
            values[node] = Value()
        elif node.op == "get_attr":
            flow.read.add(id(operator.attrgetter(str(node.target))(module)))
            values[node] = Value()
        else:
            call = _call(module, node, values)
            flow.calls.append(call)
            values[node] = call.give()
    return flow


def _call(module: nn.Module, node: Node, values: dict[Node, Value]) -> Call:
    reads = [values[read] for read in _read(node)]
    if node.op == "output":
        return Call("the end of its block", None, reads)
    child, what = called(node, module), described(node, module)
    if child is None:
        return Call(what, None, reads, axes="same" if _is_dropout_in_evaluation(node) else None)
    if not node.args or not isinstance(node.args[0], Node):  # which of its keyword arguments is its input?
        return Call(what, None, reads)
    is_identity = type(child) in IDENTITIES and not has_hooks(child)
    return Call(what, child, reads, axes="same" if is_identity else None)


def _read(node: Node) -> list[Node]:
    """Return what a node reads, in the order of its arguments, with repetitions."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _is_metadata(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA


def _is_dropout_in_evaluation(node: Node) -> bool:
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train"))
    return training is False and isinstance(node.args[0], Node)
