"""What a study shows while it runs, as an interface; the quiet one is for use from Python."""

from __future__ import annotations

from typing import Protocol


class Display(Protocol):
    """Hears what a study is doing."""

    def stage(self, text: str) -> None:
        """A part of the study begins."""

    def training(self, runs: int, finished: int, steps: int, workers: int) -> None:
        """Training begins: `finished` of `runs` are there already, `steps` are left to take."""

    def advance(self, steps: int) -> None:
        """Steps were taken."""

    def run_ended(self, name: str, diverged: bool) -> None:
        """A run is finished and stored."""

    def notice(self, text: str) -> None:
        """Something that the user should know."""


class Quiet:
    """Shows nothing."""

    def stage(self, text: str) -> None: ...

    def training(self, runs: int, finished: int, steps: int, workers: int) -> None: ...

    def advance(self, steps: int) -> None: ...

    def run_ended(self, name: str, diverged: bool) -> None: ...

    def notice(self, text: str) -> None: ...
