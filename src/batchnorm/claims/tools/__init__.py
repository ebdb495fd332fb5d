"""Measures behind the experiments, for models of one's own."""

from .corruptions import CORRUPTIONS, adapted_error, corrupted
from .gradient_line import GradientLine, along_gradient
from .gradients_by_depth import activations_by_depth, gradients_by_depth, growth_per_layer
from .noise import noise_behind_norms
from .statistics_error import error_over_samples, variance_shift

__all__ = [
    "CORRUPTIONS",
    "GradientLine",
    "activations_by_depth",
    "adapted_error",
    "along_gradient",
    "corrupted",
    "error_over_samples",
    "gradients_by_depth",
    "growth_per_layer",
    "noise_behind_norms",
    "variance_shift",
]
