"""The command line: `python -m tests.mutants`."""

from __future__ import annotations

import argparse
import functools
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .report import CAUGHT, EQUIVALENT, SURVIVED, Row, comparison, read, row, share, summary, write
from .rooms import ROOMS, Room
from .sample import Mutant, equivalent, population, sample
from .trial import Outcome, copy, mutate, run_room

ROOT = Path(__file__).parents[2]
ENOUGH = 0.95  # of the mutants that are not declared equivalent
LONGEST = 900.0  # seconds that a room's tests may take on the unmutated code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="What the test suite catches."
    )
    names = [room.name for room in ROOMS]
    parser.add_argument("--room", action="append", choices=names, help="this room only; may be repeated")
    parser.add_argument("--count", type=int, default=14, help="mutants per room (14)")
    parser.add_argument("--seed", type=int, default=0, help="which of them (0)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (2)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "mutants.json", help="what was found, as JSON"
    )
    parser.add_argument(
        "--against", type=Path, help="an earlier --out: list what that run caught and this did not"
    )
    parser.add_argument("--list", action="store_true", help="list the sample, and try nothing")
    return parser.parse_args()


class _Trials:
    """A sample's trials, several at a time, each in a copy of the repository; first a room's, unmutated."""

    def __init__(self, root: Path, folder: Path, jobs: int, say: Callable[[str], None]) -> None:
        self.rows: list[Row] = []
        self.failed: list[str] = []  # rooms whose tests fail unmutated
        self._root, self._say, self._stop = root, say, threading.Event()
        self._pool = ThreadPoolExecutor(jobs)
        self._places: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            self._places.put(copy(root, folder / str(job)))

    def run(self, mutants: list[Mutant]) -> Iterator[int]:
        """Do all; yields how many mutants were settled, each time some were."""
        of_room: dict[str, list[Mutant]] = {}
        for each in mutants:
            of_room.setdefault(each.room.name, []).append(each)
        pending: dict[Future[Outcome], tuple[Room, Mutant | None]] = {
            self._submit(group[0].room, None, LONGEST): (group[0].room, None) for group in of_room.values()
        }
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    room, mutant = pending.pop(future)
                    outcome = future.result()
                    if mutant is not None:
                        self._settle(mutant, outcome)
                        yield 1
                    elif outcome.is_caught:
                        self.failed.append(room.name)
                        self._say(
                            f"{outcome.output[-3000:]}\n{room.name}: FAILS UNMUTATED, not tried: {outcome.by}"
                        )
                        yield len(of_room[room.name])
                    else:
                        self._say(f"{room.name}: passes unmutated ({outcome.seconds:.0f} s)")
                        limit = 1.5 * outcome.seconds + room.patience
                        pending |= {self._submit(room, m, limit): (room, m) for m in of_room[room.name]}
        finally:
            self._stop.set()
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, room: Room, mutant: Mutant | None, limit: float) -> Future[Outcome]:
        return self._pool.submit(self._try, room, mutant, limit)

    def _try(self, room: Room, mutant: Mutant | None, limit: float) -> Outcome:
        place = self._places.get()
        try:
            mutate(mutant, self._root, place)
            return run_room(room, None if mutant is None else mutant.file, place, limit, self._stop)
        finally:
            self._places.put(place)

    def _settle(self, mutant: Mutant, outcome: Outcome) -> None:
        self.rows.append(
            row(mutant, *((CAUGHT, outcome.by) if outcome.is_caught else (SURVIVED, "")), outcome.seconds)
        )
        self._say(self.rows[-1].text())


def _declared(mutants: list[Mutant], everything: list[Mutant], say: Callable[[str], None]) -> list[Row]:
    """Return the rows of those that are declared equivalent, and say which entries name no mutant."""
    known = equivalent()
    for key in known.keys() - {mutant.key for mutant in everything}:
        say(f"equivalent.toml has an entry that names no mutant: {key}")
    return [row(mutant, EQUIVALENT, known[mutant.key], 0.0) for mutant in mutants if mutant.key in known]


def main() -> int:
    """Try a sample of mutants; return 1 where too few are caught, or a room's tests fail unmutated."""
    options = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends too
    others = None if options.against is None else read(options.against)
    rooms = [room for room in ROOMS if options.room is None or room.name in options.room]
    everything = list(population(ROOT))
    mutants = sample(ROOT, everything, rooms, options.count, options.seed)
    if options.list:
        print("\n".join(row(mutant, "untried", "", 0.0).text() for mutant in mutants))
        return 0
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, tempfile.TemporaryDirectory() as folder:
        say = functools.partial(progress.console.print, markup=False, highlight=False, soft_wrap=True)
        say(f"{len(mutants)} mutants of {len(everything)}, seed {options.seed}")
        declared = _declared(mutants, everything, say)
        bar = progress.add_task("mutants", total=len(mutants), completed=len(declared))
        trials = _Trials(ROOT, Path(folder), options.jobs, say)
        settled = {declared_row.key for declared_row in declared}
        for count in trials.run([m for m in mutants if m.key not in settled]):
            progress.advance(bar, count)
            write(options.out, [*declared, *trials.rows], seed=options.seed, count=options.count)
            if not progress.console.is_terminal:
                say(f"[{int(progress.tasks[0].completed)} of {len(mutants)}]")
    order = [room.name for room in ROOMS]
    rows = sorted([*declared, *trials.rows], key=lambda r: (order.index(r.room), r.file, r.line))
    print("\n" + summary(rows))
    if others is not None:
        print("\n" + comparison(rows, others))
    if trials.failed:
        print(f"\nWithout a result, since their tests fail unmutated: {', '.join(trials.failed)}")
    return int(bool(trials.failed) or share(rows) < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
