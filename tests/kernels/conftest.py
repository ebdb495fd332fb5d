"""What several of these tests are run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchnorm.kernels import eager
from batchnorm.kernels.cpu import call, plan
from batchnorm.kernels.gpu import plan as gpu_plan


@pytest.fixture(params=["default", "small"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The engines' chunks and parts: as they are, and so small that every case has many."""
    if request.param == "small":
        monkeypatch.setattr(eager, "_CHUNK_CPU", 40)
        monkeypatch.setattr(eager, "_ROW", 4)
        monkeypatch.setattr(call, "_PLANE", 2)
        monkeypatch.setattr(call, "_PLANES", 60)
        monkeypatch.setattr(plan, "SHORT", 12)
        monkeypatch.setattr(plan, "_ROW", 12)
        monkeypatch.setattr(plan, "_ROWS", 1)
        monkeypatch.setattr(plan, "_BLOCK", 16)
        monkeypatch.setattr(plan, "_PART", 5)
        monkeypatch.setattr(gpu_plan, "_SINGLE", 8)
        monkeypatch.setattr(gpu_plan, "_WHOLE", 64)
        monkeypatch.setattr(gpu_plan, "_ENOUGH", 4)
        monkeypatch.setattr(gpu_plan, "_TILE", 32)
        monkeypatch.setattr(gpu_plan, "_LANE", 3)
        monkeypatch.setattr(gpu_plan, "_SHORT", 8)
        monkeypatch.setattr(gpu_plan, "_SEGMENT", 2)
        monkeypatch.setattr(gpu_plan, "_LINE", 4)
        monkeypatch.setattr(gpu_plan, "_PROGRAMS", 8)
        monkeypatch.setattr(gpu_plan, "_TILES", 3)
        monkeypatch.setattr(gpu_plan, "_MERGED", 8)
        monkeypatch.setattr(gpu_plan, "_BLOCK", 2)
    clear()
    yield str(request.param)
    clear()


def clear() -> None:
    """Forget plans by other numbers."""
    plan.plan.cache_clear()
    gpu_plan.plan.cache_clear()
