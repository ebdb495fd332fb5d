"""Finds the plain layer that a SyncBatchNorm stands for: its class does not tell the rank of its input."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import nn
from torch.fx import Node

from batchnorm.errors import OptionError
from batchnorm.torch.sync import SyncBatchNorm

from .fusion.rewrite import traced_as_written
from .graph.blocks import NotTraceableError
from .graph.recorded import recorded_flow
from .norms.activations import call_activation, module_activation
from .norms.find import Found

_PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_ADDS = ("add", "iadd", "add_")


def plain_classes(model: nn.Module, norms: list[Found], example: Any) -> dict[nn.Module, type[nn.Module]]:
    """Return BatchNorm1d, 2d or 3d for each SyncBatchNorm, by what it receives on an example.

    Without an example, or where that does not get there, by a layer beside it whose name tells (a Conv2d
    before it, a MaxPool3d behind it), with activations and additions between, in forwards that are graphs.

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
    if unseen:
        _read(model, unseen, dims)
    for found in norms:
        if len(dims[found.module]) != 1:
            told = "nothing tells" if not dims[found.module] else "it is called with several of them, as to"
            raise OptionError(
                f"{told} the rank of its input, so that it could be a BatchNorm1d, 2d or 3d: "
                "pass example= that runs it, or set its place in the model to the layer that you want",
                str(found),
            )
    return {norm: _PLAIN[rank] for norm, (rank,) in dims.items()}


def _read(model: nn.Module, norms: set[nn.Module], dims: dict[nn.Module, set[int]]) -> None:
    for module in model.modules():
        if not any(part in norms for part in module.modules() if part is not module):
            continue
        try:
            graph = traced_as_written(module).graph
        except NotTraceableError:
            continue
        for node in graph.nodes:
            called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if called in norms:
                dims[called] |= _ranks_beside(node, module)


def _ranks_beside(start: Node, module: nn.Module) -> set[int]:
    """Return what the layers tell that are reached through nothing but activations and additions."""
    ranks: set[int] = set()
    seen, todo = {start}, [*start.all_input_nodes, *start.users]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        rank = None if called is None else _rank_of(called)
        if rank is not None:
            ranks.add(rank)
        elif _is_elementwise(node, called):
            todo += [*node.all_input_nodes, *node.users]
    return ranks


def _rank_of(layer: nn.Module) -> int | None:
    """Return 2 for Conv2d, MaxPool2d, BatchNorm2d and all others of torch whose names end so."""
    names = [cls.__name__ for cls in type(layer).__mro__ if cls.__module__.startswith("torch.nn.modules.")]
    if "Linear" in names:
        return 1
    found = re.search(r"([123])d$", names[0]) if names else None
    return None if found is None else int(found[1])


def _is_elementwise(node: Node, called: nn.Module | None) -> bool:
    if called is not None:
        is_passing = isinstance(called, (nn.Identity, nn.Dropout, nn.SyncBatchNorm, SyncBatchNorm))
        return is_passing or module_activation(called) is not None
    name = getattr(node.target, "__name__", node.target)
    return call_activation(node) is not None or (node.op.startswith("call_") and name in _ADDS)
