"""Batch normalization as functions of torch tensors, `batchnorm.functional`."""

from __future__ import annotations

from batchnorm.errors import naming_the_extra

with naming_the_extra("batchnorm.functional"):
    from batchnorm.torch.functional import batch_norm, moments, normalize_batch, pure_batch_norm

__all__ = ["batch_norm", "moments", "normalize_batch", "pure_batch_norm"]
