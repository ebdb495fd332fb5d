"""Finds what surrounds each norm in the forward: biases, dropout, the number of calls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from batchnorm.doctor.records import DecayedGroup, ModelState, Place
from batchnorm.models.folding.foldable_layers import absorber_of, is_plain
from batchnorm.models.fusion.plan import inner_first, is_block
from batchnorm.models.graph.flow import Call, Flow, joined
from batchnorm.models.graph.module_graph import NotTraceableError, traced
from batchnorm.models.graph.recorded import recorded_flow
from batchnorm.models.graph.traced import IDENTITIES, traced_flow
from batchnorm.models.norms.find import Found, find_norms
from batchnorm.models.norms.state import norm_state

_DROPOUTS = tuple(set(IDENTITIES) - {nn.Identity})
# Operators of exported graphs, and where each says whether it normalizes by the batch; None = always.
_IN_GRAPHS = {
    "batch_norm": 5,
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "cudnn_batch_norm": 5,
    "_native_batch_norm_legit_functional": 5,
    "batch_norm_with_update": None,
    "_batch_norm_with_update": None,
}


def model_state(
    model: nn.Module, example: object, optimizer: torch.optim.Optimizer | None
) -> tuple[ModelState, tuple[str, ...]]:
    """Return what the checks without data look at, and what could not be looked at.

    Args:
        model: it stays as it is.
        example: as of `inspect`; None = forwards are read as graphs.
        optimizer: of the model; None = none.
    """
    norms = find_norms(model)
    states = tuple(map(norm_state, norms))
    places, unchecked = _places(model, norms, example)
    return ModelState(
        name=type(model).__name__,
        framework="torch",
        norms=states,
        training=model.training,
        learns=any(parameter.requires_grad for parameter in model.parameters()),
        places=places,
        decayed=() if optimizer is None else _decayed(norms, optimizer),
        fixed=tuple(name for name, module in model.named_modules() if _is_fixed(module)),
    ), unchecked


def _places(
    model: nn.Module, norms: list[Found], example: object
) -> tuple[dict[str, Place], tuple[str, ...]]:
    leaves = {module for module in model.modules() if absorber_of(module) or isinstance(module, _DROPOUTS)}
    leaves |= {found.module for found in norms}
    names = {module: name for name, module in model.named_modules()}
    unchecked: tuple[str, ...] = ()
    if isinstance(model, torch.jit.ScriptModule):
        return {}, ("a scripted model: what surrounds its norms cannot be told",)
    if example is not None:
        flow, _ = recorded_flow(model, example, leaves)
    else:
        flow, unread = _traced(model, norms)
        if unread:
            unchecked = (
                f"what surrounds {unread} norms, whose forwards are no graphs: pass example= or data",
            )
    calls = flow.by_module()
    places = {
        found.name: _place(found, calls[found.module], calls, names)
        for found in norms
        if calls[found.module] or len(found.names) > 1
    }
    return places, unchecked


def _traced(model: nn.Module, norms: list[Found]) -> tuple[Flow, int]:
    """Return the flows of all blocks that are graphs, and the number of norms that none of them calls."""
    flows = []
    for module in inner_first(model):
        if is_block(module) and absorber_of(module) is None:
            try:
                flows.append(traced_flow(module, traced(module, modes=(False,))))
            except NotTraceableError:
                continue
    flow = joined(flows)
    called = flow.by_module()
    return flow, sum(found.module not in called for found in norms if found.name)


def _place(
    found: Found,
    calls: list[Call],
    by_module: defaultdict[nn.Module, list[Call]],
    names: dict[nn.Module, str],
) -> Place:
    if not calls:
        return Place(len(found.names))
    first = calls[0].reads[0] if calls[0].reads else None
    maker = None if first is None else first.maker
    dropout, rate = _dropout(maker, names)
    values = None
    if first is not None and first.shape is not None and len(first.shape) > 1:
        sizes = [size for size in first.shape[2:] if size is not None]
        values = math.prod(sizes) if len(sizes) == len(first.shape) - 2 else None
    biased: tuple[str, ...] = ()
    if len(calls) == 1 and maker is not None and first is not None and len(first.readers) == 1:
        before = maker.module
        # A layer that is called elsewhere too needs its bias there, and so may whatever hooks onto it.
        if before is not None and len(by_module[before]) == 1 and _has_own_bias(before, names):
            biased = (names[before],)
    return Place(max(len(calls), len(found.names)), biased, dropout, rate, values)


def _has_own_bias(layer: nn.Module, names: Collection[nn.Module]) -> bool:
    return (
        layer in names
        and absorber_of(layer) is not None
        and is_plain(layer)
        and isinstance(layer._parameters.get("bias"), nn.Parameter)
    )


def _dropout(maker: Call | None, names: dict[nn.Module, str]) -> tuple[str | None, float | None]:
    """Return the dropout that made a value and its rate; (None, None) for any other call."""
    if maker is None:
        return None, None
    module = maker.module
    if module is not None and isinstance(module, _DROPOUTS):
        rate: Any = vars(module)["p"]
        return f"{names.get(module, '')} ({type(module).__name__})", float(rate)
    is_function = maker.module is None and maker.what.endswith(
        ("dropout", "dropout1d", "dropout2d", "dropout3d")
    )
    return (maker.what, None) if is_function else (None, None)


def _decayed(norms: list[Found], optimizer: torch.optim.Optimizer) -> tuple[DecayedGroup, ...]:
    owner = {id(parameter): found.name for found in norms for parameter in found.module.parameters()}
    groups = []
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay", 0.0) or 0.0)
        held = dict.fromkeys(owner[id(p)] for p in group["params"] if id(p) in owner)
        if decay and held:
            groups.append(DecayedGroup(decay, float(group.get("lr", 0.0)), tuple(held)))
    return tuple(groups)


def _is_fixed(module: nn.Module) -> bool:
    """Whether a graph normalizes by the batch whatever mode it is set to."""
    if not isinstance(module, GraphModule):
        return False
    for node in module.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        if node.op == "call_function" and "aten" in str(node.target) and name in _IN_GRAPHS:
            place = _IN_GRAPHS[name]
            if place is None or (len(node.args) > place and node.args[place] is True):
                return True
    return False
