"""Saves how far a calibration has come, in a file that is whole or absent and holds no code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import DataError, FileError, MissingExtraError
from batchnorm.files import check_writable, read_within, write_whole
from batchnorm.models.norms.kinds import BatchNormBase
from batchnorm.statistics.calibration import Accumulator
from batchnorm.statistics.moments import PooledMoments

from .batches import Seen, as_bytes
from .packing import Layout

_FORMAT = "batchnorm calibration 2"
_ANY_FORMAT = "batchnorm calibration "
_REMEDY = "delete it to start over"


@dataclass(frozen=True)
class Progress:
    """The state of a calibration that is not finished.

    Attributes:
        number: number of finished passes over the data.
        settled: moments of the layers that have their statistics.
        accumulated: by the current pass; once all passes are finished, the result.
        seen: the batches of that pass, on this rank.
        is_finished: whether no pass is left.
    """

    number: int
    settled: dict[str, PooledMoments]
    accumulated: Accumulator
    seen: Seen
    is_finished: bool


class ProgressFile:
    """Keeps the progress of a calibration in a safetensors file.

    Args:
        path: of the file.
        fingerprint: of the model and the options.
        every: seconds between two writes.
        layout: of the channels of the norms.

    Raises:
        FileError: it cannot be written.
    """

    def __init__(self, path: Path, fingerprint: str, every: float, layout: Layout) -> None:
        try:
            import safetensors.torch
        except ModuleNotFoundError:
            raise MissingExtraError("calibrate(progress_file=...)", "safetensors", "study") from None
        self.path, self.fingerprint, self.every, self.layout = path, fingerprint, every, layout
        self._files = safetensors.torch
        self._written = time.monotonic()
        with _with_a_remedy():
            check_writable(path)

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._written >= self.every

    def save(self, progress: Progress) -> None:
        """Write the file anew, whole or not at all.

        Raises:
            FileError: it cannot be written; an earlier one is as it was.
        """
        tensors = {
            "settled": self.layout.row(progress.settled),
            "tally": self.layout.packed(progress.accumulated),
        }
        numbers = {"number": progress.number, "is_finished": int(progress.is_finished)}
        facts = {"format": _FORMAT, "fingerprint": self.fingerprint}
        facts |= {name: str(number) for name, number in (numbers | asdict(progress.seen)).items()}
        facts["digest"] = _digest_of_file(facts, tensors)
        with _with_a_remedy():
            write_whole(self.path, self._files.save(tensors, facts))
        self._written = time.monotonic()

    def load(self) -> Progress | None:
        """Return what was saved, None where there is no file.

        Raises:
            DataError: the file is not one of calibrate, or damaged, or of another model or other options.
            FileError: it cannot be read.
        """
        try:
            content = read_within(self.path)
        except FileNotFoundError:
            return None
        tensors, facts = self._parsed(content)
        if facts.get("format") != _FORMAT:
            if facts.get("format", "").startswith(_ANY_FORMAT):
                raise DataError(f"the progress file {self.path} is of another version: {_REMEDY}")
            raise DataError(f"{self.path} is not a progress file of calibrate: name another path")
        if facts.pop("digest", "") != _digest_of_file(facts, tensors):
            raise DataError(f"the progress file {self.path} is damaged: {_REMEDY}")
        if facts.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the progress file {self.path} is of another model, or of other options: {_REMEDY}"
            )
        try:
            return self._progress(tensors, facts)
        except (KeyError, ValueError) as error:  # although its digest is right: it was written so
            raise DataError(f"the progress file {self.path} is damaged: {_REMEDY}") from error

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def _parsed(self, content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and facts of a safetensors file.

        It has 8 bytes with the length of a JSON header, the header, and the tensors. Source: its
        documentation.
        """
        try:
            tensors = self._files.load(content)
            length = int.from_bytes(content[:8], "little")
            facts = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        except Exception as error:  # the reader has an error class of its own, and raises others too
            raise DataError(
                f"{self.path} is not a whole safetensors file ({error}): if it is a progress file, {_REMEDY}"
            ) from error
        return tensors, facts

    def _progress(self, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Progress:
        """Return what a file says; KeyError or ValueError where something is missing or out of range."""
        names = ("number", "is_finished", "samples", "batches", "checksum")
        number, is_finished, *seen = (int(facts[name]) for name in names)
        settled, tally = tensors["settled"], tensors["tally"]
        forms = [(settled, (3, self.layout.total)), (tally, (self.layout.length,))]
        is_wrong = any(t.shape != form or t.dtype is not torch.float64 for t, form in forms)
        if is_wrong or min(number, *seen) < 0:
            raise ValueError
        accumulated = self.layout.unpacked(tally)
        return Progress(number, self.layout.split(settled), accumulated, Seen(*seen), bool(is_finished))


def fingerprint(model: nn.Module, norms: Mapping[str, BatchNormBase], options: Mapping[str, Any]) -> str:
    """Return a digest of the names, shapes and values of a model, and of the options.

    Running statistics are left out, as the result does not depend on them.
    """
    ours = {id(buffer) for norm in norms.values() for buffer in norm.buffers(recurse=False)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    head = json.dumps(options, sort_keys=True) + json.dumps(list(norms))
    return _digest(head, ((name, tensor) for name, tensor in tensors if id(tensor) not in ours))


def _digest(head: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(head.encode(), digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _digest_of_file(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return _digest(json.dumps(facts, sort_keys=True), sorted(tensors.items()))


@contextlib.contextmanager
def _with_a_remedy() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(
            f"the progress file {error}; free some space or name another place; the model is unchanged"
        ) from error
