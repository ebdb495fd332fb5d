"""Batch normalization for PyTorch and Keras: exact layers, whole-model tools, and experiments.

`import batchnorm` imports no framework. A name is resolved on first use, and a framework that is not
installed is an error that names the extra to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__

# Public name -> (the module that defines it, its name there; None for a module, which has that name itself).
_HOMES: dict[str, tuple[str, str | None]] = {
    "Adapted": ("batchnorm.statistics.adapted", "Adapted"),
    "Batch": ("batchnorm.statistics.batch", "Batch"),
    "BatchNorm1d": ("batchnorm.torch.layers", "BatchNorm1d"),
    "BatchNorm2d": ("batchnorm.torch.layers", "BatchNorm2d"),
    "BatchNorm3d": ("batchnorm.torch.layers", "BatchNorm3d"),
    "Ghost": ("batchnorm.statistics.ghost", "Ghost"),
    "Renorm": ("batchnorm.statistics.renorm", "Renorm"),
    "Running": ("batchnorm.statistics.running", "Running"),
    "SyncBatchNorm": ("batchnorm.torch.sync", "SyncBatchNorm"),
    "Synced": ("batchnorm.statistics.synced", "Synced"),
    "accumulate": ("batchnorm.models.accumulate", "accumulate"),
    "calibrate": ("batchnorm.models.calibrate", "calibrate"),
    "conventions": ("batchnorm.conventions", None),
    "convert": ("batchnorm.models.convert", "convert"),
    "diagnose": ("batchnorm.models.diagnose", "diagnose"),
    "domain": ("batchnorm.models.domain", "domain"),
    "errors": ("batchnorm.errors", None),
    "fold": ("batchnorm.models.fold", "fold"),
    "freeze": ("batchnorm.models.freeze", "freeze"),
    "functional": ("batchnorm.functional", None),
    "fuse": ("batchnorm.models.fuse", "fuse"),
    "inspect": ("batchnorm.models.inspect", "inspect"),
    "keras": ("batchnorm.keras", None),
    "kernels": ("batchnorm.kernels", None),
    "lean": ("batchnorm.torch.lean", "lean"),
    "mask": ("batchnorm.models.mask", "mask"),
    "merge_statistics": ("batchnorm.models.merge_statistics", "merge_statistics"),
    "monitor": ("batchnorm.models.monitor", "monitor"),
    "reuse_memory": ("batchnorm.allocator", "reuse_memory"),
    "revert": ("batchnorm.models.revert", "revert"),
    "study": ("batchnorm.studies.study", "study"),
    "unfreeze": ("batchnorm.models.freeze", "unfreeze"),
}

__all__ = [
    "Adapted",
    "Batch",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Ghost",
    "Renorm",
    "Running",
    "SyncBatchNorm",
    "Synced",
    "__version__",
    "accumulate",
    "calibrate",
    "conventions",
    "convert",
    "diagnose",
    "domain",
    "errors",
    "fold",
    "freeze",
    "functional",
    "fuse",
    "inspect",
    "keras",
    "kernels",
    "lean",
    "mask",
    "merge_statistics",
    "monitor",
    "reuse_memory",
    "revert",
    "study",
    "unfreeze",
]

if TYPE_CHECKING:
    from . import conventions, errors, functional, keras, kernels
    from .allocator import reuse_memory
    from .models.accumulate import accumulate
    from .models.calibrate import calibrate
    from .models.convert import convert
    from .models.diagnose import diagnose
    from .models.domain import domain
    from .models.fold import fold
    from .models.freeze import freeze, unfreeze
    from .models.fuse import fuse
    from .models.inspect import inspect
    from .models.mask import mask
    from .models.merge_statistics import merge_statistics
    from .models.monitor import monitor
    from .models.revert import revert
    from .statistics.adapted import Adapted
    from .statistics.batch import Batch
    from .statistics.ghost import Ghost
    from .statistics.renorm import Renorm
    from .statistics.running import Running
    from .statistics.synced import Synced
    from .studies.study import study
    from .torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
    from .torch.lean import lean
    from .torch.sync import SyncBatchNorm


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .errors import naming_the_extra

    module_name, attribute = _HOMES[name]
    with naming_the_extra(f"batchnorm.{name}"):
        module = importlib.import_module(module_name)
    value: object = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
