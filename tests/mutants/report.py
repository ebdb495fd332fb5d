"""Reports a run's result: per room and in all, as text and as JSON, and against another run's."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .sample import Key, Mutant

CAUGHT, SURVIVED, EQUIVALENT = "caught", "survived", "equivalent"


@dataclasses.dataclass(frozen=True)
class Row:
    """One mutant, and what came of it."""

    room: str
    file: str
    line: int
    rule: str
    before: str
    after: str
    outcome: str
    by: str
    seconds: float

    @property
    def key(self) -> Key:
        """See `Mutant.key`."""
        return self.file, self.rule, self.before, self.after

    def text(self) -> str:
        """Return some lines about it."""
        verdict = (
            f"{self.outcome} by {self.by}" if self.outcome == CAUGHT else f"{self.outcome.upper()}  {self.by}"
        )
        return (
            f"{self.room}  {self.file}:{self.line}  {self.rule}\n"
            f"    - {self.before}\n    + {self.after}\n    {verdict.strip()}  ({self.seconds:.0f} s)"
        )


def row(mutant: Mutant, outcome: str, by: str, seconds: float) -> Row:
    """Return a mutant's row."""
    change, (file, rule, before, after) = mutant.change, mutant.key
    return Row(mutant.room.name, file, change.line, rule, before, after, outcome, by, round(seconds, 1))


def share(rows: list[Row]) -> float:
    """Return the share that was caught, 0..1, of those that are not equivalent."""
    found = Counter(row.outcome for row in rows)
    return found[CAUGHT] / max(1, found[CAUGHT] + found[SURVIVED])


def summary(rows: list[Row]) -> str:
    """Return a table of rooms, and the survivors."""
    lines = [
        f"{'room':26}{'mutants':>9}{'caught':>8}{'survived':>10}{'equivalent':>12}{'share':>8}{'seconds':>9}"
    ]
    rooms = list(dict.fromkeys(row.room for row in rows))
    for name, ours in [*((room, [row for row in rows if row.room == room]) for room in rooms), ("all", rows)]:
        found = Counter(row.outcome for row in ours)
        lines.append(
            f"{name:26}{len(ours):9}{found[CAUGHT]:8}{found[SURVIVED]:10}{found[EQUIVALENT]:12}"
            f"{share(ours):8.1%}{sum(row.seconds for row in ours):9.0f}"
        )
    survivors = [row.text() for row in rows if row.outcome == SURVIVED]
    return "\n".join([*lines, "", f"{len(survivors)} survived:", *survivors])


def write(path: Path, rows: list[Row], **settings: Any) -> None:
    """Write the rows, and what they were made with, as JSON, in an order that hangs on no clock."""
    rows = sorted(rows, key=lambda row: (row.room, row.key))
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {**settings, "share": share(rows), "mutants": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n")


def read(path: Path) -> list[Row]:
    """Return the rows that `write` wrote."""
    return [Row(**entry) for entry in json.loads(path.read_text())["mutants"]]


def comparison(rows: list[Row], others: list[Row]) -> str:
    """Return which mutants the other run caught and this one did not, and how many both have tried."""
    caught = {row.key for row in others if row.outcome == CAUGHT}
    common = {row.key for row in rows} & {row.key for row in others}
    lost = [row.text() for row in rows if row.outcome == SURVIVED and row.key in caught]
    return "\n".join([f"{len(lost)} of {len(common)} in common were caught by the other run only:", *lost])
