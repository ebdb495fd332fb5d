"""Fixtures of several tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchnorm.kernels import eager
from batchnorm.kernels.cpu import partition
from batchnorm.kernels.cpu import prepared_launch as prepared
from batchnorm.kernels.gpu import partition as gpu_partition


@pytest.fixture(params=["default", "small"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The engines' chunks and parts: as they are, and so small that every case has many."""
    if request.param == "small":
        monkeypatch.setattr(eager, "_CHUNK_CPU", 40)
        monkeypatch.setattr(eager, "_ROW", 4)
        monkeypatch.setattr(prepared, "_PLANE", 2)
        monkeypatch.setattr(prepared, "_PLANES", 60)
        monkeypatch.setattr(partition, "SHORT", 12)
        monkeypatch.setattr(partition, "_ROW", 12)
        monkeypatch.setattr(partition, "_ROWS", 1)
        monkeypatch.setattr(partition, "_BLOCK", 16)
        monkeypatch.setattr(partition, "_PART", 5)
        monkeypatch.setattr(gpu_partition, "_SINGLE", 8)
        monkeypatch.setattr(gpu_partition, "_WHOLE", 64)
        monkeypatch.setattr(gpu_partition, "_ENOUGH", 4)
        monkeypatch.setattr(gpu_partition, "_TILE", 32)
        monkeypatch.setattr(gpu_partition, "_LANE", 3)
        monkeypatch.setattr(gpu_partition, "_SHORT", 8)
        monkeypatch.setattr(gpu_partition, "_SEGMENT", 2)
        monkeypatch.setattr(gpu_partition, "_LINE", 4)
        monkeypatch.setattr(gpu_partition, "_PROGRAMS", 8)
        monkeypatch.setattr(gpu_partition, "_TILES", 3)
        monkeypatch.setattr(gpu_partition, "_MERGED", 8)
        monkeypatch.setattr(gpu_partition, "_BLOCK", 2)
    clear()
    yield str(request.param)
    clear()


def clear() -> None:
    """Forget plans by other numbers."""
    partition.partition.cache_clear()
    prepared.prepare.cache_clear()
    gpu_partition.partition.cache_clear()
