"""Turns stock layers into layers of this library, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.policy_config import check_policy
from batchnorm.statistics.running import Running
from batchnorm.statistics.synced import Synced
from batchnorm.torch.checks import check_nonfinite, check_small_batch, check_warm_start
from batchnorm.torch.contexts.domains import check_domain_affine, check_domains
from batchnorm.torch.layers import OPTIONS
from batchnorm.torch.stored_state import counter
from batchnorm.torch.sync import ranks_of

from .graph.module_hooks import is_forward_replaced
from .norms.find import Found, find_norms
from .norms.kinds import Layer, is_layer, is_ours, rebased
from .norms.timm import BatchNormAct2d, inner_activation
from .preconditions import Model, verb
from .verify import checked_change


@verb()
def convert(
    model: Model,
    statistics: Policy | None = None,
    *,
    domains: int | None = None,
    domain_affine: bool | None = None,
    nonfinite: str | None = None,
    small_batch: str | None = None,
    warm_start: bool | None = None,
    example: Any = None,
) -> Model:
    """Turn the batch normalizations of `model` into layers of this library, in place.

    A layer stays the same module and changes its class: optimizers, hooks, shared modules, DDP and
    parametrizations go on working, and attributes that others hung on it (a `qconfig`, a tag) stay. It
    computes the same, more accurately. If it raises, nothing has changed.

    Args:
        model: with, or itself, `torch.nn.BatchNorm1d`, 2d, 3d, their lazy forms, `torch.nn.SyncBatchNorm`,
            `timm.layers.BatchNormAct2d`, or a frozen layer of torchvision, timm or transformers.
        statistics: the policy of every layer, such as `batchnorm.Synced()`; None = `Running()` for frozen
            ones, `Synced()` of its process group for a SyncBatchNorm, no change for the others.
        domains: number of running statistics of every layer (`batchnorm.domain`); None = no change.
        domain_affine: give each domain a weight and bias too, which start as the layer's: new parameters,
            of which an optimizer has to be told; None = no change.
        nonfinite, small_batch, warm_start: as of `batchnorm.BatchNorm2d`, of every layer; None = no change.
        example: arguments of the model: a tensor, a tuple or a dict of keyword arguments. The outputs on it
            are compared before and after, in evaluation and in training. None = no comparison.

    Returns:
        `model` itself.

    Raises:
        OptionError: (a ValueError) by name, a subclass of a stock layer, a layer with a replaced `forward` or
            an attribute of an option's name, or one that the options do not fit; a scripted model; `domains`
            within `batchnorm.domain`; `domain_affine` for a layer of one domain.
        AgreementError: (an ArithmeticError) the outputs on the example differ.

    Warns:
        UserWarning: the model cannot run in training on the example: only evaluation was compared.

    Example:
        >>> batchnorm.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))[1].statistics
        Batch()

    Differs from torch: running statistics of 16 bits become float32. `torch.nn.SyncBatchNorm.
    convert_sync_batchnorm` takes our layers for stock ones: activation and policy would be lost.

    Source: https://github.com/pytorch/pytorch/issues/187298 (subclasses dropped silently).
    """
    norms = find_norms(model)
    check(model, norms, "convert")
    options = {
        "domains": domains,
        "domain_affine": domain_affine,
        "nonfinite": nonfinite,
        "small_batch": small_batch,
        "warm_start": warm_start,
    }
    check_options(norms, {"statistics": statistics, **options})
    with checked_change(model, example, "convert"):
        for found in norms:
            become_ours(found, statistics)
            _set_options(found.module, options)
    return model


def check_scripted(model: nn.Module, verb: str) -> None:
    """Raise OptionError for a scripted model, whose code is fixed."""
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(f"{verb} cannot change a scripted model: call it before torch.jit.script")


def check(model: nn.Module, norms: list[Found], verb: str) -> None:
    """Raise OptionError for a scripted model, an unknown subclass, or a layer with a replaced forward."""
    check_scripted(model, verb)
    for found in norms:
        if found.kind.family == "other" and not is_ours(found.module):
            raise OptionError(
                f"a subclass whose forward may compute something else, so {verb} leaves the model as it is: "
                "make it a layer of torch.nn (or of batchnorm) and what it adds a module of its own",
                str(found),
            )
        if found.kind.twin is not None and (own := _own_attributes(found.module)):
            raise OptionError(
                f"it has an attribute {', '.join(own)} of its own, and a layer of batchnorm has an option of "
                f"that name, so {verb} leaves the model as it is: rename it first",
                str(found),
            )
        if found.kind.family in ("stock", "timm", "frozen", "ours") and is_forward_replaced(found.module):
            raise OptionError(
                f"its forward was replaced on the instance, so {verb} leaves the model as it is: "
                "take that back first (accelerate: remove_hook_from_module)",
                str(found),
            )


def _own_attributes(norm: nn.Module) -> list[str]:
    """Return the names of options that other attributes of a norm have; all others are carried over."""
    own = vars(norm).keys() | norm._modules.keys() | norm._parameters.keys() | norm._buffers.keys()
    return [name for name in OPTIONS if name in own]


def check_options(norms: list[Found], options: Mapping[str, object]) -> None:
    """Raise OptionError, by name, for a layer that cannot have these options; None = no change."""
    for name, check in _CHECKS.items():
        for found in norms if (value := options.get(name)) is not None else ():
            try:
                check(value, getattr(found.module, "running_mean", None) is not None)
            except OptionError as error:
                raise error.at(str(found)) from None
    domains, affine = options.get("domains"), options.get("domain_affine")
    if isinstance(domains, int):
        _check_domains(norms, domains)
    for found in norms if affine is not None else ():
        try:
            _check_affine(found.module, affine, domains)
        except OptionError as error:
            raise error.at(str(found)) from None


_CHECKS: dict[str, Callable[[object, bool], object]] = {
    "statistics": check_policy,
    "domains": check_domains,
    "nonfinite": check_nonfinite,
    "small_batch": check_small_batch,
    "warm_start": check_warm_start,
}


def _check_domains(norms: list[Found], domains: int) -> None:
    """Raise OptionError, by name, for a layer that cannot get domains now."""
    is_in_use = any(getattr(found.module, "_domain", None) is not None for found in norms)
    for found in norms:
        has = getattr(found.module, "domains", 1)
        if has not in (1, domains):
            raise OptionError(f"it has {has} domains, which cannot become {domains}", str(found))
        if has != domains and is_in_use:
            raise OptionError(
                "the model is within batchnorm.domain, which this layer would not heed: give it domains "
                "outside of the block",
                str(found),
            )
        if domains > 1 and "Lazy" in found.kind.name:
            raise OptionError("it is not initialized: run the model once, then give it domains", str(found))


def _check_affine(norm: nn.Module, affine: object, domains: object) -> None:
    """Raise OptionError if the domains of a norm cannot get a weight and bias each, or not lose them."""
    has = getattr(norm, "domains", 1)
    names = norm._parameters.keys() | norm._buffers.keys()  # of frozen ones
    check_domain_affine(affine, domains if isinstance(domains, int) else has, getattr(norm, "affine", True))
    if affine and not {"weight", "bias"} <= names:
        raise OptionError("its weight or bias is parametrized, and cannot become one for each domain")
    if not affine and getattr(norm, "domain_affine", False):
        raise OptionError("each of its domains has a weight and bias, which cannot become one")


def _set_options(norm: nn.Module, options: Mapping[str, Any]) -> None:
    for name in ("nonfinite", "small_batch", "warm_start"):
        if options[name] is not None:
            setattr(norm, name, options[name])
    if isinstance(norm, Layer):
        norm._add_domains(options["domains"] or 1, bool(options["domain_affine"]))


def become_ours(found: Found, statistics: Policy | None = None) -> None:
    """Set the class of a norm to its twin in this library, if there is one.

    Args:
        found: the norm.
        statistics: its policy; None = `Running()` for what was frozen, else no change.
    """
    norm, kind = found.module, found.kind
    if kind.twin is not None:
        if kind.family == "frozen":
            _complete(norm)
            statistics = statistics or Running()
            if statistics == Running():
                vars(norm)["_learned"] = {"weight": True, "bias": True}  # once it is unfrozen
        if kind.family == "synchronized":
            vars(norm)["_statistics"] = Synced(ranks_of(vars(norm).pop("process_group", None)))
        activation = inner_activation(norm) if issubclass(kind.twin, BatchNormAct2d) else None
        norm.__class__ = rebased(type(norm), kind.twin)
        vars(norm)["activation"] = activation
        if norm.track_running_stats and norm._buffers.get("num_batches_tracked") is None:
            mean = norm._buffers.get("running_mean")  # a layer of torch < 0.4.1 has no counter
            if mean is not None:
                norm._buffers["num_batches_tracked"] = counter(mean.device)
        if is_layer(norm):
            norm._widen_statistics()
    if statistics is not None and is_layer(norm):
        norm.statistics = statistics


def _complete(norm: nn.Module) -> None:
    """Give a frozen norm of another package what a layer has beside buffers: parameters, counter, settings.

    The parameters do not learn; they share the memory of the buffers that they were.
    """
    for name in ("weight", "bias"):
        buffer = norm._buffers.pop(name)
        assert buffer is not None
        norm._parameters[name] = nn.Parameter(buffer.detach(), requires_grad=False)
    norm._non_persistent_buffers_set = norm._non_persistent_buffers_set - {"weight", "bias"}
    weight = norm._parameters["weight"]
    assert weight is not None
    settings = {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
    for name, value in {"num_features": weight.numel(), **settings}.items():
        vars(norm).setdefault(name, value)
    if norm._buffers.get("num_batches_tracked") is None:
        norm._buffers["num_batches_tracked"] = counter(weight.device)
