"""The study's files under mutation: read, or refused by the package's own errors, in bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from batchnorm.errors import DataError, FileError, in_one_line
from batchnorm.studies.data import Dataset
from batchnorm.studies.frameworks import Framework
from batchnorm.studies.json_files import convert, settings_at, write_json
from batchnorm.studies.mnist import load_mnist, read_idx
from batchnorm.studies.options import StudyOptions
from batchnorm.studies.records import Run, Timing
from batchnorm.studies.summary import curves_csv, summarize
from batchnorm.studies.verdicts import judge, read
from tests.study.idx import idx, some_mnist
from tests.study.results_fixture import record, results
from tests.study.test_records import STORED

from .budget import CASES, SEED, SHARDS, shards
from .mutations import mutated

FEW = 60
STUDY = StudyOptions(
    data=("digits",),
    networks=("mlp",),
    arms=("batchnorm",),
    learning_rates=(1e-3,),
    seeds=1,
    batch_sizes=(5,),
)
MOST_BYTES = 50e6


def _idx() -> bytes:
    return idx(some_mnist()["t10k-images-idx3-ubyte"])


def _npz(*, packed: bool) -> bytes:
    content = io.BytesIO()
    arrays = dict(zip(("x_train", "y_train", "x_test", "y_test"), some_mnist().values(), strict=True))
    (np.savez_compressed if packed else np.savez)(content, **arrays)  # type: ignore[operator]
    return content.getvalue()


def _read_idx(path: Path) -> None:
    read_idx(path, 3)


def _read_npz(path: Path) -> None:
    load_mnist(path.parent)


def _read_run(path: Path) -> None:
    """A record that is taken is one that all that follows can use."""
    settings_at(path)
    _, found = STORED["run"]
    if (stored := found(path)) is not None:
        run = convert(stored, Run, exact=True)
        curves_csv([run])
        timing = convert({"arms": STORED["timing"][0]["arms"]}, Timing, exact=True)
        x, y = np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1])
        data = Dataset("own", "here", x, y, x, y)
        summary = summarize(
            STUDY, {"digits": data}, [run], {STUDY.settings()[0]: timing}, Framework("torch", None, ())
        )
        write_json(path.with_name("results.json"), summary)
        _read_results(path.with_name("results.json"))


def _read_timing(path: Path) -> None:
    _, found = STORED["timing"]
    found(path)


def _read_results(path: Path) -> None:
    for network in read(path).networks:
        judge(network)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# Name of the file, what it holds, and how it is read.
READERS: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], None]]] = {
    "idx": ("images", _idx, _read_idx),
    "gz": ("images.gz", lambda: gzip.compress(_idx(), mtime=0), _read_idx),
    "npz": ("mnist.npz", lambda: _npz(packed=False), _read_npz),
    "npz, compressed": ("mnist.npz", lambda: _npz(packed=True), _read_npz),
    "run": ("run.json", lambda: _json(STORED["run"][0]), _read_run),
    "timing": ("timing.json", lambda: _json(STORED["timing"][0]), _read_timing),
    "results": (
        "results.json",
        lambda: _json(results([record(arm=arm, epochs=1) for arm in ("none", "batchnorm")])),
        _read_results,
    ),
}  # fmt: skip


@shards
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_read_or_refused(tmp_path: Path, kind: str, shard: int) -> None:
    name, content_of, read_file = READERS[kind]
    content, path = content_of(), tmp_path / name
    number = max(1, CASES // (SHARDS * len(READERS))) if CASES else FEW
    path.write_bytes(content)
    read_file(path)
    for case in range(number):
        # One number gives the same damage again, whatever the others were.
        path.write_bytes(mutated(content, Random(f"{SEED} {kind} {shard} {case}")))
        try:
            assert_read_or_refused(path, read_file)
        except BaseException as error:
            error.add_note(f"seed {SEED}, shard {shard}, case {case}")
            raise


def assert_read_or_refused(path: Path, read_file: Callable[[Path], None]) -> None:
    refused = None
    tracemalloc.start()
    try:
        read_file(path)
    except (DataError, FileError) as error:
        refused = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES, f"{peak:,} bytes"
    if refused is not None:
        assert str(path) in refused, refused
        assert in_one_line(refused) == refused, repr(refused)
        assert len(refused) < 2000, refused
