"""Finds the statistics of each norm given those of the norms before it: one pass per level of depth."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.statistics.calibration import Accumulator
from batchnorm.statistics.moments import PooledMoments

from .dependence import Dependence
from .observers import BatchObserver, by_batch, by_statistics, received, values_per_channel
from .passes import Passes


class _Enough(BaseException):
    """Ends a forward whose rest is not needed; no `except Exception` of a model catches it."""


class LevelObserver(BatchObserver):
    """Observes the norms whose input is final, while settled norms normalize by their new statistics.

    Args:
        passes: over the data, with what the settled norms received in all of it.
        ends_early: end a forward once all norms that this pass can settle were called as often as in the
            first forward.
    """

    def __init__(self, passes: Passes, ends_early: bool) -> None:
        super().__init__(passes.norms)
        self.model, self.settled, self.ends_early = passes.model, passes.settled, ends_early
        self.pending = self.norms.keys() - self.settled.keys()
        self.dependence = Dependence()
        self.postponed: set[str] = set()  # dependent in any batch so far: left to a later pass
        self.calls: Counter[str] = Counter()
        self.usual: Counter[str] | None = None  # calls in the first forward, which is whole

    @contextlib.contextmanager
    def one_batch(self) -> Iterator[None]:
        """Observe one forward within the block."""
        with super().one_batch():
            self.calls = Counter()
            self.dependence.clear()
            try:
                with self.dependence.following():
                    yield
            except _Enough as enough:
                # Its frames hold this forward's tensors, and one of them holds the exception: a circle that
                # would keep the tensors until the garbage collector finds it.
                enough.__traceback__ = None
        self.usual = self.usual or self.calls

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the norms within the block; after it, they are as before."""
        names: dict[nn.Module, str] = {norm: name for name, norm in self.norms.items()}
        with contextlib.ExitStack() as stack:
            for name, norm in self.norms.items():
                on_input = self._on_input(name)
                stack.callback(norm.register_forward_pre_hook(on_input, with_kwargs=True).remove)
                if name in self.pending:
                    stack.enter_context(by_batch(name, norm, self._receive, strict=False))
                else:
                    stack.enter_context(by_statistics(name, norm, self.settled[name]))
            for module in self.model.modules():
                if module in names or not module._modules:
                    on_output = self._on_output(names.get(module))
                    stack.callback(module.register_forward_hook(on_output, with_kwargs=True).remove)
            yield

    def _receive(self, name: str, found: PooledMoments) -> None:
        self._batch.add(name, found)  # void where the norm is dependent

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: Any, kwargs: Any) -> None:
            input, mask = received(norm, args, kwargs)
            self._batch.arrivals[name] += values_per_channel(input, mask)
            if name in self.pending and self.dependence.is_marked(input):
                self._batch.dependent.add(name)
                self.postponed.add(name)
            self.dependence.is_paused = name in self.pending  # the whole output will be marked

        return hook

    def _on_output(self, name: str | None) -> Callable[..., None]:
        """Return a hook that marks the output of unsettled norms, and of modules with a marked input.

        The latter is for modules with kernels of their own, which show no operators of torch.
        """

        def hook(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if name in self.pending:
                self.dependence.is_paused = False
                self.dependence.mark(result)
                self.calls[name] += 1
                if self._has_enough():
                    raise _Enough
            elif self.dependence.is_marked((args, kwargs)):
                self.dependence.mark(result)

        return hook

    def _has_enough(self) -> bool:
        """Whether the rest of this forward matters to later passes only; the last pass runs it."""
        if not self.ends_early or self.usual is None or not self.postponed:
            return False
        return all(self.calls[name] >= self.usual[name] for name in self.pending - self.postponed)


def layerwise(passes: Passes) -> Accumulator:
    """Settle the norms level by level.

    Every pass settles all norms whose input depended on no unsettled norm, in any batch on any rank. The last
    pass runs every forward to its end, and shows whether all earlier ones observed all calls.

    Raises:
        OptionError: norms that depend on one another, or on themselves.
    """
    for ends_early in (True, False):
        while True:
            found = passes.run(LevelObserver(passes, ends_early))
            final = found.moments.keys() - found.dependent
            ready = {name: found.moments[name] for name in passes.norms if name in final}
            passes.settled = passes.settled | ready
            if not found.dependent:
                break
            if not ready:
                raise OptionError(_in_circles(found.dependent))
        missed = [n for n, moments in passes.settled.items() if moments.count != found.arrivals[n]]
        if not missed:
            return Accumulator(found.samples, found.batches, passes.settled)
        passes.settled = {}
    raise OptionError(
        f"method='layerwise': {', '.join(missed)} received another number of values from pass to pass: does "
        "data give the same samples each time, and the model the same calls?"
    )


def _in_circles(dependent: Iterable[str]) -> str:
    return (
        f"method='layerwise' finds no order for {', '.join(sorted(dependent))}: the input of each depends on "
        "the output of another, or of itself (a norm that is called twice in a row, or norms that change "
        "places from batch to batch); method='batch' takes them"
    )
