"""Runs passes over the data: batch by batch, on every rank, from where an interrupted pass stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from batchnorm.errors import ArgumentTypeError, DataError, FileError, MissingExtraError, OptionError
from batchnorm.models.norms.kinds import BatchNormBase
from batchnorm.statistics.calibration import Accumulator
from batchnorm.statistics.moments import PooledMoments

from .batches import Forward, Seen, limited, run, samples_in
from .observers import BatchObserver, evaluation
from .packing import Layout
from .progress_file import Progress, ProgressFile, fingerprint
from .ranks import Ranks

Method = Literal["batch", "layerwise"]


@dataclass(frozen=True)
class Options:
    """Options of `calibrate`, with its names and meanings."""

    forward: Forward | None
    progress: bool
    method: Method
    spill: str | Path | int | None
    samples: int | None
    progress_file: str | Path | None
    save_every: float
    keep_progress: bool

    def check(self, data: Iterable[object]) -> None:
        """Raise OptionError for a value out of range, and for options that exclude each other."""
        samples, path, seconds = self.samples, self.progress_file, self.save_every
        if self.method not in ("batch", "layerwise"):
            raise OptionError(f"method is 'batch' or 'layerwise'; got {self.method!r}")
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise OptionError(f"samples is a number of 1 or more, or None for all; got {samples!r}")
        if self.spill is not None and (self.method != "layerwise" or path is not None):
            raise OptionError("spill= is for method='layerwise', and without progress_file=")
        if self.method == "layerwise" and self.spill is None and isinstance(data, Iterator):
            raise OptionError(
                f"method='layerwise' goes over data several times, and a {type(data).__name__} is used up by "
                "the first: pass a list or a DataLoader, or spill="
            )
        if path is not None and not isinstance(path, (str, Path)):
            raise ArgumentTypeError(f"progress_file is a path; got a {type(path).__name__}")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise OptionError(f"save_every is a number of seconds, 0 or more; got {seconds!r}")
        if self.keep_progress and path is None:
            raise OptionError("keep_progress=True is for progress_file=: name one")


@dataclass
class Passes:
    """Runs all passes of one calibration.

    Args:
        model: in any mode.
        norms: the norms to calibrate, by name.
        data: batches.
        options: of the calibration.
        ranks: that calibrate together.

    Attributes:
        layout: of the norms' channels.
        file: for the progress; None = no file.
        number: number of finished passes.
        settled: moments of the layers that have their statistics.
    """

    model: nn.Module
    norms: Mapping[str, BatchNormBase]
    data: Iterable[object]
    options: Options
    ranks: Ranks
    layout: Layout = field(init=False)
    file: ProgressFile | None = field(default=None, init=False)
    number: int = field(default=0, init=False)
    settled: dict[str, PooledMoments] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        options, ranks = self.options, self.ranks
        self.layout = Layout.of(self.norms)
        if options.progress_file is not None:
            facts = {"method": options.method, "samples": options.samples}
            facts |= {"ranks": ranks.size, "rank": ranks.rank}
            path = ranks.own(Path(options.progress_file))
            identity = fingerprint(self.model, self.norms, facts)
            self.file = ProgressFile(path, identity, options.save_every, self.layout)
        self._seen = Seen()  # in the current pass, on this rank
        self._samples: int | None = None  # in the first pass, on all ranks
        self._resumed = None if self.file is None else self.file.load()
        if self._resumed is not None:
            self.number, self.settled = self._resumed.number, self._resumed.settled

    @property
    def is_finished(self) -> bool:
        """Whether an earlier call has finished all passes and kept its file."""
        return self._resumed is not None and self._resumed.is_finished

    def batches(self) -> Iterator[object]:
        """Return the batches of one pass, behind a progress bar if there is one."""
        batches = limited(self.data, self.options.samples)
        if not self.options.progress:
            return batches
        try:
            from rich.progress import track
        except ModuleNotFoundError:
            raise MissingExtraError("calibrate(progress=True)", "rich", "study") from None
        total = len(self.data) if isinstance(self.data, Sized) and self.options.samples is None else None
        description = "Calibrating" if not self.number else f"Calibrating, pass {self.number + 1}"
        return iter(track(batches, description=description, total=total))

    def run(self, observer: BatchObserver) -> Accumulator:
        """Run one pass on all ranks, and return what the norms received on all of them.

        Raises:
            DataError: no batch, or other samples than in the first pass.
        """

        def work() -> Accumulator:
            with evaluation(self.model), observer.attached():
                return self._over_data(observer)

        found = self.ranks.accumulated(work, self.layout)
        found.check_batches()
        if self._samples not in (None, found.samples):
            raise DataError(
                f"data gave {self._samples} samples in the first pass and {found.samples} in pass "
                f"{self.number + 1}: it must give the same samples each time; the model is unchanged"
            )
        self._samples, self._resumed = found.samples, None
        self.number += 1
        return found

    def kept(self) -> Accumulator:
        """Return what an earlier call found, if data is still the same.

        Raises:
            DataError: data has changed.
            RankError: data has changed on another rank.
        """
        resumed = self._resumed
        assert resumed is not None

        def check() -> None:
            batches = limited(self.data, self.options.samples)
            self._skip(batches, resumed.seen)
            if next(batches, None) is not None:
                raise _other_data(resumed.seen)

        self.ranks.together(check)
        return dataclasses.replace(resumed.accumulated, moments=resumed.settled)

    def keep(self, found: Accumulator) -> None:
        """Write the result into the file, on every rank or on none that goes on.

        Raises:
            FileError: it cannot be written.
            RankError: it cannot be written on another rank.
        """
        self.settled = found.moments
        self.ranks.together(lambda: self._save(found, is_finished=True))

    def forget(self) -> None:
        """Remove the file, which has served."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # all is done: a file that stays does no harm
                self.file.remove()

    def _over_data(self, observer: BatchObserver) -> Accumulator:
        """Return what the norms receive on this rank; saved now and then, and when anything is raised."""
        found, self._seen = Accumulator(), Seen()
        if self._resumed is not None:
            found, self._seen = self._resumed.accumulated, self._resumed.seen
        elif self.number:
            self._save(found)
        done = found.batches
        batches = self.batches()
        try:
            self._skip(batches, self._seen)
            for batch in batches:
                # Before the forward, which may write into the batch.
                seen = self._seen if self.file is None else self._seen.with_batch(batch)
                with observer.one_batch():
                    run(self.model, batch, self.options.forward)
                found, self._seen = found.merged(observer.observed(samples_in(batch))), seen
                if self.file is not None and self.file.is_due():
                    self._save(found)
        except BaseException:
            if found.batches > done:
                with contextlib.suppress(FileError):  # the error that was raised says more
                    self._save(found)
            raise
        return found

    def _skip(self, batches: Iterator[object], seen: Seen) -> None:
        """Skip the batches that an interrupted pass has finished.

        Raises:
            DataError: they are not the same batches.
        """
        passed = Seen()
        for batch in itertools.islice(batches, seen.batches):
            passed = passed.with_batch(batch)
        if passed != seen:
            raise _other_data(seen)

    def _save(self, found: Accumulator, *, is_finished: bool = False) -> None:
        if self.file is not None:
            self.file.save(Progress(self.number, self.settled, found, self._seen, is_finished))


def _other_data(seen: Seen) -> DataError:
    return DataError(
        f"data is not what it was: the progress file has {seen.samples} samples in {seen.batches} batches, "
        "and those differ now; delete the file to start over, or give the same batches in the same order"
    )
