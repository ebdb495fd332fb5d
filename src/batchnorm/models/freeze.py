"""`freeze` and `unfreeze`: batch normalizations that keep their running statistics in training."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.running import Running
from batchnorm.torch.contexts.domains import AFFINE, names_of

from .contexts import norms_of
from .convert import become_ours, check, check_options
from .norms.find import Found, find_norms
from .norms.kinds import is_layer
from .preconditions import Model, verb
from .rollback import untouched_on_error


@verb()
def freeze(model: Model, *, parameters: bool = False) -> Model:
    """Freeze every batch normalization of `model`: it uses and keeps its running statistics in training too.

        y = weight * (x - running_mean) / sqrt(running_var + eps) + bias

    In place. Stock layers, and timm's, become layers of this library with `statistics=Running()`, as by
    `convert`: the same modules, parameters, buffers and hooks. `train()` on the model or on a layer does not
    change that, nor does `reset_running_stats()`, which `torch.optim.swa_utils.update_bn` calls
    (`reset_parameters()` resets the statistics). To freeze a part of a model, pass it:
    `freeze(model.backbone)`. Call it before DistributedDataParallel, which fixes what learns when it is made.

    Args:
        model: with batch normalizations that have running statistics; or such a layer itself.
        parameters: stop weight and bias from learning too, until `unfreeze`: `requires_grad` becomes False,
            and a gradient that is there is dropped.

    Returns:
        `model` itself. Frozen layers, of torchvision's and timm's classes too, are left as they are.

    Raises:
        OptionError: (a ValueError) no batch normalization at all; and by name: a subclass of a stock layer, a
            layer without running statistics. The model is then as it was.

    Example:
        >>> model = batchnorm.freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> model.train()[1].statistics
        Running()

    Differs from torch: `layer.eval()` is lost at the next `model.train()`.

    Source: https://github.com/pytorch/pytorch/issues/86590.
    """
    norms = [found for found in norms_of(model, "freeze") if found.kind.family != "frozen"]
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
def unfreeze(model: Model) -> Model:
    """Undo `freeze`: every batch normalization again uses and moves the statistics that it did before.

    In place. Layers get the policy that they had before `freeze`, copies and pickled ones too, or `Batch()`
    if it is unknown; weight and bias learn again where `freeze` or `convert` stopped them. Layers stay layers
    of this library: `revert` makes them stock ones.

    Args:
        model: a model or a layer; layers that are not frozen are left as they are.

    Returns:
        `model` itself.

    Raises:
        OptionError: (a ValueError) no batch normalization at all; torchvision's or timm's frozen layers, by
            name: `convert` makes them layers that can be unfrozen. The model is then as it was.

    Example:
        >>> model = batchnorm.freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> batchnorm.unfreeze(model)[1].statistics
        Batch()
    """
    norms = norms_of(model, "unfreeze")
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


def _hold(norms: list[Found]) -> None:
    """Stop weights and biases from learning, and record which did: of all first, as layers may share one."""
    held = [found.module for found in norms if "_learned" not in vars(found.module)]
    for norm in held:
        vars(norm)["_learned"] = {name: p.requires_grad for name, p in _affine(norm).items()}
    hold(parameter for found in norms for parameter in _affine(found.module).values())


def affine_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights and biases of all batch normalizations of a model, which `freeze` holds."""
    return [parameter for found in find_norms(model) for parameter in _affine(found.module).values()]


def hold(parameters: Iterable[nn.Parameter]) -> None:
    """Stop parameters from learning, whatever has made them learn again."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.requires_grad = False
            parameter.grad = None  # else an optimizer would take one more step with it


def _affine(norm: nn.Module) -> dict[str, nn.Parameter]:
    """Return weight and bias, of each domain, or the parameters that a parametrization computes them from."""
    names = names_of(AFFINE, getattr(norm, "domains", 1))
    computed_from = tuple(f"parametrizations.{name}." for name in names)
    return {
        name: parameter
        for name, parameter in norm.named_parameters()
        if name in names or name.startswith(computed_from)
    }
