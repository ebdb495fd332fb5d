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
    "running variance above: likely",
    "values near 1e6: the input is more likely broken than that large",
)
PRIOR_NOTE = Threshold(
    0.01,
    "prior",
    "share of 0 and 1 in the running statistics, (1 − momentum)^updates, above: note",
    "1 % of a variance moves outputs by 0.5 %, about what half precision rounds",
)
PRIOR_LIKELY = Threshold(
    0.1,
    "prior",
    "the same, above: likely",
    "with momentum 0.1 these are fewer than 22 updates: a variance of 0.1 reads 0.19",
)
MOMENTUM_LIKELY = Threshold(
    0.5,
    "momentum",
    "momentum in torch's convention, from: likely",
    "statistics then average (2 − m) / m = 3 batches or fewer",
)
MOMENTUM_SERIOUS = Threshold(
    0.9,
    "momentum",
    "the same, from, where batches were counted: serious",
    "Keras's usual 0.9, 0.99 and 0.997 given to torch: 90 % of the statistics are the last batch's",
)
DEAD = Threshold(
    1e-3,
    "dead-channels",
    "|weight| over the layer's median |weight|, below: dead",
    "such a channel carries less than float16 keeps beside the others",
)
DEAD_LIKELY = Threshold(
    0.5,
    "dead-channels",
    "share of dead channels of a layer, from: likely",
    "zeros in some channels are common in good networks; half of a layer is a loss of width",
)
DROPOUT_LIKELY = Threshold(
    0.2,
    "dropout-before",
    "rate of a dropout right before a norm, from: likely",
    "the standard deviation in evaluation is sqrt(1 − p) of that in training: 0.89 (Li et al. 2018)",
)
DECAY_LIKELY = Threshold(
    1e-3,
    "weight-decay",
    "weight decay on weight or bias, above: likely",
    "recipes of 5e-5 to 5e-4 work with and without it; AdamW's default is 1e-2",
)
GAP_LIKELY = Threshold(
    0.01,
    "gap",
    "accuracy by population minus by running statistics, from: likely",
    "one point is what this check is for",
)
GAP_SERIOUS = Threshold(
    0.05,
    "gap",
    "the same, from: serious",
    "no choice of statistics that are of this data and these weights differs by as much",
)
GAP_Z = Threshold(
    2.0,
    "gap",
    "standard errors of that difference over the same samples (McNemar), from: reported",
    "below, as many samples may have changed either way by chance; serious takes 3",
)
GAP_LOSS = Threshold(
    0.1,
    "gap",
    "loss by running over by population statistics, minus 1, from: likely (no classes)",
    "a loss varies by some per cent between samples of a data set of hundreds",
)
GAP_OUTPUT = Threshold(
    0.05,
    "gap",
    "share of predictions that differ, or difference of outputs over their spread, from: note (no labels)",
    "which of two outputs is right is not known without labels",
)
OFF_MEAN = Threshold(
    0.25,
    "statistics-off",
    "distance of running and population mean, root mean square over channels, standard deviations, from: off",
    "moving averages over training lag behind weights by about 0.1",
)
OFF_STD = Threshold(
    1.25,
    "statistics-off",
    "ratio of standard deviations, typical over channels, from: off",
    "the same: moving averages over training are within some per cent",
)
NOISE = Threshold(
    0.25,
    "small-batches",
    "noise of batch means, standard deviations, above: likely",
    "16 independent values per channel; error rates rise from 8 images per batch on (Wu & He 2018, fig. 1)",
)
ORDERED_SIGMAS = Threshold(
    6.0,
    "ordered-batches",
    "(F − 1) / sqrt(2 / (batches − 1)), F of batch means against means of samples, above: likely",
    "F of shuffled batches is 1 with that standard deviation; 6 of them leave room for the largest of all "
    "layers",
)
RANKS_LIKELY = Threshold(
    0.1,
    "different-ranks",
    "distance of the running means of two processes, root mean square over channels, standard deviations (or "
    "of their logs), from: likely; below: note",
    "one update with momentum 0.1 from batches of 4 independent values leaves 0.07 between two processes",
)
FEWEST_BATCHES = Threshold(
    4,
    "small-batches, ordered-batches",
    "batches, below: nothing is said",
    "a variance of three numbers is no estimate",
)
OFFSET_NOTE = Threshold(
    100.0,
    "offset",
    "|mean| / standard deviation of a channel, above: note",
    "2 of the 7 digits of float32 are gone before the layer computes",
)
OFFSET_LIKELY = Threshold(
    1000.0,
    "offset",
    "the same, above, in a stock layer: likely",
    "torch's own layer is off by 1e-3 at 1e5, and by more in 16 bits",
)
HALF = Threshold(
    65504.0,
    "half-overflow",
    "largest |value| that a norm receives, above half of it: note",
    "the largest float16; above it a value is inf",
)
MIXING = Threshold(
    1e-3,
    "batch-mates, padding",
    "change of a prediction over the spread of predictions, above: reported",
    "other neighbours change the order of sums too: rounding is 1e-6 in float32, amplified in deep networks",
)
CALLS_LIKELY = Threshold(
    0.5,
    "repeated-calls",
    "distance of the means that two calls of one norm receive, standard deviations, above: likely",
    "one pair of running statistics then fits neither call",
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Threshold))


def _cell(text: str) -> str:
    """Return the text for a cell of a table, where a bare | would begin another cell."""
    return text.replace("|", r"\|")


def markdown() -> str:
    """Return all thresholds as a table of the documentation."""
    lines = ["| check | limit | of what | why |", "|---|---|---|---|"]
    lines += [f"| `{t.check}` | {t:g} | {_cell(t.meaning)} | {_cell(t.reason)} |" for t in ALL]
    return "\n".join(lines)
