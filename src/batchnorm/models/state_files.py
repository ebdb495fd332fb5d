"""Reads states from untrusted files: no code in them runs, and any damage is an error of one line."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import DataError, MissingExtraError
from batchnorm.files import read_within

_ZIP = b"PK\3\4"


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state in a file: safetensors, or what `torch.save` wrote, of tensors and plain values only.

    Raises:
        DataError: no such format, damage, code in the file, or no state.
        FileError: the file cannot be read, or is a folder, a device or a pipe.
        FileNotFoundError: there is none.
        MissingExtraError: safetensors is not installed.
    """
    content = read_within(path)
    try:
        state = _tensors(content) if path.suffix == ".safetensors" else _checkpoint(content)
    except MissingExtraError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is not read: it is damaged or no plain checkpoint, and reading it might run code; where "
            "you trust it, save its state_dict by torch.save, or as safetensors"
        ) from error
    except Exception as error:  # readers raise errors of any type for damaged files
        raise DataError(f"{path} is not read, as damaged or of another format: {in_short(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    try:
        check_state(state)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return dict(state)


def _tensors(content: bytes) -> Any:
    """Return the tensors of a safetensors file."""
    try:
        from safetensors.torch import load
    except ModuleNotFoundError:
        raise MissingExtraError("a .safetensors file", "safetensors", "study") from None
    return load(content)


def _checkpoint(content: bytes) -> Any:
    """Return what `torch.save` wrote, of this or of older versions of torch."""
    if content.startswith(_ZIP):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
        # torch.save compresses nothing: a member larger than the file would fill the memory.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members) or (
            sum(member.file_size for member in members) > len(content)
        ):
            raise ValueError("its members are compressed")
    if b"bytearray" in content:  # torch allows one, of any size, and no state has one
        raise ValueError("it makes a bytearray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own way to rebuild tensors
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def check_state(state: object) -> None:
    """Raise DataError for an object that is no state: a dict of plain tensors by name."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError("it holds no state: a dict of tensors, or one under the key state_dict")
    for name, value in state.items():
        if not isinstance(name, str):
            raise DataError(f"it holds no state: its keys are names, and one is {str(name)[:40]!r}")
        strange = "on the meta device" if value.is_meta else "quantized" if value.is_quantized else ""
        if value.layout is not torch.strided or value.is_nested:
            strange = "nested" if value.is_nested else str(value.layout)
        if strange:
            raise DataError(f"{name} is {strange}: save it as a plain tensor")


def in_short(error: Exception) -> str:
    """Return the first lines of an error's text as one."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__
