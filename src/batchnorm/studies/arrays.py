"""Makes arrays of what a user's code returns, and checks them as inputs or targets; NumPy only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import DataError

from .padding import Array

# Labels beyond this, and beyond the number of examples, count no classes: each would get an output.
_CLASSES_OF_FEW_EXAMPLES = 1000
_NUMBERED = "numpy.unique(y, return_inverse=True)[1] numbers classes of any kind"


def as_array(what: str, values: object) -> npt.NDArray[Any]:
    """Returns values as an array, without gradients, and of a dtype that NumPy computes with.

    Args:
        what: the name of the values, for errors.
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


def checked_inputs(what: str, values: object, *, keeps_integers: bool = False) -> Array:
    """Returns inputs `[N, ...]` as float32, all of them finite.

    Args:
        what: the name of the values, for errors.
        values: of any kind that `as_array` takes.
        keeps_integers: whether whole numbers become int64, as networks called by name expect of tokens.

    Raises:
        DataError: they are no real numbers, not finite, or have no examples.
    """
    array = as_array(what, values)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{what} holds {array.dtype}, not real numbers: return it as .astype(numpy.float32)")
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{what} has shape {array.shape}, not [examples, ...] with some of each")
    if keeps_integers and array.dtype.kind in "iu":
        return array.astype(np.int64)
    return _float32(what, array)


def checked_classes(what: str, values: object, examples: int, *, least: int) -> npt.NDArray[np.int64]:
    """Returns classes `[N]`, counted from 0.

    Args:
        what: the name of the values, for errors.
        values: of any kind that `as_array` takes.
        examples: how many there are.
        least: how many classes are wanted.

    Raises:
        DataError: they are no whole numbers, or count no classes.
    """
    array = as_array(what, values)
    if array.ndim != 1 or len(array) != examples:
        raise DataError(
            f"{what} has shape {array.shape}, not [{examples}] as {_inputs_of(what)} asks: classes are "
            "whole numbers; for other targets take another loss than cross_entropy"
        )
    if array.dtype.kind not in "iub" and not (
        array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.round(array)).all()
    ):
        wanted = "whole numbers that count classes from 0"
        raise DataError(
            f"{what} holds {array.dtype}, not {wanted}: {_NUMBERED}; for targets of other kinds take another "
            "loss than cross_entropy"
        )
    low, high = array.min(), array.max()
    if low < 0 or high + 1 < least:
        wanted = "two or more counted from 0"
        raise DataError(f"{what} holds classes {low} to {high}, not {wanted}: {_NUMBERED}")
    if high >= (most := max(_CLASSES_OF_FEW_EXAMPLES, examples)):
        wanted = f"classes counted from 0 stay below {most}"
        raise DataError(f"{what} holds labels up to {high}, and {wanted}: {_NUMBERED}")
    return array.astype(np.int64)


def checked_numbers(what: str, values: object, examples: int) -> npt.NDArray[np.float32]:
    """Returns targets `[N, K...]` as float32, all of them finite; `[N]` becomes `[N, 1]`.

    Raises:
        DataError: they are no real numbers, not finite, or not as many as there are examples.
    """
    array = _as_many(what, values, examples)
    return _float32(what, array if array.ndim > 1 else array[:, None])


def checked_targets(what: str, values: object, examples: int) -> Array:
    """Returns targets `[N, ...]` of a loss of the user's own: whole numbers as int64, others as float32.

    Raises:
        DataError: they are no real numbers, not finite, or not as many as there are examples.
    """
    array = _as_many(what, values, examples)
    return array.astype(np.int64) if array.dtype.kind in "iub" else _float32(what, array)


def _as_many(what: str, values: object, examples: int) -> Array:
    array = as_array(what, values)
    if array.ndim < 1 or len(array) != examples:
        raise DataError(f"{what} has shape {array.shape}, not [{examples}, ...] as {_inputs_of(what)} asks")
    if array.dtype.kind not in "fiub" or array.size == 0:
        raise DataError(f"{what} holds {array.dtype} of shape {array.shape}, not real numbers")
    return array


def _float32(what: str, array: Array) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what overflows is found, and named, below
        array = array.astype(np.float32)
    if bad := int((~np.isfinite(array)).sum()):
        raise DataError(f"{what} holds {bad} values that are NaN, infinite or beyond float32")
    return array


def _inputs_of(what: str) -> str:
    """Returns the name of the inputs that targets go with: `x_train` for `data own.py:f: y_train`."""
    return f"x_{what.rpartition('y_')[2]}"


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
