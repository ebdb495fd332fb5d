"""The arms of a study: which regularizers and normalizers a network gets; free of any framework."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.errors import OptionError

UNMASKED = "batchnorm:unmasked"
NORMS = ("batchnorm", UNMASKED, "layernorm")
# What each puts into a network.
KNOWN = {
    "none": "the plain network",
    "batchnorm": "batch normalization, of this library; padding enters no statistics",
    UNMASKED: "the same with padding in its statistics, as the layers of torch and Keras have it",
    "layernorm": "layer normalization, of the framework",
    "dropout": "drops units, or whole channels of images, in training",
    "l1": "adds l1 times the sum of absolute weights to the loss",
    "l2": "adds l2 times the sum of squared weights to the loss",
}

# Of the powers of ten from 1e-5 to 1e-2, the largest that cost the mlp no held-out accuracy on digits.
L1_STRENGTH = 1e-4
L2_STRENGTH = 1e-4


@dataclass(frozen=True)
class Arm:
    """One way to treat a network.

    Attributes:
        name: as the user wrote it, such as `batchnorm+dropout`.
        norm: `batchnorm`, `layernorm` or None.
        is_masked: whether a batch normalization leaves padding out of its statistics.
        dropout: whether units are dropped after each normalized activation.
        l1: strength of the penalty `l1 · Σ|w|` on the weights of linear and convolution layers.
        l2: strength of the penalty `l2 · Σw²` on the same weights.
    """

    name: str
    norm: str | None = None
    is_masked: bool = True
    dropout: bool = False
    l1: float = 0.0
    l2: float = 0.0


def parse_arm(name: str) -> Arm:
    """Reads an arm from its name: one of `KNOWN`, or several joined by `+`.

    Raises:
        OptionError: an unknown part, a part twice, or two normalizers.
    """
    parts = name.split("+")
    for part in parts:
        if part not in KNOWN:
            raise OptionError(f"unknown arm {name!r}: known are {', '.join(KNOWN)}, joined by + if wanted")
    norms = [part for part in parts if part in NORMS]
    if len(set(parts)) != len(parts) or len(norms) > 1 or ("none" in parts and len(parts) > 1):
        raise OptionError(
            f"arm {name!r} contradicts itself: at most one of {', '.join(NORMS)}, nothing twice"
        )
    return Arm(
        name=name,
        norm=norms[0].partition(":")[0] if norms else None,
        is_masked=UNMASKED not in parts,
        dropout="dropout" in parts,
        l1=L1_STRENGTH if "l1" in parts else 0.0,
        l2=L2_STRENGTH if "l2" in parts else 0.0,
    )
