"""Normalizes a batch whose samples are of several domains: those of each domain together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from batchnorm.errors import InputShapeError
from batchnorm.statistics.synced import Synced

from .domains import STATISTICS, ContextLayer, domain_of, selected


class Samples:
    """The domain of each sample of a batch. The host reads them once.

    Args:
        ids: `[N]` integers.
    """

    def __init__(self, ids: Tensor) -> None:
        here = ids.detach().to("cpu", torch.long)
        self.count = len(here)
        self.places = {k: (here == k).nonzero().flatten() for k in sorted(set(here.tolist()))}
        self._order = torch.cat([here[:0], *self.places.values()]).argsort()
        self._moved: dict[torch.device, tuple[dict[int, Tensor], Tensor]] = {}

    def call(
        self, layer: ContextLayer, input: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Normalize the samples of each domain by a call of their own; if one raises, nothing has moved.

        Under `Synced` in training a domain without a sample here has a call too: other ranks may have some.

        Raises:
            InputShapeError: the input has another number of samples.
        """
        if input.shape[0] != self.count:
            raise InputShapeError(
                f"batchnorm.domain: the ids are of {self.count} samples, and this layer's input has "
                f"{input.shape[0]}: what folds other axes into the samples needs ids of its own"
            )
        places, order = self._on(input.device)
        is_shared = layer.training and isinstance(layer.statistics, Synced)
        domains = list(range(layer.domains)) if is_shared else list(places) or [domain_of(layer)]
        if len(domains) == 1:
            with selected(layer, domains[0]):
                return layer._normalize(input, residual, mask)
        found = []
        with _all_or_none(layer, domains):
            for k in domains:
                here = places.get(k, order[:0])
                parts = (None if t is None else t.index_select(0, here) for t in (input, residual, mask))
                with selected(layer, k):
                    found.append(layer._normalize(*parts))  # type: ignore[arg-type]  # input is no None
        return torch.cat(found).index_select(0, order)

    def _on(self, device: torch.device) -> tuple[dict[int, Tensor], Tensor]:
        """Return the places of each domain's samples, and where each sample is behind these, on a device."""
        if device not in self._moved:
            places = {k: indices.to(device) for k, indices in self.places.items()}
            self._moved[device] = (places, self._order.to(device))
        return self._moved[device]


@contextlib.contextmanager
def _all_or_none(layer: ContextLayer, domains: list[int]) -> Iterator[None]:
    """Give a layer the running statistics of these domains back if the block raises."""
    if torch.compiler.is_compiling() or not layer.training:
        yield
        return
    before: list[tuple[Tensor, Tensor]] = []
    for k in domains:
        with selected(layer, k):
            buffers = [layer._buffers[name] for name in STATISTICS]
        before += [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
        raise
