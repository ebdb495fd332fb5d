"""Finds the plain layer that a SyncBatchNorm stands for: its class does not tell the rank of its input."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn
from torch.fx import Node

from batchnorm.errors import OptionError
from batchnorm.torch.sync import SyncBatchNorm

from .fusion.rewrite import calls_of
from .graph.module_graph import called
from .graph.recorded import recorded_flow
from .norms.activations import call_activation, module_activation
from .norms.find import Found

_PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_ADDS = ("add", "iadd", "add_")


def plain_classes(model: nn.Module, norms: list[Found], example: Any) -> dict[nn.Module, type[nn.Module]]:
    """Return BatchNorm1d, 2d or 3d for each SyncBatchNorm, by the rank of its input on an example.

    Without an example, or where it does not reach the layer, the name of a layer next to it tells the rank (a
    Conv2d before it, a MaxPool3d behind it), past activations and additions, in forwards that are graphs.

    Raises:
        OptionError: nothing tells, or a layer receives inputs of different kinds; by name.
    """
    if not norms:
        return {}
    dims: dict[nn.Module, set[int]] = defaultdict(set)
    if example is not None:
        flow, _ = recorded_flow(model, example, {found.module for found in norms})
        for norm, calls in flow.by_module().items():
            dims[norm] |= {max(1, len(call.reads[0].shape or ()) - 2) for call in calls}
    unseen = {found.module for found in norms if not dims[found.module]}
    for block, node, norm in calls_of(unseen, model):
        dims[norm] |= _ranks_beside(node, block)
    for found in norms:
        if len(dims[found.module]) != 1:
            told = "nothing tells" if not dims[found.module] else "it is called with several of them, as to"
            raise OptionError(
                f"{told} the rank of its input, so that it could be a BatchNorm1d, 2d or 3d: "
                "pass example= that runs it, or set its place in the model to the layer that you want",
                str(found),
            )
    return {norm: _PLAIN[rank] for norm, (rank,) in dims.items()}


def _ranks_beside(start: Node, module: nn.Module) -> set[int]:
    """Return the ranks of the nearest layers, past activations and additions."""
    ranks: set[int] = set()
    seen, todo = {start}, [*start.all_input_nodes, *start.users]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        layer = called(node, module)
        rank = None if layer is None else _rank_of(layer)
        if rank is not None:
            ranks.add(rank)
        elif _is_elementwise(node, layer):
            todo += [*node.all_input_nodes, *node.users]
    return ranks


def _rank_of(layer: nn.Module) -> int | None:
    """Return 2 for Conv2d, MaxPool2d, BatchNorm2d and other layers of torch whose names end so."""
    names = [cls.__name__ for cls in type(layer).__mro__ if cls.__module__.startswith("torch.nn.modules.")]
    if "Linear" in names:
        return 1
    found = re.search(r"([123])d$", names[0]) if names else None
    return None if found is None else int(found[1])


def _is_elementwise(node: Node, layer: nn.Module | None) -> bool:
    if layer is not None:
        keeps_rank = isinstance(layer, (nn.Identity, nn.Dropout, nn.SyncBatchNorm, SyncBatchNorm))
        return keeps_rank or module_activation(layer) is not None
    name = getattr(node.target, "__name__", node.target)
    return call_activation(node) is not None or (node.op.startswith("call_") and name in _ADDS)
