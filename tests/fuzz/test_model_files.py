"""Damaged weights and progress files: an answer or an error of ours, and memory that stays bounded."""

from __future__ import annotations

import io
import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import nn

from batchnorm.cli.weights import load_weights
from batchnorm.errors import BatchNormError, DataError
from batchnorm.models.calibration.batches import Seen
from batchnorm.models.calibration.packing import Layout
from batchnorm.models.calibration.progress_file import Progress, ProgressFile

from .budget import fuzz, shards
from .mutations import mutated

_SEEDS = st.integers(0, 2**32)
_MOST = 300 * 1024  # KiB more than before at any time: torch's own readers, loaded on first use, among them


def model() -> nn.Module:
    """Return a model whose state has several dtypes, and parameters that are shared."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same bytes in every process
        made = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4).double())
    made[2].weight = made[0].weight
    return made


def _saved(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    content = {"state_dict": model().state_dict(), "epoch": 3, "name": "a text", "rates": [0.1, 0.2]}
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _as_safetensors() -> bytes:
    state = {name: value for name, value in model().state_dict().items() if name != "2.weight"}
    return safetensors.torch.save(state, {"format": "pt"})


FORMATS = {
    "legacy.pt": _saved(legacy=True),
    "zip.pt": _saved(legacy=False),
    "w.safetensors": _as_safetensors(),
}


def check_weights(name: str, seed: int) -> None:
    """Raise unless a damaged file is loaded, or refused in one line, within bounds of memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(mutated(FORMATS[name], Random(seed)))
        said = str(path)
        try:
            load_weights(model(), path)
        except DataError as error:
            said = str(error)
        assert said.startswith(str(path)), said
        assert len(said.splitlines()) == 1, said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < _MOST, "too much memory"


@shards
def test_legacy_checkpoints(shard: int) -> None:
    fuzz(lambda seed: check_weights("legacy.pt", seed), shard, 0.25, 100, seed=_SEEDS)


@shards
def test_zipped_checkpoints(shard: int) -> None:
    fuzz(lambda seed: check_weights("zip.pt", seed), shard, 0.15, 60, seed=_SEEDS)


@shards
def test_safetensors(shard: int) -> None:
    fuzz(lambda seed: check_weights("w.safetensors", seed), shard, 0.15, 60, seed=_SEEDS)


LAYOUT = Layout({"a": 3, "b": 2})
PROGRESS = Progress(
    number=2,
    settled=LAYOUT.split(torch.arange(15.0, dtype=torch.float64).view(3, 5)),
    accumulated=LAYOUT.unpacked(torch.arange(float(LAYOUT.length), dtype=torch.float64)),
    seen=Seen(samples=40, batches=5, checksum=123456789),
    is_finished=False,
)
REST: dict[str, None] = {"settled": None, "accumulated": None}  # tensors have no == of one value


def check_progress(seed: int) -> None:
    """Raise unless a damaged progress file is what it was, or is refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = ProgressFile(Path(folder) / "progress", "the same", 0.0, LAYOUT)
        file.save(PROGRESS)
        file.path.write_bytes(mutated(file.path.read_bytes(), Random(seed)))
        try:
            found = file.load()
        except BatchNormError:
            return
        assert found is not None
        assert replace(found, **REST) == replace(PROGRESS, **REST)
        assert torch.equal(LAYOUT.row(found.settled), LAYOUT.row(PROGRESS.settled))
        assert torch.equal(LAYOUT.packed(found.accumulated), LAYOUT.packed(PROGRESS.accumulated))


@shards
def test_progress_files(shard: int) -> None:
    fuzz(check_progress, shard, 0.15, 60, seed=_SEEDS)
