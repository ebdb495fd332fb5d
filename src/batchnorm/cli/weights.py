"""Loads weights from an untrusted file into a model: any misfit is an error of one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import _remove_duplicate_names
from torch import Tensor, nn

from batchnorm.errors import DataError
from batchnorm.models.state_files import in_short, read_state


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state into a model: safetensors, or what `torch.save` wrote, of tensors and plain values only.

    Raises:
        DataError: no such format, damage, code in the file, or another model's state.
        FileError: the file cannot be read, or is a folder, a device or a pipe.
        FileNotFoundError: there is none.
    """
    state = read_state(path)
    try:
        _check(state, model.state_dict())
        model.load_state_dict(_with_ties(state, model))
    except Exception as error:
        raise DataError(f"{path}: {in_short(error)}") from error


def _check(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Raise DataError for a state of other dtypes than those of a model whose own is `own`."""
    for name, value in state.items():
        there = own.get(name)
        if isinstance(there, Tensor) and not torch.can_cast(value.dtype, there.dtype):
            raise DataError(f"{name} is {value.dtype}, where the model has {there.dtype}: convert it first")


def _with_ties(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the state with all names of the tensors that the model shares: safetensors hold one name."""
    for kept, others in _remove_duplicate_names(model.state_dict(), preferred_names=list(state)).items():
        for name in others:
            if kept in state and name not in state:
                state[name] = state[kept]
    return state
