"""Lazy layers, which become ours when the first input determines the number of channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, _Layer
from .stored_state import StoredState


class _Lazy(StoredState):
    """Base of the three lazy layers: it stores the options of the layer that they become."""

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Create the tensors, and set the number of channels.

        torch creates them by the shape of the input, and leaves the number of channels 0 where a loaded state
        has created them before.
        """
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        super().initialize_parameters(input)  # type: ignore[misc]
        tensors = (*self._parameters.values(), self.running_mean)
        self.num_features = next((t.numel() for t in tensors if t is not None), input.shape[1])

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the forward of the new class: torch looks this method up before its hook changes the class."""
        if isinstance(self, _Layer):
            return self.forward(input, *args, **kwargs)
        y: Tensor = super().forward(input)  # without the hook this raises, as the stock lazy layer does
        return y


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d):
    cls_to_become: Any = BatchNorm1d


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d):
    cls_to_become: Any = BatchNorm2d


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d):
    cls_to_become: Any = BatchNorm3d
