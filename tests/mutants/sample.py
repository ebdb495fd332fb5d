"""Chooses mutants by the seed: as many of every room, of every rule in turn."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rooms import Room, files
from .rules import RULES, Change, changes

_EQUIVALENT = Path(__file__).with_name("equivalent.toml")

Key = tuple[str, str, str, str]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change in one file of a room; two runs, and the list of equivalent ones, know it by its key."""

    room: Room
    file: Path
    change: Change
    before: str
    after: str

    @property
    def key(self) -> Key:
        """File, rule and the changed lines, which stay the same where lines move."""
        return str(self.file), self.change.rule, self.before, self.after


def population(root: Path) -> Iterator[Mutant]:
    """Return all mutants of all rooms."""
    for room, file in files(root):
        source = (root / file).read_text()
        for change in changes(source):
            yield Mutant(room, file, change, *change.lines(source))


def sample(root: Path, everything: list[Mutant], rooms: list[Room], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants of each room.

    A mutant's place hangs on itself and the seed alone: a change elsewhere leaves most others in the sample.
    """
    chosen = []
    for room in rooms:
        ours = [mutant for mutant in everything if mutant.room == room]
        in_turn = (
            sorted((m for m in ours if m.change.rule == rule), key=lambda m: _place(m, seed))
            for rule in RULES
        )
        mixed = itertools.chain.from_iterable(itertools.zip_longest(*in_turn))
        valid = (m for m in mixed if m is not None and m.change.is_valid((root / m.file).read_text()))
        chosen += list(itertools.islice(valid, count))
    return chosen


def _place(mutant: Mutant, seed: int) -> str:
    return hashlib.sha256(repr((seed, mutant.key)).encode()).hexdigest()


def equivalent() -> dict[Key, str]:
    """Return the mutants that compute the same, or as well, as the code; and why."""
    entries: list[dict[str, Any]] = tomllib.loads(_EQUIVALENT.read_text()).get("mutant", [])
    return {(e["file"], e["rule"], e["before"], e["after"]): e["why"] for e in entries}
