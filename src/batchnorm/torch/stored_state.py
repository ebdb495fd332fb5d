"""Defines what a layer and its lazy form store beyond torch's: the options, and the buffers.

Running statistics are float32 at least, and the counter of skipped batches starts at 0.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from batchnorm.errors import BatchNormError, OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.policy_config import check_policy

from .call import HALVES
from .checks import check_nonfinite, check_small_batch, check_warm_start
from .contexts.accumulation import Accumulator
from .contexts.checkpointing import Scope
from .contexts.domains import running_names, select
from .symbolic import OneNode

# Attributes of a context, of forwards that may be recomputed, or of prepared calls: no copy or file has them.
PASSING = ("_memory", "_plain", "_accumulator", "_scope", "_domain")


class StoredState(OneNode, nn.modules.batchnorm._BatchNorm):
    """Base of our layers and of their lazy forms."""

    activation: str | None = None
    domains: int = 1
    domain_affine: bool = False
    _statistics: Policy = Batch()
    _nonfinite: str = "propagate"
    _small_batch: str = "raise"
    _warm_start: bool = False
    _label: str | None = None
    _thawed: Policy  # what `unfreeze` gives back
    _accumulator: Accumulator | None = None
    _scope: Scope | None = None
    _domain: int | None = None  # which is in use; None = domain 0, outside of any context

    @property
    def statistics(self) -> Policy:
        """The policy that chooses the statistics; it can be set."""
        return self._statistics

    @statistics.setter
    def statistics(self, policy: Policy) -> None:
        with self._named():
            check_policy(policy, self._is_tracked())
            if self._accumulator is not None and policy.is_sequential:
                raise OptionError(
                    f"statistics={policy} move for each ghost batch, and the layer is within "
                    "batchnorm.accumulate, which moves them once: set it outside of the block"
                )
        self._statistics = policy
        vars(self).pop("_label", None)
        vars(self).pop("_thawed", None)  # what `unfreeze` would give back

    @property
    def nonfinite(self) -> str:
        """The effect of a batch with inf or NaN on the running statistics: "propagate", "skip" or "raise"."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        with self._named():
            check_nonfinite(value, self._is_tracked())
        if value != self._nonfinite:
            self._nonfinite = value
        if value == "skip" and self.skipped is None:
            place = next(iter(self.parameters()), self.running_mean)
            device = None if place is None else place.device
            # Not by `register_buffer`, for which the property is in the way; not part of the state.
            self._buffers["skipped"] = counter(device)
            self._non_persistent_buffers_set = self._non_persistent_buffers_set | {"skipped"}

    @property
    def small_batch(self) -> str:
        """The treatment of one value per channel in training: "raise", or "running" (by these statistics)."""
        return self._small_batch

    @small_batch.setter
    def small_batch(self, value: str) -> None:
        with self._named():
            check_small_batch(value, self._is_tracked())
        if value != self._small_batch:
            self._small_batch = value

    @property
    def warm_start(self) -> bool:
        """Whether the first update of the running statistics takes the batch's own, unmixed with 0 and 1."""
        return self._warm_start

    @warm_start.setter
    def warm_start(self, value: bool) -> None:
        with self._named():
            check_warm_start(value, self._is_tracked())
        if value != self._warm_start:
            self._warm_start = value

    @property
    def skipped(self) -> Tensor | None:
        """Number of batches with inf or NaN that were skipped, an integer tensor; None where none are."""
        return self._buffers.get("skipped")

    def _is_tracked(self) -> bool:
        """Whether there are a running mean and variance."""
        return self.running_mean is not None and self.running_var is not None

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the layer in errors of the block."""
        try:
            yield
        except BatchNormError as error:
            raise error.at(qualified_name(self)) from None

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

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or file; the contexts that the layer is in are not part of it."""
        state = {name: value for name, value in vars(self).items() if name not in PASSING}
        if self._domain:
            state["_buffers"] = dict(self._buffers)
            select(state["_buffers"], self._domain, 0)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """As `copy.deepcopy`; what torch gives a parametrized layer would copy its contexts too."""
        is_plain = not nn.utils.parametrize.is_parametrized(self)
        state = self.__getstate__() if is_plain else StoredState.__getstate__(self)
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return twin


def counter(device: torch.device | None) -> Tensor:
    """Return a counter at 0 that can be incremented in any mode, inference mode or not."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.long, device=device)


@_disable_dynamo  # Dynamo cannot trace frames, and would warn; this decorator does not import it
def qualified_name(layer: nn.Module) -> str:
    """Return `features.3 (BatchNorm2d)` within the outermost module on the call stack, else `BatchNorm2d`.

    A module does not know its parents. But the modules that called it are on the stack while an error is
    being raised, and the outermost of these that contains the layer is the model.
    """
    kind = type(layer).__name__
    name = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and caller is not layer:
            name = next((path for path, module in caller.named_modules() if module is layer), name)
        frame = frame.f_back
    return f"{name} ({kind})" if name else kind
