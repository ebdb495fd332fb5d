"""The arms of a study: which regularizers and normalizers a network gets; free of any framework."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Literal

from batchnorm.errors import OptionError
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.policy_config import POLICIES
from batchnorm.statistics.running import Running

NORMS = ("batchnorm", "stock", "layernorm", "groupnorm")
UNMASKED = "batchnorm:unmasked"
_AFTER = "after-activation"
# What each puts into a network; parts are joined by +.
KNOWN = {
    "none": "the plain network",
    "batchnorm": "batch normalization, of this library; padding enters no statistics",
    UNMASKED: "the same with padding in its statistics, as the layers of torch and Keras have it",
    "batchnorm:Ghost(16)": "with a policy: Ghost(size), Renorm(), Adapted(prior), Running(after=0.8)",
    f"batchnorm:{_AFTER}": "after the activation rather than before it; other norms take this, too",
    "stock": "batch normalization, of the framework",
    "layernorm": "layer normalization, of the framework",
    "groupnorm": "group normalization, of the framework; groups of 8 channels or more",
    "weightstandard": "weights of hidden layers standardized to mean 0 and variance 1/inputs",
    "skipinit": "residual branches multiplied by a learned number that starts from 0",
    "dropout": "drops units, or whole channels, in training; before the norm if it is named before it",
    "l1": "adds l1 times the sum of absolute weights to the loss",
    "l2": "adds l2 times the sum of squared weights to the loss",
}
_PARTS = tuple(name for name in KNOWN if ":" not in name)
_POLICIES = {name: POLICIES[name] for name in ("Ghost", "Renorm", "Running", "Adapted")}

# Of the powers of ten from 1e-5 to 1e-2, the largest that cost the mlp no held-out accuracy on digits.
L1_STRENGTH = 1e-4
L2_STRENGTH = 1e-4


@dataclass(frozen=True)
class Arm:
    """One way to treat a network.

    Attributes:
        name: as the user wrote it, such as `batchnorm+dropout`.
        norm: of `NORMS`, or None.
        statistics: policy of a batch normalization of this library; None for the batch's.
        freeze_after: the fraction of training after which a batch normalization keeps its running statistics.
        is_masked: whether a batch normalization leaves padding out of its statistics.
        is_after_activation: whether the normalization comes after the activation.
        dropout: whether units are dropped: after norm and activation, or before both; None for neither.
        l1: strength of the penalty `l1 · Σ|w|` on the weights of linear and convolution layers.
        l2: strength of the penalty `l2 · Σw²` on the same weights.
        weight_standardization: whether the weights of layers before the last are standardized.
        skip_init: whether residual branches start from 0.
    """

    name: str
    norm: str | None = None
    statistics: Policy | None = None
    freeze_after: float | None = None
    is_masked: bool = False
    is_after_activation: bool = False
    dropout: Literal["before", "after"] | None = None
    l1: float = 0.0
    l2: float = 0.0
    weight_standardization: bool = False
    skip_init: bool = False

    def order(self) -> tuple[str, ...]:
        """Returns the order of `norm`, `activation` and `dropout`, without what the arm has not."""
        norm = () if self.norm is None else ("norm",)
        middle = ("activation", *norm) if self.is_after_activation else (*norm, "activation")
        return (
            *(["dropout"] if self.dropout == "before" else []),
            *middle,
            *(["dropout"] if self.dropout == "after" else []),
        )


def parse_arm(name: str) -> Arm:
    """Reads an arm from its name: parts of `KNOWN` joined by `+`, a norm with options after colons.

    Nothing in a name is evaluated: a policy's arguments are numbers and words.

    Raises:
        OptionError: an unknown part, a part twice, two normalizers, or an option that its norm has not.
    """
    parts = split_outside_brackets(name, "+")
    bases = [part.partition(":")[0].strip() for part in parts]
    for part, base in zip(parts, bases, strict=True):
        if base not in _PARTS or (":" in part and base not in NORMS):
            raise OptionError(f"unknown arm {name!r}: known are {', '.join(_PARTS)}, joined by + if wanted")
    norms = [base for base in bases if base in NORMS]
    if len(set(bases)) != len(bases) or len(norms) > 1 or ("none" in bases and len(bases) > 1):
        raise OptionError(
            f"arm {name!r} contradicts itself: at most one of {', '.join(NORMS)}, nothing twice"
        )
    norm = norms[0] if norms else None
    options = split_outside_brackets(parts[bases.index(norm)], ":")[1:] if norm else []
    policies = [option for option in options if option not in ("unmasked", _AFTER)]
    is_ours = norm == "batchnorm"
    if len(set(options)) != len(options) or len(policies) > 1 or not (is_ours or set(options) <= {_AFTER}):
        ours = f"{_AFTER}, unmasked and one policy for batchnorm, {_AFTER} for the others"
        raise OptionError(f"arm {name!r}: a norm's options are {ours}, each once")
    statistics, freeze_after = _parse_policy(name, policies[0]) if policies else (None, None)
    dropout: Literal["before", "after"] | None = None
    if "dropout" in bases:
        is_first = norm is not None and bases.index("dropout") < bases.index(norm)
        dropout = "before" if is_first else "after"
    return Arm(
        name=name,
        norm=norm,
        statistics=statistics,
        freeze_after=freeze_after,
        is_masked=is_ours and "unmasked" not in options,
        is_after_activation=_AFTER in options,
        dropout=dropout,
        l1=L1_STRENGTH if "l1" in bases else 0.0,
        l2=L2_STRENGTH if "l2" in bases else 0.0,
        weight_standardization="weightstandard" in bases,
        skip_init="skipinit" in bases,
    )


def timed_with(arms: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the arms to time: those that are trained, and the framework's layer beside ours."""
    return (*arms, "stock") if "batchnorm" in arms and "stock" not in arms else arms


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Returns the parts of a text between separators that stand in no brackets."""
    return [part.strip() for part in re.split(rf"{re.escape(separator)}(?![^()]*\))", text)]


def _parse_policy(arm: str, text: str) -> tuple[Policy | None, float | None]:
    """Returns the policy of an option such as `Ghost(16)`, and the fraction of `Running(after=...)`."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        kind = _POLICIES[call.func.id]
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, KeyError, RecursionError, MemoryError):
        known = ", ".join(f"{name}(...)" for name in _POLICIES)
        raise OptionError(f"arm {arm!r}: {text!r} is no policy with numbers as arguments: {known}") from None
    if kind is Running and list(named) == ["after"] and not positional:
        after = named["after"]
        if not (isinstance(after, int | float) and 0 <= after <= 1):
            raise OptionError(f"arm {arm!r}: after={after!r} is no fraction of training, 0 to 1")
        return None, float(after)
    try:
        return kind(*positional, **named), None
    except (TypeError, OptionError) as error:
        raise OptionError(f"arm {arm!r}: {error}") from None
