"""Reads a model's inputs, batch by batch, from everything that Keras trains on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import DataError
from batchnorm.keras.protocols import Tensor

# What a model takes; None = an optional input that is left out.
Inputs: TypeAlias = "Tensor | NDArray[Any] | dict[str, Inputs] | list[Inputs] | tuple[Inputs, ...] | None"
# What `fit` takes as x, as (x, y) or as (x, y, sample_weight), or an iterable of such batches.
Data: TypeAlias = "Inputs | Iterable[Inputs]"
_BATCH = "a batch is x, (x, y) or (x, y, sample_weight)"
_AS_ITERATOR = "a list holds one array per input; hand over batches as an iterator, iter(batches)"


def batches(
    model: keras.Model, data: Data, batch_size: int, steps: int | None
) -> tuple[Iterator[Inputs], int | None]:
    """Return an iterator over the inputs of each batch, and the number of batches where it is known.

    Args:
        model: takes the inputs.
        data: as `calibrate` takes it.
        batch_size: samples per batch, where the data is arrays.
        steps: the largest number of batches; None = all.

    Raises:
        DataError: data of another form, arrays of unequal length, as many as the model does not take, or data
            without an end and no `steps`.
    """
    total: float | None
    if _is_arrays(data):
        if isinstance(data, list):
            _check_number(model, data)
        found, total = _slices(_x(data) if isinstance(data, tuple) else data, batch_size)
    else:
        given, total = _given(data)
        found = (_x(batch) for batch in given)
    if total == math.inf and steps is None:
        raise DataError(f"{type(data).__name__} has no end: pass steps, the number of batches to take")
    if steps is not None:
        total = steps if total is None else min(total, steps)
    return (_tensors(x) for x in itertools.islice(found, steps)), None if total is None else int(total)


def labelled(
    model: keras.Model, data: Data, batch_size: int, most: int
) -> Iterator[tuple[Inputs, NDArray[Any] | None]]:
    """Yield the inputs and the labels of each batch, None without, of `most` samples together at most.

    Args:
        model: takes the inputs.
        data: as `calibrate` takes it.
        batch_size: samples per batch, where the data is arrays.
        most: samples; only the first batch may be cut.

    Raises:
        DataError: as of `batches`.
    """
    if _is_arrays(data):
        if isinstance(data, list):
            _check_number(model, data)
        found, _ = _slices(data, min(batch_size, most))
    else:
        found, _ = _given(data)
    count = 0
    for batch in found:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        x = _tensors(_x(batch) if isinstance(batch, tuple) else x)
        count += samples(x)
        if count > most:
            return
        is_array = y is not None and len(keras.tree.flatten(y)) == 1
        yield x, np.asarray(keras.ops.convert_to_numpy(y)) if is_array else None


def samples(x: Inputs) -> int:
    """Return the number of samples in a batch of inputs."""
    return int(next(leaf.shape[0] for leaf in keras.tree.flatten(x) if leaf is not None))


def _is_array(value: object) -> bool:
    return hasattr(value, "__getitem__") and len(getattr(value, "shape", ())) > 0


def _is_arrays(data: Data) -> bool:
    """Whether data is arrays to be cut into batches; a list of (x, y) is one of batches."""
    if isinstance(data, list):
        return bool(data) and all(_is_array(part) for part in data)
    if isinstance(data, (tuple, dict)):
        return all(leaf is None or _is_array(leaf) for leaf in keras.tree.flatten(data))
    return _is_array(data)


def _check_number(model: keras.Model, arrays: list[Inputs]) -> None:
    """Refuse a list of batches: a sequential model would take its first array, and drop the rest."""
    inputs = getattr(model, "inputs", None)  # a model that is subclassed, or not built, does not say
    if inputs is not None and len(inputs) != len(arrays):
        raise DataError(
            f"got a list of {len(arrays)} arrays for a model of {len(inputs)} inputs: {_AS_ITERATOR}"
        )


def _slices(x: Inputs, batch_size: int) -> tuple[Iterator[Inputs], float]:
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    lengths = {int(leaf.shape[0]) for leaf in leaves}
    if len(lengths) != 1:
        differing = ", ".join(map(str, sorted(lengths)))
        raise DataError(f"the arrays of data differ in length: {differing}; {_AS_ITERATOR}")
    (length,) = lengths

    def cut(start: int) -> Inputs:
        stop = min(start + batch_size, length)
        return keras.tree.map_structure(lambda leaf: None if leaf is None else leaf[start:stop], x)

    return (cut(start) for start in range(0, length, batch_size)), math.ceil(length / batch_size)


def _given(data: object) -> tuple[Iterator[Inputs], float | None]:
    """Return the batches of data that is batched already, and their number; infinity where it has no end."""
    if isinstance(data, keras.utils.PyDataset):
        number = data.num_batches
        return iter(data), math.inf if number is None else number
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, dict)):
        raise DataError(f"data is arrays, or an iterable of batches; got a {type(data).__name__}")
    if hasattr(data, "cardinality") and int(data.cardinality()) == -1:  # tf.data.INFINITE_CARDINALITY
        return iter(data), math.inf
    try:
        return iter(data), len(data)  # type: ignore[arg-type]
    except TypeError:  # raised by tf.data and torch where they do not know it, and by Python for an iterator
        return iter(data), None


def _x(batch: Inputs) -> Inputs:
    try:
        return keras.utils.unpack_x_y_sample_weight(batch)[0]
    except ValueError:
        raise DataError(f"{_BATCH}; got a {type(batch).__name__} of {len(batch)}") from None  # type: ignore[arg-type]


def _tensors(x: Inputs) -> Inputs:
    """Return the inputs as the backend takes them: tensors of other frameworks as arrays."""
    if not any(leaf is not None for leaf in keras.tree.flatten(x)):
        raise DataError(f"{_BATCH}; got a {type(x).__name__} without x")
    return keras.tree.map_structure(_tensor, x)


def _tensor(leaf: Inputs) -> Inputs:
    # Under `keras.distribution` a tensor is bound to one device, and the weights to several: NumPy is free.
    if leaf is None or (keras.ops.is_tensor(leaf) and keras.distribution.distribution() is None):
        return leaf
    array = np.asarray(leaf)
    if array.ndim == 0 or (array.dtype == object and not isinstance(leaf, np.ndarray)):
        raise DataError(f"a batch holds arrays or tensors whose first axis is the samples; got {leaf!r:.80}")
    return array
