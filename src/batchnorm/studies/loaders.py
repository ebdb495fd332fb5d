"""Reads data sets and loaders of PyTorch, Keras and TensorFlow into arrays; it imports none of them.

A study holds its data in memory: every run sees the same examples in the same order, whatever a loader would
shuffle, and worker processes need no copy of the loader.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import DataError

from .arrays import as_array
from .padding import Array

_TARGETS = ("labels", "label", "targets", "target", "y")
_LENGTHS = ("lengths", "length")
_MASKS = ("attention_mask", "mask")


@dataclass(frozen=True)
class Names:
    """The arguments by which a network takes examples that came as dicts.

    Attributes:
        inputs: of the input.
        padding: of the mask or the lengths; None where there are none.
        takes_mask: whether `padding` is a mask, int64 `[N, L]` with 1 where a position is valid.
    """

    inputs: str
    padding: str | None = None
    takes_mask: bool = False


@dataclass(frozen=True)
class Loaded:
    """The examples of a data set, not yet checked.

    Attributes:
        x: `[N, ...]`, or `[N, L, ...]` with padding behind each sequence; an array, or what becomes one.
        y: the targets, `[N, ...]`, of any such kind.
        lengths: int64 `[N]` of sequences; None without padding.
        names: of the arguments, for examples that came as dicts.
    """

    x: object
    y: object
    lengths: npt.NDArray[np.int64] | None = None
    names: Names | None = None


@dataclass(frozen=True)
class _Batch:
    x: Array
    y: Array
    lengths: Array | None
    names: Names | None


def is_loader(value: object) -> bool:
    """Returns whether a value yields examples or batches, and is no array, tensor, list or dict of them."""
    if isinstance(value, Mapping | Sequence | np.ndarray) or hasattr(value, "__array__"):
        return False
    return hasattr(value, "__iter__") or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))


def read(what: str, loader: Any) -> Loaded:
    """Reads every example of a data set or loader.

    Args:
        what: the name of the data, for errors.
        loader: a torch `Dataset` or `DataLoader`, a `keras.utils.PyDataset`, a `tf.data.Dataset`, or any
            iterable. It yields examples or batches of `(x, y)`, of `((x, lengths), y)`, of `((x, mask), y)`,
            or dicts. A dict has its targets under one of `labels`, `label`, `targets`, `target` and `y`,
            lengths under `lengths` or `length`, a mask under `attention_mask` or `mask`, and one input under
            any other name. A mask is 1 (or True) at valid positions. Sequences of several lengths that are
            yielded one by one need neither.

    Raises:
        DataError: it yields nothing, something else, masks with gaps, or shapes that do not go together.
    """
    with _random_state_of_its_own():
        batches = [_batch(what, item, _yields_batches(loader)) for item in _items(loader)]
    if not batches:
        raise DataError(f"{what} yields no examples")
    if len({batch.names for batch in batches}) > 1:
        raise DataError(f"{what} yields dicts of several keys: every batch needs the same")
    kinds = {(batch.x.dtype.kind in "fiub", batch.x.ndim) for batch in batches}
    if len(kinds) > 1:
        raise DataError(
            f"{what} yields inputs of several kinds: every batch needs the same number of dimensions"
        )
    x, lengths = _joined(what, batches)
    targets = {batch.y.shape[1:] for batch in batches}
    if len(targets) > 1:
        raise DataError(
            f"{what} yields targets of several shapes: {', '.join(map(str, sorted(targets)[:3]))}"
        )
    return Loaded(x, np.concatenate([batch.y for batch in batches]), lengths, batches[0].names)


@contextlib.contextmanager
def _random_state_of_its_own() -> Iterator[None]:
    """Draws the same numbers each time, so that shuffled data is the same data, and gives the state back.

    TensorFlow is left out, as its state cannot be put back: a `tf.data.Dataset` is shuffled with a seed.
    """
    ours, numpys = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    random.seed(0)
    np.random.seed(0)
    try:
        with torch.random.fork_rng(devices=[]) if torch else contextlib.nullcontext():
            if torch:
                torch.manual_seed(0)
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def _items(loader: Any) -> Iterator[object]:
    """Yields what a loader yields; one that is read by index is read once, from 0 to its length."""
    by_index = hasattr(loader, "__getitem__") and hasattr(loader, "__len__")
    if not by_index or _is_of(loader, "torch.utils.data", "IterableDataset"):
        yield from loader
        return
    for number in range(len(loader)):
        yield loader[number]


def _yields_batches(loader: Any) -> bool | None:
    """Returns whether a loader yields batches; None where only the targets tell."""
    if _is_of(loader, "torch.utils.data", "DataLoader"):
        return True if loader.batch_sampler is not None else None
    if _is_of(loader, "torch.utils.data", "Dataset"):
        return False
    if _is_of(loader, "keras.utils", "PyDataset"):
        return True
    return None


def _is_of(value: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _batch(what: str, item: object, is_batch: bool | None) -> _Batch:
    inputs, y, names = _parts(what, item)
    padding: object = None
    if isinstance(inputs, tuple | list) and len(inputs) == 2:
        inputs, padding = inputs
    x, y = as_array(f"{what}: inputs", inputs), as_array(f"{what}: targets", y)
    if is_batch if is_batch is not None else y.ndim > 0:
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise DataError(f"{what} yields a batch of inputs {x.shape} with targets {y.shape}")
    else:
        x, y = x[None], y[None]
        padding = None if padding is None else as_array(f"{what}: lengths or mask", padding)[None]
    lengths = None if padding is None else _lengths(what, padding, x)
    if names is not None and lengths is None and names.padding is not None:
        names = Names(names.inputs)
    return _Batch(x, y, lengths, names)


def _parts(what: str, item: object) -> tuple[object, object, Names | None]:
    """Returns inputs (or a pair of inputs and padding), targets, and the names that a dict gives them."""
    if isinstance(item, Mapping):
        target = _only(what, item, _TARGETS)
        if target is None:
            raise DataError(f"{what} yields dicts without targets: name them labels")
        return _named(what, {key: value for key, value in item.items() if key != target}, item[target])
    if isinstance(item, tuple | list) and len(item) == 2:
        inputs, y = item
        return _named(what, inputs, y) if isinstance(inputs, Mapping) else (inputs, y, None)
    count = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    raise DataError(
        f"{what} yields a {type(item).__name__}{count}: yield (x, y), ((x, lengths), y), ((x, mask), y) or "
        "a dict"
    )


def _named(what: str, inputs: Mapping[Any, object], y: object) -> tuple[object, object, Names]:
    mask, lengths = _only(what, inputs, _MASKS), _only(what, inputs, _LENGTHS)
    padding = mask if mask is not None else lengths
    others = [str(key) for key in inputs if key not in (mask, lengths)]
    if len(others) != 1:
        found = f"inputs {', '.join(others)}" if others else "no input"
        raise DataError(f"{what} yields dicts with {found}: a study takes one; leave the others out")
    names = Names(others[0], padding, padding is not None and padding == mask)
    values = inputs[others[0]]
    return values if padding is None else (values, inputs[padding]), y, names


def _only(what: str, item: Mapping[Any, object], keys: Iterable[str]) -> str | None:
    found = [key for key in keys if key in item]
    if len(found) > 1:
        raise DataError(f"{what} yields dicts with {' and '.join(found)}, which mean the same: keep one")
    return found[0] if found else None


def _lengths(what: str, padding: object, x: Array) -> Array:
    """Returns the lengths `[N]` of a batch, of its lengths or of a mask `[N, L]`."""
    array = as_array(f"{what}: lengths or mask", padding)
    if array.shape == x.shape[:1]:
        if array.dtype.kind not in "iu":
            raise DataError(f"{what} yields lengths of {array.dtype}: whole numbers are wanted")
        return array.astype(np.int64)
    if x.ndim < 2 or array.shape != x.shape[:2]:
        raise DataError(
            f"{what} yields {array.shape} beside inputs {x.shape}: no lengths [N], no mask [N, L]"
        )
    lengths: Array = (array != 0).sum(axis=1, dtype=np.int64)
    if ((array != 0) != (np.arange(x.shape[1]) < lengths[:, None])).any():
        raise DataError(
            f"{what} yields a mask with gaps, or with padding in front: a study takes padding behind a "
            "sequence"
        )
    return lengths


def _joined(what: str, batches: Sequence[_Batch]) -> tuple[Array, npt.NDArray[np.int64] | None]:
    """Returns all inputs in one array, padded with zeros behind where batches are of several lengths."""
    shapes = {batch.x.shape[1:] for batch in batches}
    with_lengths = [batch.lengths for batch in batches if batch.lengths is not None]
    lengths = np.concatenate(with_lengths) if len(with_lengths) == len(batches) else None
    if len(shapes) == 1:
        return np.concatenate([batch.x for batch in batches]), lengths
    shown = " and ".join(str(shape) for shape in sorted(shapes)[:2])
    if len({shape[1:] for shape in shapes}) > 1:
        raise DataError(f"{what} yields examples of shapes {shown}: only the first dimension may vary")
    if lengths is None:
        if any(len(batch.x) > 1 for batch in batches):
            raise DataError(
                f"{what} yields examples of shapes {shown}: yield ((x, lengths), y), so that padding is known"
            )
        lengths = np.array([batch.x.shape[1] for batch in batches], np.int64)
    longest = max(shape[0] for shape in shapes)
    return np.concatenate([lengthened(batch.x, longest) for batch in batches]), lengths


def lengthened(x: Array, length: int) -> Array:
    """Returns `[N, L, ...]` with zeros behind, up to a length."""
    return np.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
