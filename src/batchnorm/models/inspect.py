"""Reports on the batch normalizations of a model: kind, health, what they fuse with and fold into."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError

from .fold import fold_plan, twin_of
from .fusion.plan import plan
from .norms.find import all_names
from .norms.report import ModelReport, describe
from .preconditions import verb


@verb()
def inspect(model: nn.Module, example: Any = None) -> ModelReport:
    """Return a table of the batch normalizations of `model`, which stays as it is.

    Args:
        model: with layers of torch, of this library, of timm or of others.
        example: what the model takes: a tensor, a tuple of arguments or a dict of keyword arguments. With
            it, norms in forwards with control flow are reported too, from a run of the model on it.

    Returns:
        A report with one row per norm in `rows`: name, kind, policy, activation, channels, momentum, eps; the
        health of its statistics (never updated, NaN, zero, negative or huge variance, dead weights); what
        `fuse` would make one layer with it, and where `fold` would put it, or why not. `print` shows it as
        a table.

    Raises:
        OptionError: (a ValueError) an example, and the model is not initialized.
        Exception: what the model itself raises on the example.

    Example:
        >>> report = batchnorm.inspect(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> [row.name for row in report.rows]
        ['1']
    """
    if isinstance(model, torch.jit.ScriptModule):
        return ModelReport(f"{type(model).__name__}: scripted, its layers cannot be told", ())
    decided = plan(model, example)
    folds = _folds(model, example)
    rows = tuple(
        replace(
            describe(found),
            fuses_with=decided.fuses_with.get(found.module),
            reason=decided.reasons.get(found.module, ""),
            folds_into=folds[found.module][0],
            stays=folds[found.module][1],
        )
        for found in decided.norms
    )
    unhealthy = sum(bool(row.health) for row in rows)
    title = f"{type(model).__name__}: {len(rows)} batch normalizations"
    if rows:
        can_fold = sum(row.folds_into is not None for row in rows)
        title += (
            f", {len(decided.fuses_with)} can be fused, {can_fold} folded, "
            f"{unhealthy or 'none'} with something to look at"
        )
    return ModelReport(title, rows)


def _folds(model: nn.Module, example: Any) -> dict[nn.Module, tuple[str | None, str]]:
    """Return for each norm where `fold` puts it, or why it stays."""
    try:
        twin = twin_of(model, shares_tensors=True)
    except OptionError as error:
        why = (None, str(error))
        return defaultdict(lambda: why)
    decided = fold_plan(twin, example)
    names = {module: places[0] for module, places in all_names(twin).items()}
    rows = decided.rows(names)
    modules = zip(model.modules(), twin.modules(), strict=True)
    return {
        own: (f"{row.into} ({row.direction})" if row.into else None, row.reason)
        for own, copy in modules
        if (row := rows.get(copy))
    }
