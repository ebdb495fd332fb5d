"""Finds layerwise statistics in one forward in total: every batch waits at each norm for its statistics."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.errors import DataError, FileError, OptionError
from batchnorm.statistics.calibration import Accumulator
from batchnorm.statistics.moments import PooledMoments
from batchnorm.torch.functional import moments

from .batches import run, samples_in
from .observers import by_statistics, evaluation, input_of, received
from .packing import on_host
from .passes import Passes
from .replay import WITHOUT, Budget, Replay


class _Stop(BaseException):
    """Ends a forward at a norm that has no statistics yet."""


class _Stopped:
    """A batch and its forward, which stopped at a norm."""

    def __init__(self, batch: object, replay: Replay) -> None:
        self.samples, self.replay, self.is_finished = samples_in(batch), replay, False
        leaves, self._spec = pytree.tree_flatten(batch)
        # Each in memory of its own, as parts of one tensor share memory.
        self._first: list[Any] | None = [
            leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        self._leaves = [replay.saved(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._first]

    def batch(self) -> object:
        """Return the batch, as the forward left it where it stopped."""
        leaves, self._first = self._first, None
        if leaves is None:
            leaves = [self.replay.restored(leaf, ()) for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._spec)


class LayerwiseOnDisk:
    """Runs all forwards in lock step.

    Args:
        passes: of the calibration.
        folder: makes a folder for the files.
        budget: of all files.
    """

    def __init__(self, passes: Passes, folder: Callable[[], Path], budget: Budget) -> None:
        self.passes, self.folder, self.budget = passes, folder, budget
        self.stopped: list[_Stopped] | None = None  # None before the first round
        self.example: object = None  # the first batch
        self.of_example: dict[str, PooledMoments] = {}  # what the norms received from it
        self.running: _Stopped | None = None
        self.called: set[str] = set()
        self.received: dict[str, PooledMoments] = {}

    def settle(self) -> Accumulator:
        """Settle one norm after the other, in the order in which every batch calls them."""
        passes, all_data = self.passes, Accumulator()
        while True:
            found = passes.ranks.accumulated(self._round, passes.layout)
            all_data.samples = all_data.samples or found.samples
            all_data.batches = all_data.batches or found.batches
            all_data.check_batches()
            names = [name for name in passes.norms if found.arrivals[name]]
            if not names:
                break
            if len(names) > 1 or found.arrivals.total() != all_data.batches:
                raise OptionError(
                    f"spill: batches call their norms in different orders, or {', '.join(names)} not at all: "
                    f"{WITHOUT}"
                )
            if not found.moments:
                raise DataError("received no value that counts; the model is unchanged", names[0])
            passes.settled |= found.moments
        passes.ranks.together(self._check)
        passes.number, all_data.moments = 1, passes.settled
        return all_data

    def _round(self) -> Accumulator:
        found = Accumulator()
        with evaluation(self.passes.model), self._observed():
            for number, one in enumerate(self._forwards()):
                self.received, self.called = {}, set()
                if not one.is_finished:
                    self._resume(one)
                batch = Accumulator(
                    one.samples, 1, on_host(self.received), arrivals=Counter(self.received.keys())
                )
                found = found.merged(batch)
                if number == 0:
                    self.of_example |= self.received
        return found

    def _forwards(self) -> Iterator[_Stopped]:
        if self.stopped is not None:
            yield from self.stopped
            return
        stopped: list[_Stopped] = []
        folder = self.folder()
        for batch in self.passes.batches():
            one = _Stopped(batch, Replay(folder / f"{len(stopped)}.bin", self.budget))
            if not stopped:
                self.example = pytree.tree_map_only(Tensor, torch.clone, batch)
            yield one
            stopped.append(one)
        self.stopped = stopped

    def _resume(self, one: _Stopped) -> None:
        self.running = one
        try:
            with one.replay.running():
                one.replay.is_paused = True
                batch = one.batch()
                one.replay.is_paused = False
                run(self.passes.model, batch, self.passes.options.forward)
        except _Stop:
            return
        finally:
            self.running = None
        one.is_finished = True
        one.replay.finish()

    @contextlib.contextmanager
    def _observed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, norm in self.passes.norms.items():
                if name in self.passes.settled:
                    stack.enter_context(by_statistics(name, norm, self.passes.settled[name]))
                on_input = self._on_input(name)
                stack.callback(norm.register_forward_pre_hook(on_input, with_kwargs=True).remove)
            yield

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: Any, kwargs: Any) -> None:
            one = self.running
            if one is None:  # the check at the end
                self.received[name] = moments(*received(norm, args, kwargs))
                return
            if name in self.called:
                raise OptionError(f"spill: {name} is called several times in a forward: {WITHOUT}")
            self.called.add(name)
            if name in self.passes.settled or not self._fits(name, input_of(args, kwargs)):
                return
            one.replay.is_paused = True
            self.received[name] = moments(*received(norm, args, kwargs))
            one.replay.stop()
            raise _Stop

        return hook

    def _fits(self, name: str, input: Tensor) -> bool:
        """Whether a norm can take its input; if not, the norm's own error says more."""
        return input.dim() > 1 and input.shape[1] == self.passes.layout.channels[name]

    def _check(self) -> None:
        """Run the first batch in one go, and compare what every norm receives.

        This finds forwards with kernels that are no operators of torch, and random ones.
        """
        if self.example is None:  # this rank has no batch
            return
        self.received = {}
        with evaluation(self.passes.model), self._observed():
            run(self.passes.model, self.example, self.passes.options.forward)
        for name, found in self.of_example.items():
            again = self.received.get(name)
            if again is None or not all(
                torch.allclose(a, b, rtol=1e-6, equal_nan=True)
                for a, b in zip(found[1:], again[1:], strict=True)
            ):
                raise OptionError(
                    f"spill: {name} receives other values from a forward in one go than from one that "
                    f"stops: it computes by what are no operators of torch, or by chance; {WITHOUT}"
                )


def layerwise_on_disk(passes: Passes) -> Accumulator:
    """Settle the norms in one forward per batch, which stops at each norm while its state is on disk.

    Raises:
        OptionError: a forward cannot stop and go on, or the files would take more bytes than allowed.
        FileError: the folder cannot be used, or a file cannot be written.
    """
    where = passes.options.spill
    most, parent = (where, None) if isinstance(where, int) else (None, where)
    with contextlib.ExitStack() as stack:

        def folder() -> Path:
            try:
                made = tempfile.TemporaryDirectory(prefix="batchnorm-", dir=parent)
            except OSError as error:
                raise FileError(
                    f"spill: {where} cannot be used ({error.strerror or error}): name another folder"
                ) from error
            return Path(stack.enter_context(made))

        return LayerwiseOnDisk(passes, folder, Budget(most)).settle()
