"""Which arm the claims are about, which one it is held against, and what arms are called in a sentence."""

from __future__ import annotations

from batchnorm.study.verdicts.results import Network

BASELINE = "none"
SUBJECT = "batchnorm"

_WORDS = {
    "none": "no normalization",
    "batchnorm": "batch normalization",
    "layernorm": "layer normalization",
    "dropout": "dropout",
    "l1": "L1",
    "l2": "L2",
    "batchnorm+dropout": "batch normalization with dropout",
}


def in_words(arm: str) -> str:
    """The arm's name as it stands in a sentence."""
    return _WORDS.get(arm, arm)


def is_normalized(arm: str) -> bool:
    """Whether the arm has batch normalization in it, alone or with something else."""
    return arm == SUBJECT or arm.startswith(f"{SUBJECT}+")


def has_pair(network: Network) -> bool:
    """Whether both batch normalization and the plain network were run."""
    return SUBJECT in network.arms and BASELINE in network.arms


def rivals(network: Network) -> tuple[str, ...]:
    """The arms that batch normalization is held against: all without it."""
    return tuple(arm for arm in network.arms if not is_normalized(arm))
