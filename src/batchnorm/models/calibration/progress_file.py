"""How far a calibration has come, in a file: whole or not there, and nothing in it can run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import DataError, FileError, MissingExtraError
from batchnorm.files import check_writable, read_within, write_whole

from .accumulator import Layout, Tally
from .batches import Seen, as_bytes

_FORMAT = "batchnorm calibration 2"
_ANY_FORMAT = "batchnorm calibration "
_REMEDY = "delete it to start over"


@dataclass(frozen=True)
class Progress:
    """How far it has come.

    Attributes:
        number: passes over the data that are finished.
        settled: moments of the layers that have theirs, `[3, total]`.
        tally: of the pass that is going on, as a row of numbers; of the last one if all are finished.
        seen: the batches of that pass, on this rank.
        is_finished: whether no pass is left.
    """

    number: int
    settled: Tensor
    tally: Tensor
    seen: Seen
    is_finished: bool


class ProgressFile:
    """A safetensors file.

    Args:
        path: of the file.
        fingerprint: of the model and the options.
        every: seconds between two writes.

    Raises:
        FileError: it could not be written.
    """

    def __init__(self, path: Path, fingerprint: str, every: float) -> None:
        try:
            import safetensors.torch
        except ModuleNotFoundError:
            raise MissingExtraError("calibrate(progress_file=...)", "safetensors", "study") from None
        self.path, self.fingerprint, self.every = path, fingerprint, every
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
        tensors = {"settled": progress.settled, "tally": progress.tally}
        numbers = {"number": progress.number, "is_finished": int(progress.is_finished)}
        facts = {"format": _FORMAT, "fingerprint": self.fingerprint}
        facts |= {name: str(number) for name, number in (numbers | asdict(progress.seen)).items()}
        facts["digest"] = _digest(facts, tensors)
        with _with_a_remedy():
            write_whole(self.path, self._files.save(tensors, facts))
        self._written = time.monotonic()

    def load(self, layout: Layout) -> Progress | None:
        """Return what was saved, None where there is no file.

        Args:
            layout: of the channels of the norms.

        Raises:
            DataError: the file is none of calibrate's, damaged, or of another model or other options.
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
        if facts.pop("digest", "") != _digest(facts, tensors):
            raise DataError(f"the progress file {self.path} is damaged: {_REMEDY}")
        if facts.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"the progress file {self.path} is of another model, or of other options: {_REMEDY}"
            )
        try:
            return _progress(tensors, facts, layout)
        except (KeyError, ValueError) as error:  # its digest is right: the file was made so
            raise DataError(f"the progress file {self.path} is damaged: {_REMEDY}") from error

    def remove(self) -> None:
        """Delete the file: its work is done."""
        self.path.unlink(missing_ok=True)

    def _parsed(self, content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return tensors and facts of a safetensors file.

        Layout: 8 bytes with the length of a JSON header, the header, the tensors. Source: its
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


def fingerprint(model: nn.Module, norms: Mapping[str, _BatchNorm], options: Mapping[str, Any]) -> str:
    """Return what identifies a model by its names, shapes and values, and the options.

    Running statistics are not in it: the result does not depend on them.
    """
    ours = {id(buffer) for norm in norms.values() for buffer in norm.buffers(recurse=False)}
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=16)
    digest.update(json.dumps(list(norms)).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in ours:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(as_bytes(tensors[name]))
    return digest.hexdigest()


def _progress(tensors: Mapping[str, Tensor], facts: Mapping[str, str], layout: Layout) -> Progress:
    """Return what a file says; KeyError or ValueError where it says too little, or nonsense."""
    names = ("number", "is_finished", "samples", "batches", "checksum")
    number, is_finished, *seen = (int(facts[name]) for name in names)
    settled, tally = tensors["settled"], tensors["tally"]
    forms = [(settled, (3, layout.total)), (tally, (Tally.length(layout),))]
    if min(number, *seen) < 0 or any(t.shape != form or t.dtype is not torch.float64 for t, form in forms):
        raise ValueError
    Tally.from_numbers(layout, tally)
    return Progress(number, settled, tally, Seen(*seen), bool(is_finished))


@contextlib.contextmanager
def _with_a_remedy() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(
            f"the progress file {error}; free some space or name another place; the model is unchanged"
        ) from error
