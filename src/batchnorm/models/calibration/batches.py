"""Reads batches of any form: runs a model on them, counts and cuts their samples, tells them apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.errors import DataError

# Of a user: takes the model and a batch as the data gives it.
Forward = Callable[[nn.Module, Any], object]


def run(model: nn.Module, batch: object, forward: Forward | None) -> object:
    """Run the model on one batch, and return its output.

    Raises:
        DataError: a batch of unknown form, without a `forward` that takes it.
    """
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2 and isinstance(batch[0], Tensor):
        batch = batch[0]
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    raise DataError(
        "calibrate takes tensors, (x, y) pairs and dicts of keyword arguments; "
        f"got a {type(batch).__name__}: pass forward=lambda model, batch: model(...)"
    )


def samples_in(batch: object) -> int:
    """Return the length of the first tensor that is not empty, in a batch of any nesting; 0 without any."""
    lengths = (len(tensor) if tensor.dim() else 1 for tensor in _tensors(batch))
    return next(filter(None, lengths), 0)


def limited(data: Iterable[object], samples: int | None) -> Iterator[object]:
    """Yield batches until they hold `samples` samples, the last of them cut; None = all batches.

    Raises:
        DataError: samples cannot be counted, as a batch has no tensors.
    """
    if samples is None:
        yield from data
        return
    left = samples
    for batch in data:
        size = samples_in(batch)
        if size == 0 and not any(True for _ in _tensors(batch)):
            raise DataError(
                f"samples={samples} counts samples of batches made of tensors; got a {type(batch).__name__}: "
                "pass data of that many samples instead"
            )
        yield batch if size <= left else cut(batch, size, left)
        left -= min(size, left)
        if left == 0:
            return


@dataclass(frozen=True)
class Seen:
    """Identifies the batches seen so far, to tell whether data has changed.

    Attributes:
        samples: number of samples in all of them.
        batches: number of batches.
        checksum: of their tensors and plain values, in order.
    """

    samples: int = 0
    batches: int = 0
    checksum: int = 0

    def with_batch(self, batch: object) -> Seen:
        """Return the same after one more batch."""
        return Seen(self.samples + samples_in(batch), self.batches + 1, _checksum(batch, self.checksum))


def _checksum(part: object, before: int) -> int:
    """Return the checksum of a part of a batch, continued from the checksum `before`."""
    if isinstance(part, Tensor):
        form = f"{part.dtype} {tuple(part.shape)}" if part.layout is torch.strided else str(part.layout)
        values = as_bytes(part) if part.layout is torch.strided and not part.is_quantized else b""
        return zlib.crc32(values, zlib.crc32(form.encode(), before))
    if isinstance(part, np.ndarray) and not part.dtype.hasobject:
        form = f"{part.dtype} {part.shape}"
        return zlib.crc32(np.ascontiguousarray(part).tobytes(), zlib.crc32(form.encode(), before))
    if isinstance(part, (str, bytes, int, float)):
        return zlib.crc32(repr(part).encode(), before)
    for inner in _parts(part):
        before = _checksum(inner, before)
    return before


def as_bytes(tensor: Tensor) -> memoryview | bytes:
    """Return the values of a dense tensor as a buffer of bytes."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _parts(batch: object) -> Iterable[object]:
    if isinstance(batch, Mapping):
        return batch.values()
    return batch if isinstance(batch, (tuple, list)) else ()


def _tensors(batch: object) -> Iterator[Tensor]:
    """Yield the tensors in a batch of any nesting."""
    if isinstance(batch, Tensor):
        yield batch
    for part in _parts(batch):
        yield from _tensors(part)


def cut(batch: object, size: int, count: int) -> object:
    """Return the first `count` samples of a batch of `size`: of every tensor with that many rows."""
    if isinstance(batch, Tensor):
        return batch[:count] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: cut(value, size, count) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [cut(part, size, count) for part in batch]
        kind: type[Any] = type(batch)
        return kind(*parts) if hasattr(batch, "_fields") else kind(parts)
    return batch
