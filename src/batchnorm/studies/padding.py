"""Sequences of several lengths in one array; NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Padded:
    """Examples that are padded to one length; indexed by rows, as an array.

    Attributes:
        values: float32, `[N, L]` tokens or `[N, L, C]` frames; int64 tokens where they came under a name.
            Padding that a study adds is 0.
        lengths: int64 `[N]`, 1 to L.
    """

    values: Array
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Padded:
        return Padded(self.values[rows], self.lengths[rows])

    def longer(self, share: float) -> Padded:
        """Returns the same examples with padding added: `share` times L, rounded up."""
        more = int(np.ceil(share * self.values.shape[1]))
        widths = [(0, 0), (0, more), *[(0, 0)] * (self.values.ndim - 2)]
        return Padded(np.pad(self.values, widths), self.lengths)


Examples = Array | Padded


def padded(sequences: Sequence[Array], length: int) -> Padded:
    """Returns sequences `[L_i, ...]`, each followed by zeros up to one length."""
    values = np.zeros((len(sequences), length, *sequences[0].shape[1:]), np.float32)
    for row, sequence in zip(values, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Padded(values, np.array([len(sequence) for sequence in sequences], np.int64))
