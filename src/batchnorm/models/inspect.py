"""The batch normalizations of a model: what they are, how they are, and what they fuse with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .fuse import plan_with
from .report import ModelReport, describe


def inspect(model: nn.Module, example: Any = None) -> ModelReport:
    """Return a table of the batch normalizations of `model`; nothing is changed.

    Args:
        model: with layers of torch, of this library, of timm or of others.
        example: what the model takes: a tensor, a tuple of arguments or a dict of keyword arguments. With
            it, forwards with control flow are run to see what follows their norms; the model stays as it was.

    Returns:
        A report whose `rows` tell of each norm: name, kind, policy, activation, channels, momentum, eps; the
        health of its statistics (never updated, NaN, zero, negative or huge variance, dead weights); what
        `fuse` would make one layer with it, or why not. `print` shows it as a table.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return ModelReport(f"{type(model).__name__}: scripted, its layers cannot be told", ())
    decided = plan_with(model, example)
    rows = tuple(
        describe(
            found,
            fuses_with=decided.fuses_with.get(found.module),
            reason=decided.reasons.get(found.module, ""),
        )
        for found in decided.norms
    )
    ill = sum(bool(row.health) for row in rows)
    title = f"{type(model).__name__}: {len(rows)} batch normalizations"
    if rows:
        title += f", {len(decided.fuses_with)} can be fused, {ill or 'none'} with something to look at"
    return ModelReport(title, rows)
