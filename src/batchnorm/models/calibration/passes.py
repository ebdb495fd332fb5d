"""Passes over the data: batch by batch, on every rank, from where an interrupted one stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import DataError, FileError, MissingExtraError
from batchnorm.statistics.moments import PooledMoments

from .batches import Forward, checksum, limited, run, samples_in
from .listening import Listener, evaluation
from .progress_file import Progress, ProgressFile
from .ranks import Ranks
from .tally import Layout, Tally


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
        self._seen: int | None = None  # samples in the first pass
        self._resumed = None if file is None else file.load()
        if self._resumed is not None:
            self.number = self._resumed.number
            self.settled = layout.split(self._resumed.settled)

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
        if self._seen not in (None, tally.samples):
            raise DataError(
                f"data gave {self._seen} samples in the first pass and {tally.samples} in pass "
                f"{self.number + 1}: it must give the same samples each time; the model is unchanged"
            )
        self._seen, self._resumed = tally.samples, None
        self.number += 1
        return tally

    def forget(self) -> None:
        """Remove the file: there is nothing left to go on with."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # all is done: a file that stays costs nobody anything
                self.file.remove()

    def _over_data(self, listener: Listener) -> Tally:
        """Return what this rank hears; saved now and then, and when anything is raised."""
        tally, mark, done = Tally.empty(self.layout), 0, 0
        if self._resumed is not None:
            tally, mark = Tally.from_numbers(self.layout, self._resumed.tally), self._resumed.checksum
            done = tally.batches
        elif self.number:
            self._save(tally, mark)
        batches = iter(shown(limited(self.data, self.samples), self.bar()))
        try:
            self._skip(batches, done, tally.samples, mark)
            for batch in batches:
                arrived = 0 if self.file is None else checksum(batch)  # before a forward writes into it
                with listener.one_batch():
                    run(self.model, batch, self.forward)
                tally = tally.with_batch(
                    samples_in(batch), listener.heard, listener.values, listener.dependent
                )
                mark = arrived
                if self.file is not None and self.file.is_due():
                    self._save(tally, mark)
        except BaseException:
            if tally.batches > done:
                with contextlib.suppress(FileError):  # what was raised says more
                    self._save(tally, mark)
            raise
        return tally

    def _skip(self, batches: Iterator[Any], count: int, samples: int, mark: int) -> None:
        """Pass over the batches that an interrupted pass has done.

        Raises:
            DataError: they are not what they were.
        """
        last, passed = None, 0
        for _ in range(count):
            last = next(batches, None)
            passed += samples_in(last)
        if count and (passed != samples or checksum(last) != mark):
            raise DataError(
                f"data is not what it was: the progress file has {samples} samples in {count} batches, and "
                "those differ now; delete the file to start over, or give the same batches in the same order"
            )

    def _save(self, tally: Tally, mark: int) -> None:
        if self.file is not None:
            settled = self.layout.row(self.settled)
            self.file.save(Progress(self.number, settled, tally.numbers(), mark))

    def bar(self) -> tuple[str, int | None] | None:
        """Return what the progress bar says and counts up to, None without one."""
        if not self.progress:
            return None
        is_counted = isinstance(self.data, Sized) and self.samples is None
        description = "Calibrating" if not self.number else f"Calibrating, pass {self.number + 1}"
        return description, len(self.data) if is_counted else None  # type: ignore[arg-type]  # it is Sized


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
