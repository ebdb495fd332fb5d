"""A setting's verdicts in a few sentences."""

from __future__ import annotations

from collections.abc import Mapping

from . import formatting as q
from .significance import Claim, Grade

# What a claim is about, for the sentence on those without a clear difference.
_SUBJECTS = {
    "speed": "steps to the target",
    "rates": "the learning rates it bears",
    "accuracy": "held-out accuracy",
    "padding": "accuracy with padding masked",
    "gradients": "how even gradients are",
    "drift": "how far inputs of layers move",
    "statistics": "accuracy with calibrated statistics",
}


def in_short(claims: Mapping[str, Claim]) -> str:
    """Returns which claims stand out, which do not, and the cost."""
    if not claims:
        return "nothing to compare; verdicts take the arms none and batchnorm, or batchnorm and another one."
    found = [
        f"{claim.phrase} ({claim.figure})" if key in ("speed", "rates") else claim.phrase
        for key, claim in claims.items()
        if claim.grade not in (Grade.UNCLEAR, Grade.MEASURED)
    ]
    open_ones = [_SUBJECTS[key] for key, claim in claims.items() if claim.grade is Grade.UNCLEAR]
    sentences = ["batch normalization " + ("; ".join(found) or "shows no clear difference") + "."]
    if open_ones:
        sentences.append(f"No clear difference in {q.listed(open_ones)}.")
    if "cost" in claims:
        sentences.append(f"It {claims['cost'].phrase}.")
    if any(claim.grade is Grade.INDICATION for claim in claims.values()):
        sentences.append("With one seed, this is an indication and no more.")
    return " ".join(sentences)
