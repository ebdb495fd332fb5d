"""How far a calibration has come, in a file: whole or not there, and nothing in it can run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import DataError, FileError, MissingExtraError

_FORMAT = "batchnorm calibration 1"
_REMEDY = "delete it to start over"


@dataclass(frozen=True)
class Progress:
    """How far it has come.

    Attributes:
        number: passes over the data that are finished.
        settled: moments of the layers that have theirs, `[3, total]`.
        tally: of the pass that is going on, as a row of numbers.
        checksum: of the last batch of that pass.
    """

    number: int
    settled: Tensor
    tally: Tensor
    checksum: int


class ProgressFile:
    """A safetensors file.

    Args:
        path: of the file.
        fingerprint: of the model and the options.
        every: seconds between two writes.
    """

    def __init__(self, path: Path, fingerprint: str, every: float) -> None:
        try:
            import safetensors.torch
        except ModuleNotFoundError:
            raise MissingExtraError("calibrate(progress_file=...)", "safetensors", "study") from None
        self.path, self.fingerprint, self.every = path, fingerprint, every
        self._files = safetensors.torch
        self._written = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._written >= self.every

    def save(self, progress: Progress) -> None:
        """Write the file anew, whole or not at all.

        Raises:
            FileError: it cannot be written; an earlier one is as it was.
        """
        tensors = {"settled": progress.settled, "tally": progress.tally}
        facts = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "number": str(progress.number),
            "checksum": str(progress.checksum),
        }
        facts["digest"] = _digest(facts, tensors)
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with draft.open("wb") as file:
                file.write(self._files.save(tensors, facts))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise FileError(
                f"the progress file {self.path} cannot be written ({error.strerror or error}): free some "
                "space or name another place; the model is unchanged"
            ) from error
        self._written = time.monotonic()

    def load(self) -> Progress | None:
        """Return what was saved, None where there is no file.

        Raises:
            DataError: the file is none of calibrate's, damaged, or of another model or other options.
            FileError: it cannot be read.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(
                f"the progress file {self.path} cannot be read: {error.strerror or error}"
            ) from error
        tensors, facts = self._parsed(content)
        if facts.get("format") != _FORMAT:
            raise DataError(f"{self.path} is not a progress file of calibrate: name another path")
        digest = facts.pop("digest", "")
        if digest != _digest(facts, tensors):
            raise DataError(f"the progress file {self.path} is damaged: {_REMEDY}")
        if facts["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the progress file {self.path} is of another model, or of other options: {_REMEDY}"
            )
        return Progress(int(facts["number"]), tensors["settled"], tensors["tally"], int(facts["checksum"]))

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
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _digest(facts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
