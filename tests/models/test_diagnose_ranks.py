"""`diagnose` over torch.distributed: two real processes over Gloo, of which one alone or both call it."""

from __future__ import annotations

from pathlib import Path

import pytest

import batchnorm
from tests.models import diagnose_rank
from tests.support.ranks import found_by_ranks

from .diagnosed import batches, trained


def test_processes_diagnose_alone_and_together(tmp_path: Path) -> None:
    """Row 58: buffers that differ between processes are found, and `calibrate` makes them the same."""
    first, second = found_by_ranks(diagnose_rank, 2, tmp_path)
    scores = batchnorm.diagnose(trained(), batches()).scores
    for name in ("ours", "stock", "over"):
        layer, by_batch, unchecked = first[name]
        assert (layer, unchecked) == ("1", ())
        assert by_batch == pytest.approx(scores["batch"])
    for found in (first, second):
        assert found["same"] == found["unasked"] == found["mended"] == []
        assert found["near"] == ["('note', 'different-ranks', '4')"]
        layer, severity, distance = found["apart"]
        assert (layer, severity) == ("4", "likely")
        assert distance == pytest.approx(0.55, rel=1e-3)
    assert first["error"].startswith("OptionError: samples is a number of 2")
    assert second["error"].startswith(
        "RankError: diagnose changed nothing on any rank, because rank 0 raised"
    )
