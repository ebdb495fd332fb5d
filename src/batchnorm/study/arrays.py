"""NumPy arrays of what a user's function returns: arrays, lists, and tensors of any framework."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import DataError


def as_array(what: str, values: object) -> npt.NDArray[Any]:
    """Return values as an array, without gradients, and of a dtype that NumPy computes with.

    Args:
        what: they are, for errors.
        values: an array, a tensor, or lists of them.

    Raises:
        DataError: they are masked, ragged, or cannot be converted.
    """
    if _is_masked(values):
        raise DataError(
            f"{what} is a masked array, and a study has no use for the mask: leave masked examples out, or "
            "fill them with .filled(value)"
        )
    try:
        array = np.asarray(_without_gradient(values))
    except (Exception, SystemExit) as error:  # whatever the user's __array__ raises
        said = (str(error).strip() or "no message").splitlines()[0]
        ragged = "; every example needs the same shape" if "inhomogeneous" in said else ""
        raise DataError(
            f"{what} cannot be made an array: {type(error).__name__}: {said.rstrip('.')}{ragged}"
        ) from error
    is_of_another_library = array.dtype.kind == "V" and not issubclass(array.dtype.type, np.void)
    return array.astype(np.float32) if is_of_another_library else array  # such as JAX's bfloat16


def _is_masked(values: object, depth: int = 0) -> bool:
    if isinstance(values, list | tuple) and depth < 32:  # NumPy itself has no more dimensions than 64
        return any(_is_masked(item, depth + 1) for item in values)
    return np.ma.isMaskedArray(values)


def _without_gradient(values: object) -> object:
    torch = sys.modules.get("torch")
    if torch is None:
        return values
    if isinstance(values, torch.Tensor):
        plain = values.detach().cpu().resolve_conj()
        # NumPy has no bfloat16 and no float8; float32 holds all of their numbers.
        return plain.float() if plain.is_floating_point() and plain.itemsize <= 2 else plain
    if isinstance(values, Sequence) and len(values) and isinstance(values[0], torch.Tensor):
        return [_without_gradient(item) for item in values]
    return values
