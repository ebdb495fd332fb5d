"""Rewrites the forward of a block to call fused layers, with a fallback to its original forward.

The module stays the same object; its class becomes `FusedForward` in front of the original one. The
rewritten forward runs while everything that it depends on is unchanged. Otherwise, such as with a new hook on
an activation that it skips, the original forward runs, with layers that apply no activation. Either way the
result is the same.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from batchnorm.errors import OptionError
from batchnorm.models.graph.module_graph import Block, NotTraceableError, called, traced
from batchnorm.models.graph.module_hooks import has_hooks, sees_output
from batchnorm.models.norms.activations import FUNCTIONS
from batchnorm.models.norms.kinds import is_ours
from batchnorm.torch.symbolic import is_symbolic

from .patterns import Site, site_of


@dataclass(frozen=True)
class Spec:
    """The changes to a block, by names, so that a copy or a file can make them again.

    Attributes:
        inlined: paths of the children whose own calls are in the rewritten forward.
        sites: the path of each fused norm, and the activation that it applies (None: an addition only).
    """

    inlined: tuple[str, ...]
    sites: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class _Made:
    """A rewritten forward and what it depends on."""

    function: Callable[..., Any]
    block: Block
    bypassed: tuple[tuple[str, type[nn.Module]], ...]


class Rewrite:
    """The rewritten forward of one block, made at its first call; files keep its `spec` only."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.made: _Made | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewrite:
        return self  # it holds no module

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "made": None}

    def make(self, module: nn.Module) -> _Made:
        """Return the rewritten forward of `module`; raise OptionError if its class has changed since."""
        if self.made is None:
            self.made = _make(module, self.spec)
        return self.made

    def holds(self, module: nn.Module, made: _Made) -> bool:
        """Whether everything that the rewritten forward depends on is unchanged."""
        for read in made.block.reads:
            now = vars(child_at(module, read.path)).get(read.name, _MISSING)
            if now is not read.value and now != read.value:
                return False
        if any(tuple(child_at(module, path)._modules) != names for path, names in made.block.lists):
            return False
        for path, cls in made.bypassed:
            part = child_at(module, path)
            if type(part) is not cls or has_hooks(part):
                return False
        for path, activation in self.spec.sites:
            norm = child_at(module, path)
            if not is_ours(norm) or norm.activation != activation or sees_output(norm):
                return False
        return True


class FusedForward:
    """The first base of a block's class while its forward is rewritten."""

    _rewrite: Rewrite

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the original class and what to rewrite: the class made here cannot be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_restore, (authors_class(self),), *reduced[2:])


def authors_class(module: Any) -> type:
    """Return the class of a block without `FusedForward`."""
    for cls in type(module).__mro__:
        if FusedForward in cls.__bases__:
            return cls.__bases__[-1]
    return type(module)


@functools.cache
def fused_class(cls: Hashable) -> Any:
    """Return the class of rewritten blocks whose original class is `cls`."""
    assert isinstance(cls, type)
    original: Any = cls

    @functools.wraps(original.forward)  # torch.fx reads its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten forward, or the original one if something has changed."""
        made = self._rewrite.make(self)
        if self._rewrite.holds(self, made):
            return made.function(self, *args, **kwargs)
        if is_symbolic(*args, *kwargs.values()):  # a graph would keep the activations of the layers
            raise OptionError(
                "torch.fx would trace a fused block that has changed since: batchnorm.revert the model first",
                f"{original.__name__} with {self._rewrite.spec.sites[0][0]}",
            )
        with without_activation(self.get_submodule(path) for path, _ in self._rewrite.spec.sites):
            return original.forward(self, *args, **kwargs)

    own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "forward": forward}
    return type(cls.__name__, (FusedForward, cls), own)


def _restore(cls: type) -> Any:
    made = fused_class(cls)
    return copyreg.__newobj__(made)  # type: ignore[attr-defined]


