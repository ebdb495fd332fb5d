"""Batch normalizations that keep their statistics in training."""

from __future__ import annotations

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.running import Running

from .convert import become_ours, check, check_options
from .norms.find import Found, find_norms
from .norms.kinds import is_layer
from .rollback import untouched_on_error
from .verb import verb


@verb()
def freeze(model: nn.Module, *, parameters: bool = False) -> nn.Module:
    """Freeze every batch normalization of `model`: in training too, it uses and keeps its running statistics.

        y = weight * (x - running_mean) / sqrt(running_var + eps) + bias

    In place. Stock layers, and timm's, become layers of this library with `statistics=Running()`, as by
    `convert`: the same modules, parameters, buffers and hooks. Whoever calls `train()` after it, on the model
    or on the layer, changes nothing of that; nor does `reset_running_stats()`, as `torch.optim.swa_utils.
    update_bn` calls it (`reset_parameters()` resets them). Every other layer learns as before. To freeze a
    part, pass it: `freeze(model.backbone)`. Before DistributedDataParallel, which fixes what learns when it
    is made.

    Args:
        model: with batch normalizations that have running statistics; or such a layer itself.
        parameters: weight and bias do not learn either, until `unfreeze`: `requires_grad` is False, and a
            gradient that is there is dropped.

    Returns:
        `model` itself. Freezing what is frozen changes nothing; torchvision's and timm's frozen layers are.

    Raises:
        OptionError: (a ValueError) no batch normalization at all; and by name: a subclass of a stock layer, a
            layer without running statistics.

    If it raises, or is interrupted, the model is as it was.

    Differs from torch: `layer.eval()` is lost at the next `model.train()`.

    Source: https://github.com/pytorch/pytorch/issues/86590.
    """
    norms = [found for found in _norms(model, "freeze") if found.kind.family != "frozen"]
    check(model, norms, "freeze")
    check_options(norms, {"statistics": Running()})
    with untouched_on_error(model):
        for found in norms:
            become_ours(found)
            norm = found.module
            assert is_layer(norm)
            if norm.statistics != Running():
                before, norm.statistics = norm.statistics, Running()
                vars(norm)["_thawed"] = before
        if parameters:
            _hold(norms)
    return model


@verb()
def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`: every batch normalization uses and moves the statistics in training that it did before.

    In place. Layers get the policy that they had before `freeze`, copies and pickled ones too, or `Batch()`
    where none is known; weight and bias learn again where `freeze` or `convert` stopped them. Layers stay of
    this library: `revert` makes them stock ones.

    Args:
        model: a model or a layer; layers that are not frozen are left as they are.

    Returns:
        `model` itself.

    Raises:
        OptionError: (a ValueError) no batch normalization at all; torchvision's or timm's frozen layers, by
            name: `convert` makes them layers that can be unfrozen.

    If it raises, or is interrupted, the model is as it was.
    """
    norms = _norms(model, "unfreeze")
    for found in norms:
        if found.kind.family == "frozen":
            raise OptionError("its class is frozen for good: batchnorm.convert(model) first", str(found))
    with untouched_on_error(model):
        for found in norms:
            norm = found.module
            if is_layer(norm) and norm.statistics == Running():
                norm.statistics = vars(norm).get("_thawed", Batch())
                learned = vars(norm).pop("_learned", {})
                for name, parameter in _affine(norm).items():
                    parameter.requires_grad = learned.get(name, parameter.requires_grad)
    return model


def _norms(model: nn.Module, verb: str) -> list[Found]:
    norms = find_norms(model)
    if not norms:
        raise OptionError(f"{type(model).__name__} has no batch normalization to {verb}")
    return norms


def _hold(norms: list[Found]) -> None:
    """Let weights and biases learn no more, and remember which did: first all of them, as two may be one."""
    held = [found.module for found in norms if "_learned" not in vars(found.module)]
    for norm in held:
        vars(norm)["_learned"] = {name: p.requires_grad for name, p in _affine(norm).items()}
    for norm in held:
        for parameter in _affine(norm).values():
            parameter.requires_grad = False
            parameter.grad = None  # else an optimizer would take one more step with it


def _affine(norm: nn.Module) -> dict[str, nn.Parameter]:
    """Return weight and bias, or what they are computed from where they are parametrized."""
    theirs = ("parametrizations.weight.", "parametrizations.bias.")
    return {
        name: parameter
        for name, parameter in norm.named_parameters()
        if name in ("weight", "bias") or name.startswith(theirs)
    }
