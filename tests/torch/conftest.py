"""What the tests of the torch layers need of torch before they start."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(autouse=True, scope="session")
def _forward_mode_is_loaded() -> None:
    """Let torch load its rules of forward-mode differentiation, which it does at the first use.

    It scripts them, and its own call of `torch.jit.script` warns of the deprecation.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401
