"""Norms normalize by their batch for a while and hand over its moments, which are taken once for both."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormError
from batchnorm.models.graph.hooks import is_forward_replaced
from batchnorm.models.norms.kinds import is_ours, kind_of
from batchnorm.statistics.moments import PooledMoments, merge
from batchnorm.torch.checks import is_single, too_few
from batchnorm.torch.functional import moments, normalize_batch
from batchnorm.torch.layers import _Layer

_RUNNING = ("running_mean", "running_var")
_LARGER = "use larger batches, or drop the last batch of one (DataLoader(drop_last=True))"
_Hear = Callable[[str, PooledMoments], None]


class Listener:
    """Every norm normalizes by its batch.

    Args:
        norms: those that track, by name.

    Attributes:
        heard: moments of the values that each layer received in this batch.
        values: number of those, per channel.
        dependent: layers that another one ran before, in this batch.
    """

    def __init__(self, norms: Mapping[str, _BatchNorm]) -> None:
        self.norms = norms
        self.heard: dict[str, PooledMoments] = {}
        self.values: Counter[str] = Counter()
        self.dependent: set[str] = set()

    @contextlib.contextmanager
    def one_batch(self) -> Iterator[None]:
        """Listen to one forward within the block."""
        self.heard, self.values, self.dependent = {}, Counter(), set()
        yield

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Change the norms so that they are heard, within the block; after it, they are as before."""
        with contextlib.ExitStack() as stack:
            for name, norm in self.norms.items():
                stack.enter_context(by_batch(name, norm, self.hear, strict=True))
            yield

    def hear(self, name: str, found: PooledMoments) -> None:
        """Note what a layer received."""
        if self.heard:
            self.dependent.add(name)
        self.values[name] += int(found.count)
        self.note(name, found)

    def note(self, name: str, found: PooledMoments) -> None:
        """Add moments to those that the layer received in this batch."""
        self.heard[name] = merge(self.heard[name], found) if name in self.heard else found


@contextlib.contextmanager
def by_batch(name: str, norm: _BatchNorm, hear: _Hear, *, strict: bool) -> Iterator[None]:
    """Have a norm normalize by the batch and tell its moments.

    torch's own layers and ours compute both by one kernel of ours. What another class, or a forward that
    somebody replaced, does is not known: there the moments are taken before it runs.

    Args:
        name: of the norm, told along and named in errors.
        norm: in evaluation mode.
        hear: called with the name and the moments.
        strict: refuse a batch with one value per channel, which normalizes to nothing but zeros. Otherwise
            norms of unknown classes use the statistics that they have: their output is not needed.
    """

    def normalized(input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        activation: Any = norm.activation if is_ours(norm) else None
        try:
            norm._check_input_dim(input)  # type: ignore[no-untyped-call]
            if strict and is_single(input):
                raise too_few(input, _LARGER)
            y, found = normalize_batch(
                input, norm.weight, norm.bias, norm.eps, residual=residual, activation=activation, mask=mask
            )
        except BatchNormError as error:
            raise error.at(f"{name} ({type(norm).__name__})" if name else type(norm).__name__) from None
        hear(name, found)
        return y

    kind = kind_of(norm)
    family = "other" if kind is None or is_forward_replaced(norm) else kind.family
    if family in ("stock", "synchronized"):
        with _attribute(norm, "forward", normalized):
            yield
    elif family == "ours":
        with _attribute(norm, "_normalize", normalized):
            yield
    else:
        hidden = _hidden_statistics(norm) if strict else contextlib.nullcontext()
        handle = norm.register_forward_pre_hook(
            lambda _norm, args, kwargs: hear(name, moments(*received(norm, args, kwargs))), with_kwargs=True
        )
        try:
            with hidden:
                yield
        finally:
            handle.remove()


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a norm from the arguments that it is called with."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def received(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the input of a norm and the mask that it heeds, from the arguments that it is called with."""
    input = input_of(args, kwargs)
    if not isinstance(norm, _Layer):
        return input, None
    given = dict(zip(("input", "residual", "mask", "lengths"), args, strict=False)) | kwargs
    return input, norm.mask_for(input, given.get("mask"), given.get("lengths"))


def values_per_channel(input: Tensor, mask: Tensor | None = None) -> int:
    """Return the number of values per channel of an input `[N, C, *S]` that count."""
    return input.shape[0] * math.prod(input.shape[2:]) if mask is None else int(mask.sum())


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, compiled parts run eagerly: hooks are heard in all of them."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), _eagerly(model):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def _eagerly(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    compiled = any(
        module._compiled_call_impl is not None or hasattr(module, "dynamo_ctx") for module in model.modules()
    )
    if not compiled:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Set an attribute of the instance that hides one of its class."""
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]


@contextlib.contextmanager
def _hidden_statistics(norm: _BatchNorm) -> Iterator[None]:
    """Hide the running statistics: a norm that has none takes the batch's, in evaluation too."""
    running = {name: norm._buffers[name] for name in _RUNNING}
    norm._buffers.update(dict.fromkeys(_RUNNING))
    try:
        yield
    finally:
        norm._buffers.update(running)
