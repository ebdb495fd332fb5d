"""torch's own folding, `torch.fx.experimental.optimization.fuse`."""

from __future__ import annotations

import warnings

from torch import nn


def fx_fuse(model: nn.Module) -> nn.Module:
    """Return the copy with norms folded; raises whatever fx does where it cannot trace the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it compiles scripts, which is deprecated
        from torch.fx.experimental.optimization import fuse
    found: nn.Module = fuse(model)
    return found
