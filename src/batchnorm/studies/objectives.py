"""What a study minimizes and by what it judges: losses and metrics by name, or the user's own; NumPy only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm.errors import OptionError

from .data import Targets
from .padding import Array
from .user_code import is_user_code, load_function, naming_the_line, source_of

LOSSES = {
    "cross_entropy": "of logits, for classes counted from 0",
    "mse": "mean squared error, for numbers",
}
METRICS = {
    "accuracy": "the share of examples whose largest output is that of their class",
    "r2": "the share of the targets' variance that is explained, 1 - residual/total; mean over outputs",
}

Metric = Callable[[Array, Array], float]


def check_objective(loss: str, metric: str) -> None:
    """Raises OptionError for a loss or a metric that is neither known nor a function of the user's."""
    for what, name, known in (("loss", loss, LOSSES), ("metric", metric, METRICS)):
        if name not in known and not is_user_code(name):
            raise OptionError(
                f"unknown {what} {name!r}: known are {', '.join(known)}, or your own as file.py:function"
            )
    wrong = {"cross_entropy": "r2", "mse": "accuracy"}
    if wrong.get(loss) == metric:
        raise OptionError(f"--metric {metric} is not for --loss {loss}: leave it out")


def with_metric(text: str, metric: str) -> str:
    """Returns a text that was written for accuracy with another metric's name; anchors of HTML stay."""
    if metric == "accuracy":
        return text
    return re.sub(r'(?<![-\w#"])[Aa]ccurac(?:y|ies)(?![-\w])', lambda _: metric_in_words(metric), text)


def metric_in_words(metric: str) -> str:
    """Returns a metric's name as a sentence has it."""
    return {"r2": "R²"}.get(metric, metric)


def default_metric(loss: str) -> str:
    """Returns the metric of a loss unless the study is told."""
    return "accuracy" if loss == "cross_entropy" else "r2"


def targets_of(loss: str) -> Targets:
    """Returns what the targets of a loss are."""
    known: dict[str, Targets] = {"cross_entropy": "classes", "mse": "numbers"}
    return known.get(loss, "any")


def metric_named(name: str) -> Metric:
    """Returns the function of a metric: of outputs `[N, ...]` and targets, both NumPy, to a number.

    A metric is a fraction, of which more is better. The user's own, `file.py:function`, takes the same two.

    Raises:
        StudyError: the user's function raised, or returned something else than a finite number.
    """
    if name in METRICS:
        return accuracy if name == "accuracy" else r2
    function = load_function(name)

    def own(outputs: Array, targets: Array) -> float:
        with naming_the_line(f"metric {name}", source_of(name)):
            value: Any = function(outputs, targets)
            if np.ndim(value):
                raise TypeError(f"it returned an array of shape {np.shape(value)}, not one number")
            if not math.isfinite(float(value)):
                raise ValueError(f"it returned {value}, not a finite number")
            return float(value)

    return own


def accuracy(outputs: Array, targets: Array) -> float:
    """Returns the share of examples whose largest output, of `[N, classes]`, is that of their class."""
    return int((outputs.argmax(axis=1) == targets).sum()) / len(targets)


def r2(outputs: Array, targets: Array) -> float:
    """Returns the coefficient of determination, the mean over outputs; as `sklearn.metrics.r2_score`.

    Equation: 1 - sum (target - output)² / sum (target - mean target)². An output whose target never varies
    counts 1 if it is met exactly, else 0.
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"metric r2 needs outputs of the targets' shape {targets.shape}, not {outputs.shape}"
        )
    targets = targets.astype(np.float64)
    residual = ((targets - outputs) ** 2).sum(axis=0)
    total = ((targets - targets.mean(axis=0)) ** 2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(total > 0, 1 - residual / total, residual == 0)
    return float(found.mean())


def mean_loss(loss: str, outputs: Array, targets: Array) -> float:
    """Returns the mean loss, of `LOSSES`, in float64; a diverged network's is NaN or infinite."""
    with np.errstate(invalid="ignore", over="ignore"):
        if loss == "mse":
            return float(((outputs - targets) ** 2).mean())
        shifted = outputs - outputs.max(axis=1, keepdims=True)
        of_class = shifted[np.arange(len(targets)), targets]
        return float((np.log(np.exp(shifted).sum(axis=1)) - of_class).mean())


def moved(loss: str, before: Array, after: Array) -> float:
    """Returns how far predictions moved, a mean over examples.

    Of classes it is half the sum of absolute differences of probabilities (total variation, 0..1); of other
    outputs the mean absolute difference over the outputs' standard deviation.
    """
    if targets_of(loss) == "classes":
        return float(np.abs(_probabilities(before) - _probabilities(after)).sum(axis=1).mean() / 2)
    spread = before.std(axis=0).mean()
    return float(np.abs(before - after).mean() / spread) if spread > 0 else 0.0


def _probabilities(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=1, keepdims=True)
    return shares
