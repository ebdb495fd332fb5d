"""What several of these tests are run under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchnorm.kernels import eager
from batchnorm.kernels.cpu import call, plan


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
    plan.plan.cache_clear()
    yield str(request.param)
    plan.plan.cache_clear()
