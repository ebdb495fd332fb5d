"""The table that `fold` prints: where each batch normalization of a model goes, or why it stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchnorm.text_table import aligned, as_html

Direction = Literal["before", "after", "beside"]


@dataclass(frozen=True)
class FoldRow:
    """One batch normalization.

    Attributes:
        name: qualified by the models and layers around it, such as `backbone/bn_1`.
        into: qualified name of the layer whose weights take it, or of several; "a within b" for a layer that
            then becomes part of the one beside it; None where it is left.
        direction: whether that is the layer before the normalization, the one after it, or one that reads the
            same and is added to it; None where left.
        reason: why it is left; "" where it is folded.
    """

    name: str
    into: str | None
    direction: Direction | None
    reason: str


@dataclass(frozen=True)
class FoldTable:
    """The decision of `fold` for each batch normalization; `print` and notebooks show it.

    Attributes:
        model: name of the model.
        rows: one per layer, in the order of the model.
    """

    model: str
    rows: tuple[FoldRow, ...]

    def __str__(self) -> str:
        return "\n".join([self._title(), *(aligned(self._cells()) if self.rows else ())])

    def _repr_html_(self) -> str:
        return as_html(self._title(), self._cells())

    def _title(self) -> str:
        if not self.rows:
            return f"{self.model} has no batch normalization to fold."
        folded = sum(row.into is not None for row in self.rows)
        return f"{self.model}: {folded} of {len(self.rows)} batch normalizations folded"

    def _cells(self) -> list[tuple[str, str, str]]:
        return [
            ("normalization", "folded into", "left because"),
            *(
                (row.name, f"{row.into}, {row.direction} it" if row.into else "-", row.reason)
                for row in self.rows
            ),
        ]
