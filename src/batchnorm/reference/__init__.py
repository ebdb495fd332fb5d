"""The mathematics of batch normalization in NumPy float64: readable, slow, derived in its docstrings.

Every array is channels first: x is `[N, C, *S]`, with `[N, C]` as the case of no spatial axes. Nothing here
is fast, and nothing here imports the rest of the library: it is what the rest is compared with.
"""

from __future__ import annotations

from .activations import ACTIVATIONS, Activation
from .backward import Gradients, backward
from .forward import Normalized, forward
from .moments import Moments, merge, moments
from .policies import Corrected, adapted, renorm
from .running import (
    Running,
    update_running_keras,
    update_running_pooled,
    update_running_sequential,
    update_running_torch,
)

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Corrected",
    "Gradients",
    "Moments",
    "Normalized",
    "Running",
    "adapted",
    "backward",
    "forward",
    "merge",
    "moments",
    "renorm",
    "update_running_keras",
    "update_running_pooled",
    "update_running_sequential",
    "update_running_torch",
]
