"""Defines the limits from which on a check reports, each with the reason for its value."""

from __future__ import annotations

from typing import Self


class Threshold(float):
    """A limit with its reason, for the documentation; it compares and computes as a number.

    Args:
        value: the limit.
        check: the check that it belongs to.
        meaning: what is compared with it, with its unit.
        reason: why this value.
    """

    check: str
    meaning: str
    reason: str

    def __new__(cls, value: float, check: str, meaning: str, reason: str) -> Self:
        found = super().__new__(cls, value)
        found.check, found.meaning, found.reason = check, meaning, reason
        return found


HUGE_VARIANCE = Threshold(
    1e12,
    "huge-variance",
    "a running variance; above this: likely",
    "the values would be near 1e6: the input is more likely broken than that large",
)
PRIOR_NOTE = Threshold(
    0.01,
    "prior",
    "the share of the initial 0 and 1 in the statistics, (1 − momentum)^updates; above this: note",
    "1 % of a variance moves outputs by 0.5 %, about the rounding of half precision",
)
PRIOR_LIKELY = Threshold(
    0.1,
    "prior",
    "the same; above this: likely",
    "with momentum 0.1 this means fewer than 22 updates; a variance of 0.1 then reads 0.19",
)
MOMENTUM_LIKELY = Threshold(
    0.5,
    "momentum",
    "momentum in torch's convention; from this on: likely",
    "running statistics then average (2 − m) / m = 3 batches or fewer",
)
MOMENTUM_SERIOUS = Threshold(
    0.9,
    "momentum",
    "the same, if batches were counted; from this on: serious",
    "Keras's usual 0.9, 0.99 and 0.997 in torch: the last batch makes up 90 % of the statistics",
)
DEAD = Threshold(
    1e-3,
    "dead-channels",
    "|weight| of a channel over the layer's median |weight|; below this: dead",
    "compared with the other channels, such a weight is below the precision of float16",
)
DEAD_LIKELY = Threshold(
    0.5,
    "dead-channels",
    "the share of dead channels in a layer; from this on: likely",
    "many good networks have some dead channels; half of a layer is a loss of width",
)
DROPOUT_LIKELY = Threshold(
    0.2,
    "dropout-before",
    "the rate of a dropout right before a norm; from this on: likely",
    "the standard deviation in evaluation is sqrt(1 − p) = 0.89 of that in training (Li et al. 2018)",
)
DECAY_LIKELY = Threshold(
    1e-3,
    "weight-decay",
    "weight decay on weight or bias of a norm; above this: likely",
    "training recipes with 5e-5 to 5e-4 work either way; AdamW's default is 1e-2",
)
GAP_LIKELY = Threshold(
    0.01,
    "gap",
    "accuracy with population minus with running statistics; from this on: likely",
    "a loss of one point is worth knowing",
)
GAP_SERIOUS = Threshold(
    0.05,
    "gap",
    "the same; from this on: serious",
    "two sets of statistics from the same data and weights never differ by this much",
)
GAP_Z = Threshold(
    2.0,
    "gap",
    "the same, in standard errors over the same samples (McNemar); from this on: reported",
    "smaller differences may be chance; serious takes 3",
)
GAP_LOSS = Threshold(
    0.1,
    "gap",
    "without classes: loss with running over loss with population statistics, minus 1; from this on: likely",
    "over some hundred samples, a loss varies by some per cent",
)
GAP_OUTPUT = Threshold(
    0.05,
    "gap",
    "without labels: the share of predictions that differ, or the difference of outputs over their spread; "
    "from this on: note",
    "without labels it is not known which of two outputs is right",
)
OFF_MEAN = Threshold(
    0.25,
    "statistics-off",
    "distance of running and population mean, root mean square over channels, in standard deviations; from "
    "this on: off",
    "in training, moving averages lag behind the weights by about 0.1",
)
OFF_STD = Threshold(
    1.25,
    "statistics-off",
    "ratio of running and population standard deviations, typical over channels; from this on: off",
    "in training, moving averages are within some per cent",
)
NOISE = Threshold(
    0.25,
    "small-batches",
    "noise of batch means, in standard deviations; above this: likely",
    "16 independent values per channel have this noise; error rates rise with 8 images per batch and fewer "
    "(Wu & He 2018, fig. 1)",
)
ORDERED_SIGMAS = Threshold(
    6.0,
    "ordered-batches",
    "(F − 1) / sqrt(2 / (batches − 1)), where F compares batch means with means of samples; above this: "
    "likely",
    "for shuffled batches, F is 1 with the standard deviation sqrt(2 / (batches − 1)); 6 of these leave room "
    "for the largest F of many layers",
)
RANKS_LIKELY = Threshold(
    0.1,
    "different-ranks",
    "distance of the running means of two processes (or of the logarithms of their standard deviations), "
    "root mean square over channels, in standard deviations; from this on: likely; below: note",
    "one update with momentum 0.1 from batches of 4 independent values leaves 0.07 between two processes",
)
FEWEST_BATCHES = Threshold(
    4,
    "small-batches, ordered-batches",
    "the number of batches; below this: no report",
    "three numbers are too few to estimate a variance",
)
OFFSET_NOTE = Threshold(
    100.0,
    "offset",
    "|mean| / standard deviation of a channel; above this: note",
    "2 of the 7 digits of float32 are lost before the layer computes",
)
OFFSET_LIKELY = Threshold(
    1000.0,
    "offset",
    "the same, in torch's or Keras's own layer; above this: likely",
    "torch's own layer is off by 1e-3 at 1e5, and by more in 16 bits",
)
HALF = Threshold(
    65504.0,
    "half-overflow",
    "the largest |value| that a norm receives; above half of this: note",
    "it is the largest number of float16; a larger value is inf",
)
MIXING = Threshold(
    1e-3,
    "batch-mates, padding",
    "the change of a prediction over the spread of predictions; above this: reported",
    "rounding also depends on the other samples of the batch, by 1e-6 in float32, and more in deep networks",
)
CALLS_LIKELY = Threshold(
    0.5,
    "repeated-calls",
    "distance of the means that two calls of one norm receive, in standard deviations; above this: likely",
    "one pair of running statistics then fits neither call",
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Threshold))


def _cell(text: str) -> str:
    """Return the text for a cell of a table, where a bare | would begin another cell."""
    return text.replace("|", r"\|")


def markdown() -> str:
    """Return all thresholds as a table of the documentation."""
    lines = ["| check | limit | of what, and what follows | why this limit |", "|---|---|---|---|"]
    lines += [f"| `{t.check}` | {t:g} | {_cell(t.meaning)} | {_cell(t.reason)} |" for t in ALL]
    return "\n".join(lines)
