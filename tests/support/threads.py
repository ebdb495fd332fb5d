"""Whole networks on one thread: several workers with several threads each wait for each other's cores.

A network of the zoo took 3 s alone, and 28 s beside another worker.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
