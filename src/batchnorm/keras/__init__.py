"""Batch normalization for Keras 3, on its TensorFlow, JAX and PyTorch backends, `batchnorm.keras`."""

from __future__ import annotations

from batchnorm.errors import MissingExtraError

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as _missing:
    if _missing.name != "keras":
        raise  # Keras is there; what it lacks is its backend, and it says so
    raise MissingExtraError("batchnorm.keras", "keras", "keras") from _missing

from .agreement import FoldError
from .calibrate import calibrate
from .callback import Calibrate
from .fold import fold, fold_table
from .freeze import freeze, unfreeze
from .layers import BatchNormalization

__all__ = [
    "BatchNormalization",
    "Calibrate",
    "FoldError",
    "calibrate",
    "fold",
    "fold_table",
    "freeze",
    "unfreeze",
]
