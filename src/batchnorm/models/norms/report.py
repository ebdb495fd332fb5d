"""Describes the batch normalizations of a model: one row for each, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.doctor.remedies import Torch
from batchnorm.doctor.state_checks import check_state
from batchnorm.statistics.policy import Policy
from batchnorm.text_table import aligned, as_html
from batchnorm.torch.contexts.domains import domain_of
from batchnorm.torch.layers import beyond_stock

from .find import Found
from .kinds import Layer, is_layer, is_ours
from .state import norm_state
from .timm import BatchNormAct2d


@dataclass(frozen=True)
class NormRow:
    """One batch normalization of a model.

    Attributes:
        name: qualified name in the model; "" for the model itself.
        kind: its class, such as torch.nn.BatchNorm2d.
        policy: which statistics it uses in training: "batch", "batch, untracked", "synchronized", "running",
            "ghost(size=32)"; and nonfinite, small_batch and domain where they are not the defaults.
        activation: what it applies itself, or None.
        channels: C; 0 if it is not initialized.
        momentum: fraction 0..1 of a batch in the running statistics; None = plain average.
        eps: added to var.
        health: what `diagnose` finds in its state, each in a few words; () where nothing is.
        fuses_with: what `fuse` makes one layer with it: "relu", "add, relu" or "add"; None where nothing.
        reason: why nothing fuses with it; "" where something does.
        folds_into: where `fold` puts it: "conv1 (before)", or "fc (after)" it, "conv1 within conv3 (before)"
            where convolutions become one; None where it stays.
        stays: why it stays; "" where it folds.
    """

    name: str
    kind: str
    policy: str
    activation: str | None
    channels: int
    momentum: float | None
    eps: float
    health: tuple[str, ...]
    fuses_with: str | None = None
    reason: str = ""
    folds_into: str | None = None
    stays: str = ""


@dataclass(frozen=True)
class ModelReport:
    """The batch normalizations of a model; `print` and notebooks show a table, `rich.print` one in colour.

    Attributes:
        title: one sentence.
        rows: one per batch normalization, in the order of registration.
    """

    title: str
    rows: tuple[NormRow, ...]

    def __str__(self) -> str:
        return "\n".join([self.title, *(aligned((_HEADER, *map(_cells, self.rows))) if self.rows else ())])

    def _repr_html_(self) -> str:
        return as_html(self.title, (_HEADER, *map(_cells, self.rows)))

    def __rich__(self) -> Any:
        """Return the table for `rich.print`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left", box=None, pad_edge=False)
        for heading in _HEADER:
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            *front, last = map(Text, _cells(row))
            table.add_row(*front, Text(last.plain, style="red") if row.health else last)
        return table


_HEADER = (
    "norm",
    "kind",
    "C",
    "policy",
    "activation",
    "momentum",
    "eps",
    "fuses with",
    "folds into",
    "health",
)


def _cells(row: NormRow) -> tuple[str, ...]:
    cells = (
        row.name or "(the model)",
        row.kind,
        str(row.channels),
        row.policy,
        row.activation or "-",
        "average" if row.momentum is None else f"{row.momentum:g}",
        f"{row.eps:g}",
        row.fuses_with or f"- ({row.reason})",
        row.folds_into or f"- ({row.stays})",
        "; ".join(row.health) or "ok",
    )
    return tuple(map(_printable, cells))


def describe(found: Found) -> NormRow:
    """Return the row of a norm as it is now, without what `fuse` and `fold` would do with it."""
    norm = found.module
    kind = found.kind
    activation = getattr(norm, "activation", None) if is_ours(norm) else None
    act = getattr(norm, "act", None)
    if activation is None and (isinstance(norm, BatchNormAct2d) or kind.family == "timm"):
        activation = None if type(act) is nn.Identity else type(act).__name__
    momentum = getattr(norm, "momentum", None)
    return NormRow(
        found.name,
        kind.name,
        _policy(found),
        activation,
        _channels(norm),
        None if momentum is None else float(momentum),
        float(getattr(norm, "eps", 0.0)),
        _health(found),
    )


def _health(found: Found) -> tuple[str, ...]:
    """Return what the doctor finds in the state of a norm, each in a few words."""
    state = norm_state(found)
    return tuple(finding.short for finding in check_state(state, Torch(), is_trained=state.is_trained))


def _policy(found: Found) -> str:
    if found.kind.family == "frozen":
        return "running"
    if found.kind.family == "synchronized":
        return "synchronized"
    norm = found.module
    policy = getattr(norm, "statistics", None)
    words = [_in_brief(policy) if isinstance(policy, Policy) else "batch"]
    if getattr(norm, "running_mean", None) is None:
        words.append("untracked")
    for name, value in (beyond_stock(norm) if is_layer(norm) else {}).items():
        if name == "domains" and isinstance(norm, Layer):
            words.append(f"domain {domain_of(norm)} of {value}")
        elif name not in ("statistics", "activation"):
            words.append(f"{name}={value}")
    return ", ".join(words)


def _in_brief(policy: Policy) -> str:
    """Return the name of a policy and its parameters that are not the defaults, as `ghost(size=32)`."""
    shown = []
    for field in fields(policy):  # type: ignore[arg-type]  # every policy is a dataclass
        value = getattr(policy, field.name)
        if value != field.default:
            shown.append(f"{field.name}={_in_brief(value) if isinstance(value, Policy) else value}")
    return f"{policy.name}({', '.join(shown)})" if shown else policy.name


def _channels(norm: nn.Module) -> int:
    for name in ("weight", "running_mean", "bias"):
        tensor = getattr(norm, name, None)
        if tensor is not None and not is_lazy(tensor):
            return int(tensor.numel())
    return int(getattr(norm, "num_features", 0))  # a layer without tensors


def _printable(text: str) -> str:
    # Names come from the user's model: a control character in one must not reach the terminal.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
