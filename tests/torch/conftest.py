"""Fixtures of several tests of the torch layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _forward_mode_is_loaded() -> None:
    """Let torch load its rules of forward-mode differentiation, which it does at the first use.

    It scripts them, and its own call of `torch.jit.script` warns of the deprecation.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401


@pytest.fixture
def threads() -> Iterator[None]:
    """Give torch its number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_earlier_graphs() -> Iterator[None]:
    """Clear the caches of torch.compile before and after a test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
