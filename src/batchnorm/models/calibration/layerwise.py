"""Statistics of each layer given those of the layers before it: one pass per level of depth."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import OptionError
from batchnorm.statistics.moments import PooledMoments

from .dependence import Dependence
from .observers import Listener, by_batch, received, values_per_channel
from .outcome import in_place_of
from .passes import Passes, Result


class _Enough(BaseException):
    """Ends a forward from which nothing more is wanted; no `except Exception` of a model catches it."""


class LevelListener(Listener):
    """Settled norms normalize by their new statistics; of the others, those whose input is final are heard.

    Args:
        model: that the norms are of.
        norms: all that track, by name.
        settled: what the settled ones heard of all the data.
        ends_early: end a forward once all that this pass can settle was heard as often as in the first one.

    Attributes:
        heard: moments of the values that each layer received in this batch; those of dependent ones are void.
        values: number of those that arrived at any norm, settled or not.
        dependent: norms that are not settled and whose input depends on such a norm, in this batch.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Mapping[str, _BatchNorm],
        settled: Mapping[str, PooledMoments],
        ends_early: bool,
    ) -> None:
        super().__init__(norms)
        self.model, self.settled, self.ends_early = model, settled, ends_early
        self.pending = norms.keys() - settled.keys()
        self.dependence = Dependence()
        self.postponed: set[str] = set()  # dependent in any batch so far: left to a later pass
        self.calls: Counter[str] = Counter()
        self.usual: Counter[str] | None = None  # calls in the first forward, which is whole

    @contextlib.contextmanager
    def one_batch(self) -> Iterator[None]:
        """Listen to one forward within the block."""
        with super().one_batch():
            self.calls = Counter()
            self.dependence.clear()
            with contextlib.suppress(_Enough), self.dependence.following():
                yield
        self.usual = self.usual or self.calls

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Listen within the block; after it, the norms are as before."""
        names: dict[nn.Module, str] = {norm: name for name, norm in self.norms.items()}
        with contextlib.ExitStack() as stack:
            for name, norm in self.norms.items():
                arrive = self._arrive(name)
                stack.callback(norm.register_forward_pre_hook(arrive, with_kwargs=True).remove)
                if name in self.pending:
                    stack.enter_context(by_batch(name, norm, self.note, strict=False))
                else:
                    stack.enter_context(in_place_of(name, norm, self.settled[name]))
            for module in self.model.modules():
                if module in names or not module._modules:
                    hook = self._leave(names.get(module))
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _arrive(self, name: str) -> Callable[..., None]:
        def arrive(norm: nn.Module, args: Any, kwargs: Any) -> None:
            input, mask = received(norm, args, kwargs)
            self.values[name] += values_per_channel(input, mask)
            if name in self.pending and self.dependence.is_marked(input):
                self.dependent.add(name)
                self.postponed.add(name)
            self.dependence.is_paused = name in self.pending  # what it returns is marked as a whole

        return arrive

    def _leave(self, name: str | None) -> Callable[..., None]:
        """Mark what a norm returns that is not settled, and what leaves any module that received a mark.

        The latter is for modules with kernels of their own, in which no operator of torch is seen.
        """

        def leave(_module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            if name in self.pending:
                self.dependence.is_paused = False
                self.dependence.mark(result)
                self.calls[name] += 1
                if self._has_enough():
                    raise _Enough
            elif self.dependence.is_marked((args, kwargs)):
                self.dependence.mark(result)

        return leave

    def _has_enough(self) -> bool:
        """Whether the rest of this forward concerns later passes only; the last one sees it."""
        if not self.ends_early or self.usual is None or not self.postponed:
            return False
        return all(self.calls[name] >= self.usual[name] for name in self.pending - self.postponed)


def layerwise(model: nn.Module, norms: Mapping[str, _BatchNorm], passes: Passes) -> Result:
    """Settle the norms level by level.

    Every pass settles all norms whose input depended on no norm that was not settled, in no batch on no rank.
    The last one runs every forward to its end, and shows whether all earlier ones heard all calls.

    Raises:
        OptionError: norms that depend on one another, or on themselves.
    """
    for ends_early in (True, False):
        settled = passes.settled
        while True:
            tally = passes.run(LevelListener(model, norms, settled, ends_early), settled)
            ready = {n: found for n, found in tally.moments.items() if n not in tally.dependent}
            settled = settled | {n: found for n, found in ready.items() if n not in settled}
            if not tally.dependent:
                break
            if not ready:
                raise OptionError(_in_circles(tally.dependent))
        missed = [n for n, found in settled.items() if int(found.count) != tally.values.get(n, 0)]
        if not missed:
            return Result(settled, frozenset(), tally, passes.number)
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
