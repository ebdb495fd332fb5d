"""How one call normalizes, tensors of x's size apart: what every path is told."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .policy_step import Choice


class Plan(NamedTuple):
    """How one call normalizes: by `given`, by what `choice` takes, or else by the moments of each group.

    Attributes:
        eps: added to var.
        activation: its name, or None.
        mask: `[N, *S]` bool, True = the value counts; None = all do.
        group_size: samples that share statistics; None = all.
        given: mean and rstd, `[1, C]` each, constants.
        choice: the policy that stands between the moments and the normalization.
    """

    eps: float
    activation: str | None = None
    mask: Tensor | None = None
    group_size: int | None = None
    given: tuple[Tensor, Tensor] | None = None
    choice: Choice | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options of an engine's primitives."""
        return {"activation": self.activation, "mask": self.mask, "group_size": self.group_size}
