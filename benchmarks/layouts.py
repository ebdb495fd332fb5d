"""Layouts of tensors in memory, by the names that they have in result files."""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "channels-last")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


def memory_format(layout: str, axes: int = 4) -> torch.memory_format:
    """Return torch's name of a layout; tensors of 2 or 3 axes stay as they are made."""
    found = _CHANNELS_LAST if layout == "channels-last" else {}
    return found.get(axes, torch.contiguous_format)
