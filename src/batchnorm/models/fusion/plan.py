"""Decides what `fuse` does with each batch normalization, and why not, before anything changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from batchnorm.models.graph.flow import Call
from batchnorm.models.graph.module_graph import Block, NotTraceableError, called, traced
from batchnorm.models.graph.module_hooks import is_forward_replaced, sees_output
from batchnorm.models.graph.recorded import recorded_flow
from batchnorm.models.norms.activations import module_activation
from batchnorm.models.norms.find import Found, all_names, find_norms
from batchnorm.models.norms.kinds import is_ours
from batchnorm.models.norms.timm import BatchNormAct2d, inner_activation, is_bare

from .fused_activation import FusedActivation
from .patterns import Site, site_of, tail
from .rewrite import FusedForward, Spec, call_of


@dataclass
class Plan:
    """The decisions for a model.

    Attributes:
        norms: all batch normalizations of the model.
        pairs: norm -> the activation module behind it, which becomes an identity.
        rewrites: block -> what to rewrite in its forward.
        fuses_with: norm -> what becomes one layer with it, in words.
        reasons: norm -> why it stays.
    """

    norms: list[Found]
    pairs: dict[nn.Module, nn.Module] = field(default_factory=dict)
    rewrites: dict[nn.Module, Spec] = field(default_factory=dict)
    fuses_with: dict[nn.Module, str] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


def plan(model: nn.Module, example: Any = None) -> Plan:
    """Decide for every norm of `model`.

    Args:
        model: it stays as it is.
        example: as of `fuse`; None = nothing runs, and norms in forwards that are no graph stay.
    """
    decided = _Planner(model).plan
    if example is not None:
        _add_recorded(decided, model, example)
    return decided


def _add_recorded(decided: Plan, model: nn.Module, example: Any) -> None:
    """Add the norms whose output goes to one activation module only, on an example in both modes."""
    waiting = [f.module for f in decided.norms if f.module not in decided.fuses_with and not unfit(f)]
    if not waiting:
        return
    names = all_names(model)
    acts = [module for module in names if module_activation(module) is not None]
    shared = {act for act in acts if len(names[act]) > 1} | set(decided.pairs.values())
    leaves = {*acts, *(found.module for found in decided.norms)}
    runs: list[dict[nn.Module, list[Call]]] = []
    for training in (False, True):
        try:
            runs.append(recorded_flow(model, example, leaves, training=training)[0].by_module())
        except Exception:
            if not training:
                raise  # a model that cannot run in training has one mode; the comparison says so
    for norm in waiting:
        found = [_only_reader(norm, calls) for calls in runs]
        refusals = [reason for reason in found if isinstance(reason, str)]
        act = found[0]
        if not refusals and found[-1] is not act:
            refusals.append("on the example its output goes elsewhere in training than in evaluation")
        elif not refusals and act in shared:
            refusals.append(_shared(act))
        if refusals:
            if "pass example=" in decided.reasons[norm]:
                decided.reasons[norm] = refusals[-1]
            continue
        assert isinstance(act, nn.Module)
        shared.add(act)
        decided.pairs[norm] = act
        decided.fuses_with[norm] = f"{module_activation(act)} (as on the example)"
        decided.reasons.pop(norm, None)


def _only_reader(norm: nn.Module, calls: dict[nn.Module, list[Call]]) -> nn.Module | str:
    """Return the activation module that alone reads what a norm returned, each called once; else why not."""
    own = calls.get(norm, [])
    if len(own) != 1:
        return f"it is called {len(own)} times on the example"
    readers = [reader for value in own[0].gives for reader in value.readers]
    count = len(readers) + sum(value.aliased for value in own[0].gives)
    if count != 1 or not readers:
        return f"on the example its output is read {count} times"
    act = readers[0].module
    if act is None or module_activation(act) is None:
        return f"on the example its output goes to {readers[0].what}"
    if len(calls[act]) != 1:
        return _shared(act)
    return act


def _shared(act: nn.Module) -> str:
    return f"on the example its output goes to {type(act).__name__}, which is shared"


class _Planner:
    def __init__(self, model: nn.Module) -> None:
        self.names = all_names(model)
        self.plan = Plan(find_norms(model))
        self.free: set[nn.Module] = set()  # norms that may still be fused
        for found in self.plan.norms:
            reason = unfit(found)
            if found.kind.family == "timm" and (inside := inner_activation(found.module)):
                self.plan.fuses_with[found.module] = f"{inside} (inside it)"
            elif reason:
                self.plan.reasons[found.module] = reason
            else:
                self.free.add(found.module)
        self.blocks: dict[nn.Module, Block] = {}
        self.untraceable: dict[nn.Module, str] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.tails: dict[nn.Module, str] = {}
        blocks = [module for module in inner_first(model) if is_block(module)]
        for module in blocks:
            self._trace(module)
        for module in blocks:
            if module in self.blocks:
                self._decide(module, self.blocks[module])
        for found in self.plan.norms:
            if found.module in self.free and found.module not in self.plan.reasons:
                self.plan.reasons[found.module] = self._unseen(model, found.name)

    def _trace(self, module: nn.Module) -> None:
        try:
            block = traced(module)
        except NotTraceableError as error:
            self.untraceable[module] = str(error)
            return
        self.blocks[module] = block
        children = (called(node, module) for node in block.graph.nodes)
        self.calls.update(child for child in children if child is not None)

    def _decide(self, module: nn.Module, block: Block) -> None:
        """Decide for the norms that `module` calls, then for those that its children end with."""
        used: set[Node] = set()  # additions and activations that are fused with a norm already
        specs: dict[str, str | None] = {}
        inlined: list[str] = []
        calls = {node: child for node in block.graph.nodes if (child := called(node, module)) is not None}
        direct = [node for node, child in calls.items() if child in self.free]
        ends = [node for node, child in calls.items() if self._ends_with_norm(child)]
        for node in (*reversed(direct), *reversed(ends)):
            chain = self._chain(module, str(node.target))
            norm = module.get_submodule(chain[-1])
            site = self._site(node, calls[node], module, used)
            if isinstance(site, str):
                self.plan.reasons[norm] = site
                continue
            act = None if site.act is None or site.add is not None else calls.get(site.act)
            if act is not None and self._is_only_here(act):
                self.plan.pairs[norm] = act
            elif block.rewritable or not self._can_inline(module, chain, specs):
                self.plan.reasons[norm] = block.rewritable or "the block that it ends cannot be inlined"
                continue
            else:
                specs[chain[-1]] = site.activation
                inlined += chain[:-1]
            used |= {part for part in (site.add, site.act) if part is not None}
            self.free.discard(norm)
            self.plan.reasons.pop(norm, None)
            self.plan.fuses_with[norm] = str(site)
        if specs:
            self.plan.rewrites[module] = Spec(tuple(inlined), tuple(specs.items()))
        end = tail(block.graph, module, lambda child: child in self.free or self._ends_with_norm(child))
        if end is not None:
            self.tails[module] = end

    def _site(self, node: Node, child: nn.Module, module: nn.Module, used: set[Node]) -> Site | str:
        """Return what follows the call of a child, unless it is called elsewhere too."""
        places = self.names[child]
        if len(places) > 1:
            return f"it is shared: {', '.join(places)}"
        if self.calls[child] > 1:
            return f"it is called {self.calls[child]} times"
        site = site_of(node, module, is_end=child not in self.free)
        if isinstance(site, Site) and {site.add, site.act} & used:
            return "the addition behind it is fused with another norm"
        return site

    def _ends_with_norm(self, module: nn.Module) -> bool:
        """Whether the output of a block is that of a norm which may still be fused."""
        while module in self.tails:
            module = module.get_submodule(self.tails[module])
        return module in self.free

    def _chain(self, module: nn.Module, path: str) -> list[str]:
        """Return the paths from a child down to the norm that it is or ends with."""
        chain = [path]
        while (child := module.get_submodule(chain[-1])) in self.tails:
            chain.append(f"{chain[-1]}.{self.tails[child]}")
        return chain

    def _is_only_here(self, act: nn.Module) -> bool:
        return len(self.names[act]) == 1 and self.calls[act] == 1 and module_activation(act) is not None

    def _can_inline(self, module: nn.Module, chain: list[str], specs: dict[str, str | None]) -> bool:
        """Whether the forward of `module` can contain the calls of the blocks in a chain."""
        if len(chain) == 1:
            return True
        if any(module.get_submodule(path) in self.plan.rewrites for path in chain[:-1]):
            return False
        try:
            block = traced(module, tuple(chain[:-1]))
        except NotTraceableError:
            return False
        call = call_of(block.graph, chain[-1])
        return (
            not block.rewritable
            and call is not None
            and isinstance(site_of(call, module), Site)
            and chain[-1] not in specs
        )

    def _unseen(self, model: nn.Module, name: str) -> str:
        """Return why no traced forward calls a norm: that of a block around it could not be traced."""
        while name:
            name = name.rpartition(".")[0]
            block = model.get_submodule(name)
            if block in self.untraceable:
                return (
                    f"{type(block).__name__}.forward is no graph ({self.untraceable[block]}): pass example="
                )
            if isinstance(block, FusedForward):
                return "the block around it is fused already"
            if block in self.blocks:
                break
        return "no forward is seen to call it: pass example="


def unfit(found: Found) -> str:
    """Return why a norm cannot be fused, whatever follows it; "" if it can."""
    norm, family = found.module, found.kind.family
    if family == "other" and not is_ours(norm):
        return "its class is not known: it may compute something else"
    if family == "frozen":
        return "its class is frozen: batchnorm.convert makes it a layer that can be fused"
    if "Lazy" in found.kind.name:
        return "it is not initialized: run the model once"
    if is_ours(norm) and norm.activation is not None:
        return f"it applies {norm.activation} itself"
    if (family == "timm" or isinstance(norm, BatchNormAct2d)) and not is_bare(norm):
        return "it applies what it has inside"
    if sees_output(norm) or is_forward_replaced(norm):
        return "it has hooks or a replaced forward, which would see another output"
    return f"it is shared: {', '.join(found.names)}" if len(found.names) > 1 else ""


def inner_first(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, children before their parents."""
    order: dict[nn.Module, None] = {}

    def visit(part: nn.Module, above: frozenset[nn.Module]) -> None:
        if part in order or part in above:
            return
        for child in part.children():
            visit(child, above | {part})
        order[part] = None

    visit(module, frozenset())
    return list(order)


def is_block(module: nn.Module) -> bool:
    """Whether a module calls others in a forward of its own or of nn.Sequential."""
    if (
        isinstance(module, (FusedForward, FusedActivation, nn.ModuleList, nn.ModuleDict))
        or not module._modules
    ):
        return False
    is_torchs = type(module).__module__.startswith("torch.nn.modules.")
    return not is_ours(module) and (type(module) is nn.Sequential or not is_torchs)
