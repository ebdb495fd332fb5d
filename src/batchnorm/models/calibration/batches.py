"""What a batch may be: how many samples it holds, how it goes through the model, how it is cut."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.errors import DataError

Forward = Callable[[nn.Module, Any], Any]


def run(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Run the model on one batch.

    Raises:
        DataError: a batch of unknown form, and no `forward` that would know what to do with it.
    """
    if forward is not None:
        forward(model, batch)
        return
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2 and isinstance(batch[0], Tensor):
        batch = batch[0]
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    if isinstance(batch, Tensor):
        model(batch.to(device))
    elif isinstance(batch, Mapping):
        model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    else:
        raise DataError(
            "calibrate takes tensors, (x, y) pairs and dicts of keyword arguments; "
            f"got a {type(batch).__name__}: pass forward=lambda model, batch: model(...)"
        )


def samples_in(batch: Any) -> int:
    """Return the length of the first tensor in a batch of any nesting; 0 where there is none."""
    first = first_tensor(batch)
    return 0 if first is None else len(first) if first.dim() else 1


def first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor in a batch of any nesting that is not empty."""
    if isinstance(batch, Tensor):
        return batch if not batch.dim() or len(batch) else None
    found = (part for part in map(first_tensor, _parts(batch)) if part is not None)
    return next(found, None)


def limited(data: Iterable[Any], samples: int | None) -> Iterator[Any]:
    """Yield batches until they hold `samples` samples, the last of them cut; all where that is None."""
    if samples is None:
        yield from data
        return
    left = samples
    for batch in data:
        size = samples_in(batch)
        if size == 0 and first_tensor(batch) is None and not _is_empty(batch):
            raise DataError(
                f"samples={samples} counts samples of batches made of tensors; got a {type(batch).__name__}: "
                "pass data of that many samples instead"
            )
        yield batch if size <= left else _cut(batch, size, left)
        left -= min(size, left)
        if left == 0:
            return


@dataclass(frozen=True)
class Seen:
    """Which batches went by, to tell whether data is what it was.

    Attributes:
        samples: in all of them.
        batches: how many.
        checksum: of their tensors and plain values, in this order.
    """

    samples: int = 0
    batches: int = 0
    checksum: int = 0

    def with_batch(self, batch: Any) -> Seen:
        """Return this after one more batch."""
        return Seen(self.samples + samples_in(batch), self.batches + 1, _checksum(batch, self.checksum))


def _checksum(part: Any, before: int) -> int:
    """Return the checksum of all that came `before`, and then of a part of a batch."""
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


def as_bytes(tensor: Tensor) -> Any:
    """Return the values of a dense tensor as a buffer of bytes."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _parts(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    return batch if isinstance(batch, (tuple, list)) else ()


def _is_empty(batch: Any) -> bool:
    """Whether a batch has tensors, all of them empty."""
    if isinstance(batch, Tensor):
        return batch.numel() == 0
    parts = list(_parts(batch))
    return bool(parts) and any(_is_empty(part) for part in parts)


def _cut(batch: Any, size: int, count: int) -> Any:
    """Return the first `count` samples of a batch of `size`: of every tensor with that many rows."""
    if isinstance(batch, Tensor):
        return batch[:count] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, size, count) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_cut(part, size, count) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
