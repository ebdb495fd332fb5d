"""Keeps the running statistics of our layers in float32, and starts the counter of skipped batches at 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .call import HALVES
from .contexts.domains import running_names


class OwnBuffers(nn.modules.batchnorm._BatchNorm):
    """Base of our layers and of their lazy forms, which have the same buffers."""

    domains: int = 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `torch.nn.Module._apply`, but running statistics stay float32 where they would become 16-bit."""
        before = {name: self._buffers[name] for name in running_names(self.domains)}
        skipped = self._buffers.get("skipped")
        is_empty = skipped is not None and skipped.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in HALVES and old.dtype not in HALVES:
                self._buffers[name] = old.to(device=new.device, dtype=torch.float32)
        if is_empty and (skipped := self._buffers["skipped"]) is not None and not skipped.is_meta:
            skipped.zero_()  # `to_empty` leaves a meta tensor uninitialized, and no batch was counted yet
        return self

    def _widen_statistics(self) -> None:
        """Convert 16-bit running statistics to float32."""
        for name in running_names(self.domains):
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype in HALVES:
                self._buffers[name] = buffer.float()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As `torch.nn.Module._load_from_state_dict`; running statistics that it assigns become float32.

        The counter of skipped batches, which no state contains, starts at 0.
        """
        tensors = (*self._parameters.values(), self.running_mean)
        is_loaded = any(name.startswith(prefix) for name in state_dict) or tensors.count(None) == len(tensors)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._widen_statistics()
        if is_loaded:
            self._start_counting()

    def _start_counting(self) -> None:
        """Set the counter of skipped batches to 0, on the device of the layer's other tensors."""
        skipped = self._buffers.get("skipped")
        if skipped is None:
            return
        place = next((t for t in (*self._parameters.values(), self.running_mean) if t is not None), skipped)
        if not skipped.is_meta or place.is_meta:
            with torch.no_grad():
                skipped.zero_()
            return
        self._buffers["skipped"] = counter(place.device)


def counter(device: torch.device | None) -> Tensor:
    """Return a counter at 0 that can be incremented in any mode, inference mode or not."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.long, device=device)
