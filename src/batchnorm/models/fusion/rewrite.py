"""A block whose forward calls fused layers, and that falls back to the forward its author wrote.

The module stays the same object, of a class made for it at run time: `FusedForward` in front of its own. The
rewritten forward runs while everything it rests on is as it was when it was made; otherwise, for instance
when somebody has put a hook on the activation that it skips, the author's forward runs, with layers that
apply no activation. Either way the result is the same.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from batchnorm.errors import OptionError
from batchnorm.models.graph.blocks import Block, traced
from batchnorm.models.graph.hooks import has_hooks, sees_output
from batchnorm.models.norms.activations import FUNCTIONS
from batchnorm.models.norms.kinds import is_ours
from batchnorm.torch.symbolic import is_symbolic

from .patterns import Site, site_of


@dataclass(frozen=True)
class Spec:
    """What to rewrite in a block, by names: enough to make the forward again from the block's class.

    Attributes:
        inlined: children whose own calls are in the rewritten forward.
        sites: the path of each fused norm, and the activation that it applies (None: an addition only).
    """

    inlined: tuple[str, ...]
    sites: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class _Made:
    """A rewritten forward and what it rests on."""

    function: Callable[..., Any]
    block: Block
    bypassed: tuple[tuple[str, type[nn.Module]], ...]


class Rewrite:
    """The rewritten forward of one block; made when it is first called, and never pickled."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.made: _Made | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewrite:
        return self  # it refers to no module

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "made": None}

    def make(self, module: nn.Module) -> _Made:
        """Return the rewritten forward of `module`; raises OptionError where its class has changed since."""
        if self.made is None:
            self.made = _make(module, self.spec)
        return self.made

    def holds(self, module: nn.Module, made: _Made) -> bool:
        """Whether everything that the rewritten forward rests on is still so."""
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
    """Mixed in front of the class of a block; see the module."""

    _rewrite: Rewrite

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the author's class and what to rewrite: the class made here has no name to load by."""
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
    """Return the class that stands for `cls` in blocks that were rewritten."""
    assert isinstance(cls, type)
    of_author: Any = cls

    @functools.wraps(of_author.forward)  # torch.fx, which reads its arguments, finds the author's
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the rewritten forward, or the author's where that no longer stands for it."""
        made = self._rewrite.make(self)
        if self._rewrite.holds(self, made):
            return made.function(self, *args, **kwargs)
        if is_symbolic(*args, *kwargs.values()):  # the graph would apply the activations all the same
            raise OptionError(
                "torch.fx would trace a fused block that has changed since: batchnorm.revert the model first",
                f"{of_author.__name__} with {self._rewrite.spec.sites[0][0]}",
            )
        with without_activation(self.get_submodule(path) for path, _ in self._rewrite.spec.sites):
            return of_author.forward(self, *args, **kwargs)

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
    """Return activation(norm(input) + residual) in one pass; step by step where an addition does more.

    An addition broadcasts, takes numbers, and in place keeps the dtype of what it writes to: a layer's
    residual does none of that.
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
    """As `get_submodule`, in a third of its time: the forward asks for every part that it rests on."""
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
    bypassed = [(path, type(module.get_submodule(path))) for path in spec.inlined]
    for site in sites.values():
        for node in (*site.passed, site.act):
            if node is not None and node.op == "call_module":
                bypassed.append((str(node.target), type(module.get_submodule(str(node.target)))))
        _fuse(block.graph, site, replaced)
    return _Made(_compiled(block.graph), block, tuple(dict.fromkeys(bypassed)))


def traced_as_written(module: nn.Module, inlined: tuple[str, ...] = ()) -> Block:
    """Return the graph of the author's forward of a block, rewritten or not."""
    if not isinstance(module, FusedForward):
        return traced(module, inlined)
    stand_in: nn.Module = object.__new__(authors_class(module))
    vars(stand_in).update(vars(module))
    return traced(stand_in, inlined)


def call_of(graph: Graph, path: str) -> Node | None:
    """Return the one call of a child, None where there is none or more than one."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == path]
    return calls[0] if len(calls) == 1 else None


def _fuse(graph: Graph, site: Site, replaced: dict[Node, Node]) -> None:
    """Rewrite one site.

    Args:
        replaced: what stands for outputs of sites that were rewritten before: one may be another's residual.
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
