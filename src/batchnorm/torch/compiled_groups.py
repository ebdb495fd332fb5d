"""How many statistics groups a batch has, where its number of samples may be a symbol."""

from __future__ import annotations

import torch
from torch import Tensor


def groups_of(x: Tensor, group_size: int | None) -> int:
    """Return the number of groups of `group_size` samples, the last of which may be smaller; at least 1."""
    if group_size is None:
        return 1
    groups: int = torch.sym_max(1, (x.shape[0] + group_size - 1) // group_size)  # type: ignore[no-untyped-call]
    return groups
