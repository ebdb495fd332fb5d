"""Batch normalization for Keras 3, on its TensorFlow, JAX and PyTorch backends, `batchnorm.keras`."""

from __future__ import annotations

from batchnorm.errors import naming_the_extra

with naming_the_extra("batchnorm.keras"):
    import keras as _keras  # noqa: F401

from .calibrate import Calibrate, calibrate
from .diagnose import Doctor, diagnose
from .fold import fold, fold_table
from .folding.verify import FoldError
from .freeze import freeze, unfreeze
from .layers import BatchNormalization
from .merge_statistics import merge_statistics
from .monitor import Monitor

__all__ = [
    "BatchNormalization",
    "Calibrate",
    "Doctor",
    "FoldError",
    "Monitor",
    "calibrate",
    "diagnose",
    "fold",
    "fold_table",
    "freeze",
    "merge_statistics",
    "unfreeze",
]
