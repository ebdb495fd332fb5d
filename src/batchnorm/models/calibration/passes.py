"""Passes over the data: batch by batch, on every rank, from where an interrupted one stopped."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import DataError, FileError, MissingExtraError
from batchnorm.statistics.moments import PooledMoments

from .accumulator import Layout, Tally
from .batches import Forward, Seen, limited, run, samples_in
from .observers import Listener, evaluation
from .progress_file import Progress, ProgressFile
from .ranks import Ranks


@dataclass(frozen=True)
class Result:
    """What passes found.

    Attributes:
        moments: of each layer that anything reached.
        dependent: layers whose moments depend on how the data was split into batches.
        tally: of the last pass.
        passes: how many there were.
    """

    moments: Mapping[str, PooledMoments]
    dependent: frozenset[str]
    tally: Tally
    passes: int


class Passes:
    """All passes of one calibration.

    Args:
        model: in any mode.
        data: batches.
        forward: how a batch goes through the model, if not by itself.
        samples: at most this many, on this rank.
        layout: of the norms' channels.
        ranks: that work together.
        file: where to note how far it has come.
        progress: show a progress bar.

    Attributes:
        number: passes that are finished.
        settled: moments of the layers that have theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        forward: Forward | None,
        samples: int | None,
        layout: Layout,
        ranks: Ranks,
        file: ProgressFile | None,
        progress: bool,
    ) -> None:
        self.model, self.data, self.forward, self.samples = model, data, forward, samples
        self.layout, self.ranks, self.file, self.progress = layout, ranks, file, progress
        self.number = 0
        self.settled: dict[str, PooledMoments] = {}
        self._seen: Seen = Seen()  # in the pass that is going on, on this rank
        self._samples: int | None = None  # in the first pass, on all ranks
        self._resumed = None if file is None else file.load(layout)
        if self._resumed is not None:
            self.number = self._resumed.number
            self.settled = layout.split(self._resumed.settled)

    @property
    def is_finished(self) -> bool:
        """Whether an earlier call has done everything, and its file is there."""
        return self._resumed is not None and self._resumed.is_finished

    def result(self) -> Result:
        """Return what the earlier call found, if data is still what it was.

        Raises:
            DataError: it is not.
            RankError: on another rank.
        """
        resumed = self._resumed
        assert resumed is not None

        def check() -> Tensor:
            batches = limited(self.data, self.samples)
            self._skip(batches, resumed.seen)
            if next(batches, None) is not None:
                raise _other_data(resumed.seen)
            return torch.zeros(1, dtype=torch.float64)

        self.ranks.gather(check, 1)
        tally = Tally.from_numbers(self.layout, resumed.tally)
        return Result(self.settled, tally.dependent, tally, self.number)

    def keep(self, found: Result) -> None:
        """Write what was found into the file, on every rank or on none that goes on.

        Raises:
            FileError: it cannot be written.
            RankError: on another rank.
        """

        def work() -> Tensor:
            if self.file is not None:
                settled, tally = self.layout.row(found.moments), found.tally.numbers()
                self.file.save(Progress(found.passes, settled, tally, self._seen, is_finished=True))
            return torch.zeros(1, dtype=torch.float64)

        self.ranks.gather(work, 1)

    def run(self, listener: Listener, settled: dict[str, PooledMoments]) -> Tally:
        """Go over the data once, on all ranks, and return what all of them heard together."""
        self.settled = settled

        def work() -> Any:
            with evaluation(self.model), listener.attached():
                return self._over_data(listener).numbers()

        rows = self.ranks.gather(work, Tally.length(self.layout))
        tally = reduce(Tally.merged, (Tally.from_numbers(self.layout, row) for row in rows))
        if tally.batches == 0:
            raise DataError(
                "calibrate received no batch: data is empty, or an iterator that was used up before"
            )
        if self._samples not in (None, tally.samples):
            raise DataError(
                f"data gave {self._samples} samples in the first pass and {tally.samples} in pass "
                f"{self.number + 1}: it must give the same samples each time; the model is unchanged"
            )
        self._samples, self._resumed = tally.samples, None
        self.number += 1
        return tally

    def forget(self) -> None:
        """Remove the file: there is nothing left to go on with."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # all is done: a file that stays does no harm
                self.file.remove()

    def _over_data(self, listener: Listener) -> Tally:
        """Return what this rank hears; saved now and then, and when anything is raised."""
        tally, self._seen = Tally.empty(self.layout), Seen()
        if self._resumed is not None:
            tally, self._seen = Tally.from_numbers(self.layout, self._resumed.tally), self._resumed.seen
        elif self.number:
            self._save(tally)
        done = tally.batches
        batches = iter(shown(limited(self.data, self.samples), self.bar()))
        try:
            self._skip(batches, self._seen)
            for batch in batches:
                # Before a forward writes into it.
                arrived = self._seen if self.file is None else self._seen.with_batch(batch)
                with listener.one_batch():
                    run(self.model, batch, self.forward)
                tally = tally.with_batch(
                    samples_in(batch), listener.heard, listener.values, listener.dependent
                )
                self._seen = arrived
                if self.file is not None and self.file.is_due():
                    self._save(tally)
        except BaseException:
            if tally.batches > done:
                with contextlib.suppress(FileError):  # what was raised says more
                    self._save(tally)
            raise
        return tally

    def _skip(self, batches: Iterator[Any], seen: Seen) -> None:
        """Pass over the batches that an interrupted pass has done.

        Raises:
            DataError: they are not what they were.
        """
        passed = Seen()
        for batch in itertools.islice(batches, seen.batches):
            passed = passed.with_batch(batch)
        if passed != seen:
            raise _other_data(seen)

    def _save(self, tally: Tally) -> None:
        if self.file is not None:
            settled = self.layout.row(self.settled)
            self.file.save(Progress(self.number, settled, tally.numbers(), self._seen, is_finished=False))

    def bar(self) -> tuple[str, int | None] | None:
        """Return what the progress bar says and counts up to, None without one."""
        if not self.progress:
            return None
        is_counted = isinstance(self.data, Sized) and self.samples is None
        description = "Calibrating" if not self.number else f"Calibrating, pass {self.number + 1}"
        return description, len(self.data) if is_counted else None  # type: ignore[arg-type]  # it is Sized


def _other_data(seen: Seen) -> DataError:
    return DataError(
        f"data is not what it was: the progress file has {seen.samples} samples in {seen.batches} batches, "
        "and those differ now; delete the file to start over, or give the same batches in the same order"
    )


def in_one_pass(norms: Mapping[str, _BatchNorm], passes: Passes) -> Result:
    """Every norm normalizes by its batch, and all are heard at once."""
    tally = passes.run(Listener(norms), {})
    return Result(tally.moments, tally.dependent, tally, passes.number)


def shown(batches: Iterable[Any], bar: tuple[str, int | None] | None) -> Iterable[Any]:
    """Return the batches, behind a progress bar if there is one."""
    if bar is None:
        return batches
    try:
        from rich.progress import track
    except ModuleNotFoundError:
        raise MissingExtraError("calibrate(progress=True)", "rich", "study") from None
    description, total = bar
    return track(batches, description=description, total=total)