@contextlib.contextmanager
def without_activation(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Let layers apply no activation within the block."""
    before = [(norm, norm.activation) for norm in norms if is_ours(norm)]
    try:
        for norm, _ in before:
            vars(norm)["activation"] = None
        yield
    finally:
        for norm, activation in before:
            vars(norm)["activation"] = activation


def normalize_and_add(norm: nn.Module, input: Tensor, residual: Any, in_place: bool) -> Any:
    """Return activation(norm(input) + residual), in one pass where the addition allows it.

    An addition broadcasts, takes numbers, and in place keeps the dtype of its output; a layer's residual does
    none of that.
    """
    if is_symbolic(input, residual):
        return norm(input, residual)  # one node, whose layer checks the shapes
    is_plain = isinstance(residual, Tensor) and residual.shape == input.shape
    if is_plain and residual.is_floating_point() and residual.device == input.device:
        dtype = torch.promote_types(input.dtype, residual.dtype)
        if not in_place or dtype == input.dtype:
            return norm(input, residual)
    with without_activation([norm]):
        y = norm(input)
    y = y.add_(residual) if in_place else y + residual
    return y if norm.activation is None else FUNCTIONS[str(norm.activation)](y)


_MISSING = object()


def child_at(module: Any, path: str) -> nn.Module:
    """Return `module.get_submodule(path)`, in a third of its time: each forward looks up many parts."""
    for name in path.split(".") if path else ():
        module = module._modules[name]
    assert isinstance(module, nn.Module)
    return module


def _make(module: nn.Module, spec: Spec) -> _Made:
    block = traced_as_written(module, spec.inlined)
    sites = {}
    for path, activation in spec.sites:
        call = call_of(block.graph, path)
        site = "it is not called" if call is None else site_of(call, module)
        if isinstance(site, str) or site.activation != activation:
            found = site if isinstance(site, str) else f"{site} follows it"
            raise OptionError(
                f"the forward of {authors_class(module).__name__} is not the one that was fused ({found}): "
                "batchnorm.revert the model where the code is as it was",
                path,
            )
        sites[path] = site
    replaced: dict[Node, Node] = {}
    bypassed = dict.fromkeys(spec.inlined)
    for site in sites.values():
        skipped = [node for node in (*site.passed, site.act) if node is not None and node.op == "call_module"]
        bypassed |= dict.fromkeys(str(node.target) for node in skipped)
        _fuse(block.graph, site, replaced)
    classes = tuple((path, type(module.get_submodule(path))) for path in bypassed)
    return _Made(_compiled(block.graph), block, classes)


def traced_as_written(module: nn.Module, inlined: tuple[str, ...] = ()) -> Block:
    """Return the graph of the original forward of a block, rewritten or not."""
    if not isinstance(module, FusedForward):
        return traced(module, inlined)
    stand_in: nn.Module = object.__new__(authors_class(module))
    vars(stand_in).update(vars(module))
    return traced(stand_in, inlined)


def calls_of(norms: Collection[nn.Module], model: nn.Module) -> Iterator[tuple[nn.Module, Node, nn.Module]]:
    """Yield each call of a norm in the original forwards that are graphs: the block, the call, the norm."""
    for block in model.modules():
        if any(part in norms for part in block.modules() if part is not block):
            with contextlib.suppress(NotTraceableError):
                for node in traced_as_written(block).graph.nodes:
                    norm = called(node, block)
                    if norm is not None and norm in norms:
                        yield block, node, norm


def call_of(graph: Graph, path: str) -> Node | None:
    """Return the one call of a child, None where there is none or more than one."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == path]
    return calls[0] if len(calls) == 1 else None


def _fuse(graph: Graph, site: Site, replaced: dict[Node, Node]) -> None:
    """Rewrite one site.

    Args:
        graph: of the block.
        site: in `graph`.
        replaced: the last call of each site rewritten before -> its replacement, as a residual may be one.
    """
    last = site.act or site.add
    assert last is not None
    if site.add is None:
        end = site.norm
    else:
        with graph.inserting_before(site.add):
            norm = graph.create_node("get_attr", site.path)
            residual = site.residual if site.residual is None else replaced.get(site.residual, site.residual)
            arguments = (norm, site.norm.args[0], residual, site.in_place)
            end = graph.call_function(normalize_and_add, arguments)
    skipped = [node for node in (*site.passed, site.add, site.act) if node is not None]
    last.replace_all_uses_with(end)
    replaced[last] = end
    for node in sorted(skipped, reverse=True):
        graph.erase_node(node)
    if site.add is not None:
        graph.erase_node(site.norm)


def _compiled(graph: Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<batchnorm.fuse>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function
