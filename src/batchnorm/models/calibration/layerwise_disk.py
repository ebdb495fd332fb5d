"""Layerwise in one forward in total: every batch stops at the same norm, until its statistics are there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from batchnorm.errors import DataError, FileError, OptionError
from batchnorm.statistics.moments import PooledMoments
from batchnorm.torch.functional import moments

from .accumulator import Tally
from .batches import limited, run, samples_in
from .observers import evaluation, input_of, received
from .outcome import in_place_of
from .passes import Passes, Result, shown
from .replay import Budget, Replay

_WITHOUT = "leave spill out: passes over the data take that"


class _Stop(BaseException):
    """Ends a forward at a norm that has no statistics yet."""


class _Stopped:
    """A batch and its forward, which stopped at a norm."""

    def __init__(self, batch: Any, replay: Replay, is_first: bool) -> None:
        self.is_first = is_first
        self.samples, self.replay, self.is_finished = samples_in(batch), replay, False
        leaves, self._spec = pytree.tree_flatten(batch)
        # Own memory for each: parts of one tensor share theirs.
        self._first: list[Any] | None = [
            leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        self._leaves = [replay.adopt(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._first]
        self._are_tensors = [isinstance(leaf, Tensor) for leaf in leaves]

    def batch(self) -> Any:
        """Return the batch, as the forward left it where it stopped."""
        leaves, self._first = self._first, None
        if leaves is None:
            kinds = zip(self._leaves, self._are_tensors, strict=True)
            leaves = [self.replay.restore(leaf) if is_tensor else leaf for leaf, is_tensor in kinds]
        return pytree.tree_unflatten(leaves, self._spec)


class Spilled:
    """All forwards, in lock step.

    Args:
        model, norms, passes: as for `layerwise`.
        folder: makes a folder for the files.
        budget: of all files.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Mapping[str, _BatchNorm],
        passes: Passes,
        folder: Callable[[], Path],
        budget: Budget,
    ) -> None:
        self.model, self.norms, self.passes = model, norms, passes
        self.folder, self.budget = folder, budget
        self.settled: dict[str, PooledMoments] = {}
        self.stopped: list[_Stopped] | None = None  # before the first round
        self.example: Any = None
        self.of_example: dict[str, PooledMoments] = {}
        self.running: _Stopped | None = None
        self.called: set[str] = set()
        self.heard: dict[str, PooledMoments] = {}

    def settle(self) -> Result:
        """Settle one norm after the other, in the order in which every batch calls them."""
        samples, batches = 0, 0
        layout = self.passes.layout
        while True:
            rows = self.passes.ranks.gather(lambda: self._round().numbers(), Tally.length(layout))
            tally = reduce(Tally.merged, (Tally.from_numbers(layout, row) for row in rows))
            samples, batches = samples or tally.samples, batches or tally.batches
            if not batches:
                raise DataError("calibrate received no batch: data is empty, or was used up before")
            found = tally.moments
            stopped = sum(tally.values.values())
            if not stopped:
                break
            if len(found) > 1 or stopped != batches:
                raise OptionError(
                    f"spill: batches call their norms in different orders, or {', '.join(found)} not at all: "
                    f"{_WITHOUT}"
                )
            self.settled |= found
        self.passes.ranks.gather(self._check, 1)
        final = Tally(layout, samples, batches, {}, frozenset(), layout.row(self.settled))
        return Result(self.settled, frozenset(), final, 1)

    def _round(self) -> Tally:
        tally = Tally.empty(self.passes.layout)
        with evaluation(self.model), self._listening():
            for one in self._all():
                self.heard, self.called = {}, set()
                if not one.is_finished:
                    self._go_on(one)
                tally = tally.with_batch(one.samples, self.heard, dict.fromkeys(self.heard, 1), ())
                if one.is_first:
                    self.of_example |= self.heard
        return tally

    def _all(self) -> Iterator[_Stopped]:
        if self.stopped is not None:
            yield from self.stopped
            return
        stopped: list[_Stopped] = []
        passes, folder = self.passes, self.folder()
        for batch in shown(limited(passes.data, passes.samples), passes.bar()):
            path = folder / f"{len(stopped)}.bin"
            one = _Stopped(batch, Replay(path, self.budget), is_first=not stopped)
            if not stopped:
                self.example = pytree.tree_map_only(Tensor, torch.clone, batch)
            yield one
            stopped.append(one)
        self.stopped = stopped

    def _go_on(self, one: _Stopped) -> None:
        self.running = one
        try:
            with one.replay.running():
                one.replay.is_paused = True
                batch = one.batch()
                one.replay.is_paused = False
                run(self.model, batch, self.passes.forward)
        except _Stop:
            return
        finally:
            self.running = None
        one.is_finished = True
        one.replay.finish()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, norm in self.norms.items():
                if name in self.settled:
                    stack.enter_context(in_place_of(name, norm, self.settled[name]))
                hook = norm.register_forward_pre_hook(self._arrive(name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _arrive(self, name: str) -> Any:
        def arrive(norm: nn.Module, args: Any, kwargs: Any) -> None:
            one = self.running
            if one is None:  # the check at the end
                self.heard[name] = moments(*received(norm, args, kwargs))
                return
            if name in self.called:
                raise OptionError(f"spill: {name} is called several times in a forward: {_WITHOUT}")
            self.called.add(name)
            if name in self.settled or not self._fits(name, input_of(args, kwargs)):
                return
            one.replay.is_paused = True
            self.heard[name] = moments(*received(norm, args, kwargs))
            one.replay.stop()
            raise _Stop

        return arrive

    def _fits(self, name: str, input: Tensor) -> bool:
        """Whether a norm can take its input; if not, it says so better itself."""
        return input.dim() > 1 and input.shape[1] == self.passes.layout.channels[name]

    def _check(self) -> Tensor:
        """Run the first batch in one go: every norm must receive what it received before.

        It would not where a forward computes by kernels that are no operators of torch, or by chance.
        """
        if self.example is not None:
            self.heard = {}
            with evaluation(self.model), self._listening():
                run(self.model, self.example, self.passes.forward)
            for name, found in self.of_example.items():
                again = self.heard.get(name)
                if again is None or not all(
                    torch.allclose(a, b, rtol=1e-6, equal_nan=True)
                    for a, b in zip(found[1:], again[1:], strict=True)
                ):
                    raise OptionError(
                        f"spill: {name} receives other values from a forward in one go than from one that "
                        f"stops: it computes by what are no operators of torch, or by chance; {_WITHOUT}"
                    )
        return torch.zeros(1, dtype=torch.float64)


def spilled(
    model: nn.Module, norms: Mapping[str, _BatchNorm], passes: Passes, where: str | Path | int
) -> Result:
    """Settle the norms in one forward per batch, which stops at each.

    Args:
        where: a folder for the files, or the most bytes that they may take, in a temporary folder.
    """
    budget = Budget(where if isinstance(where, int) else None)
    with contextlib.ExitStack() as stack:

        def folder() -> Path:
            try:
                made = tempfile.TemporaryDirectory(
                    prefix="batchnorm-", dir=None if isinstance(where, int) else where
                )
            except OSError as error:
                raise FileError(
                    f"spill: {where} cannot be used ({error.strerror or error}): name another folder"
                ) from error
            return Path(stack.enter_context(made))

        return Spilled(model, norms, passes, folder, budget).settle()
