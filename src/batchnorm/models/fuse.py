"""Fuses each batch normalization with the addition and activation behind it."""

from __future__ import annotations

from typing import Any

from batchnorm.errors import OptionError

from .convert import become_ours, check_scripted
from .fusion.fused_activation import silence
from .fusion.plan import Plan, plan
from .fusion.rewrite import Rewrite, fused_class
from .norms.activations import module_activation
from .norms.kinds import is_ours
from .preconditions import Model, verb
from .verify import checked_change


@verb(masked="a fused layer masks what it adds and its activation, too, so that the outputs would differ")
def fuse(model: Model, example: Any = None) -> Model:
    """Make one layer of each batch normalization and the addition and activation behind it, in place.

        activation(norm(x) + residual)        one pass over memory each way, and less kept for the backward

    Norms that are fused become layers of this library, as by `convert`. An activation module that is called
    only there becomes an identity. Where a block's forward adds, calls an activation function, or calls one
    activation module several times, it is rewritten; the original forward runs again once anything that the
    rewritten one depends on changes, such as by a hook on an activation that it skips.

    What follows a norm is found by symbolic tracing of each block: that holds for every input, and nothing
    runs. With an example, norms in forwards with control flow are fused too, if on the example their output
    goes to one activation module and to nothing else, in evaluation and in training.

    Args:
        model: with layers of torch or of this library.
        example: what the model takes: a tensor, a tuple of arguments or a dict of keyword arguments. If
            given, the model's outputs on it are compared before and after, in evaluation and in training.

    Returns:
        `model` itself. `inspect(model, example)` reports what can be fused, and why other norms cannot.

    Raises:
        OptionError: (a ValueError) a scripted model, or an example on which nothing can be compared.
        AgreementError: (an ArithmeticError) the outputs on the example differ.

    Warns:
        UserWarning: the model cannot run in training on the example, so that only evaluation was compared.

    If it raises, or is interrupted, the model is as it was.

    Example:
        >>> model = batchnorm.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> model[1].activation
        'relu'

    Differs from `torch.fx.experimental.optimization.fuse`: in place, for training too, and for models that
    cannot be traced as a whole.
    """
    check_scripted(model, "fuse")
    with checked_change(model, example, "fuse"):
        _apply(plan(model, example))
    return model


def _apply(decided: Plan) -> None:
    norms = {found.module: found for found in decided.norms}
    for norm in decided.fuses_with:
        if not is_ours(norm):
            become_ours(norms[norm])
    for norm, act in decided.pairs.items():
        activation = module_activation(act)
        if activation is None:
            raise OptionError(f"{type(act).__name__} is no activation that a layer has")
        vars(norm)["activation"] = activation
        vars(norm)["_activation_at"] = (silence(act),)  # in a tuple: it is no child of the norm
    for block, spec in decided.rewrites.items():
        for path, activation in spec.sites:
            vars(block.get_submodule(path))["activation"] = activation
        rewrite = Rewrite(spec)
        vars(block)["_rewrite"] = rewrite
        block.__class__ = fused_class(type(block))  # type: ignore[arg-type]
        rewrite.make(block)
