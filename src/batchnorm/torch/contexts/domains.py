"""Running statistics of several domains in one layer, of which one at a time is in use; weight and bias too.

Those of domain 0 are the stock buffers; those of domain k have the same names with the suffix `_k`. To use
domain k, the two are swapped: `layer.running_mean` is that of the domain in use, so no other code has to know
about domains.

Parameters have such names too, but stay in their places: optimizers, averages of weights and FSDP know them
by their order and names, within a block as outside. What reads them asks `affine_of` for those in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from batchnorm.errors import OptionError
from batchnorm.kernels.interface import RunningState
from batchnorm.statistics.policy import Policy

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")


class ContextLayer(Protocol):
    """A layer as the contexts see it: they do not import the layers, which import them.

    Attributes:
        training: the mode.
        domains: the number of domains.
        domain_affine: whether each has a weight and bias of its own.
        _domain: the domain whose statistics are in use; None = domain 0, outside of any context.
        _buffers, _parameters: by name, those of all domains among them.
    """

    training: bool
    domains: int
    domain_affine: bool
    _domain: int | None
    _parameters: dict[str, nn.Parameter | None]
    _buffers: dict[str, Tensor | None]

    @property
    def statistics(self) -> Policy:
        """The statistics policy."""

    def _running_state(self) -> RunningState:
        """Return the running statistics of the domain in use."""

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Normalize one input, with the mask that the call uses."""


def check_domains(domains: object, tracked: bool) -> int:
    """Return the number of domains of a layer, or raise OptionError; several need running statistics."""
    if not isinstance(domains, int) or isinstance(domains, bool) or domains < 1:
        raise OptionError(f"domains must be a whole number of 1 or more; got {domains!r}")
    if domains > 1 and not tracked:
        raise OptionError(
            f"domains={domains} are as many running statistics, and this layer has none: make it with "
            "track_running_stats=True"
        )
    return domains


def add_domains(layer: ContextLayer, domains: int) -> None:
    """Give a layer with one domain the buffers of several; each starts as a copy of its statistics."""
    for k in range(1, domains):
        for name in STATISTICS:
            buffer = layer._buffers[name]
            layer._buffers[f"{name}_{k}"] = None if buffer is None else buffer.detach().clone()


def check_domain_affine(value: object, domains: int, affine: bool) -> None:
    """Raise OptionError unless `domain_affine` is True or False; True needs several domains, and a weight."""
    if not isinstance(value, bool):
        raise OptionError(f"domain_affine must be True or False; got {value!r}")
    if value and domains == 1:
        raise OptionError(
            "domain_affine=True gives each domain a weight and bias, and this layer has one domain: pass "
            "domains=n too"
        )
    if value and not affine:
        raise OptionError(
            "domain_affine=True gives each domain a weight and bias, and this layer has none: make it with "
            "affine=True"
        )


def add_affine(layer: ContextLayer) -> None:
    """Give each domain a weight and bias of its own, which start as copies of the layer's."""
    learned = vars(layer).get("_learned", {})
    for k in range(1, layer.domains):
        for name in AFFINE:
            own = layer._parameters[name]
            copy = None if own is None else nn.Parameter(own.detach().clone(), own.requires_grad)
            layer._parameters[f"{name}_{k}"] = copy
            if name in learned:  # what `unfreeze` lets learn again
                learned[f"{name}_{k}"] = learned[name]
    layer.domain_affine = True


def running_names(domains: int) -> list[str]:
    """Return the names of the running means and variances of all domains."""
    return names_of(STATISTICS[:2], domains)


def names_of(names: Iterable[str], domains: int) -> list[str]:
    """Return the names of tensors of all domains, by those of domain 0."""
    return [f"{name}{end}" for end in ("", *(f"_{k}" for k in range(1, domains))) for name in names]


def affine_of(norm: nn.Module) -> dict[str, Tensor | None]:
    """Return weight and bias of any norm: of a layer whose domains have their own, those in use.

    By attribute: they may be parametrized, or sharded by FSDP.
    """
    k = getattr(norm, "_domain", None) if getattr(norm, "domain_affine", False) else None
    return {name: getattr(norm, f"{name}_{k}" if k else name, None) for name in AFFINE}


def select(buffers: dict[str, Tensor | None], before: int, k: int) -> None:
    """Swap the statistics of domain `before`, which are in use, for those of domain `k`.

    Args:
        buffers: the buffers of a layer, by name.
    """
    for number in (before, k) if before != k else ():
        if number:  # 0 is in use, or becomes so in between
            for name in STATISTICS:
                other = f"{name}_{number}"
                buffers[name], buffers[other] = buffers[other], buffers[name]


def domain_of(layer: ContextLayer) -> int:
    """Return the domain whose statistics are in use."""
    return layer._domain or 0


@contextlib.contextmanager
def selected(layer: ContextLayer, k: int) -> Iterator[None]:
    """Use what is of domain `k` within the block, whichever is in use around it."""
    earlier, before = layer._domain, domain_of(layer)
    select(layer._buffers, before, k)
    layer._domain = k
    try:
        yield
    finally:
        select(layer._buffers, k, before)
        if earlier is None:
            vars(layer).pop("_domain", None)
        else:
            layer._domain = earlier


def keep_one(layer: ContextLayer, k: int) -> None:
    """Reduce a layer to one domain, with what is of domain `k`, or raise OptionError."""
    if layer.domain_affine and k:
        if not {*AFFINE, *(f"{name}_{k}" for name in AFFINE)} <= layer._parameters.keys():
            raise OptionError(
                f"its weight or bias is parametrized, and that of domain {k} cannot take its place: "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        for name in AFFINE:
            layer._parameters[name] = layer._parameters[f"{name}_{k}"]
    select(layer._buffers, domain_of(layer), k)
    vars(layer).pop("_domain", None)
    for number in range(1, layer.domains):
        for name in STATISTICS:
            del layer._buffers[f"{name}_{number}"]
        for name in AFFINE if layer.domain_affine else ():
            layer._parameters.pop(f"{name}_{number}", None)  # a parametrized one is in a module
    layer.domains = 1
    vars(layer).pop("domain_affine", None)


def fill(state_dict: dict[str, Any], prefix: str, layer: ContextLayer) -> None:
    """Add what a state lacks of domains, as copies of its domain 0."""
    has_statistics = f"{prefix}running_mean" in state_dict
    names = (*(STATISTICS if has_statistics else ()), *(AFFINE if layer.domain_affine else ()))
    for k in range(1, layer.domains):
        for name in names:
            found = state_dict.get(f"{prefix}{name}")
            if found is None and name in STATISTICS:  # a counter, which states of torch < 0.4.1 do not have
                found = layer._buffers[f"{name}_{k}"]
                if found is not None and found.is_meta:  # a meta tensor has no value to copy
                    found = torch.tensor(0, dtype=torch.long)
            if found is not None:
                state_dict.setdefault(f"{prefix}{name}_{k}", found.detach().clone())
