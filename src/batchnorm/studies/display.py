"""Receives what a study does; terminal.py shows it, with packages of the extra `study`."""

from __future__ import annotations


class Display:
    """Hears what a study is doing, and shows nothing."""

    def stage(self, text: str) -> None:
        """A part of the study begins."""

    def training(self, runs: int, finished: int, steps: int, workers: int) -> None:
        """Training begins: `finished` of `runs` are there already, `steps` are left to take."""

    def advance(self, steps: int) -> None:
        """Steps were taken; a negative number of steps has to be taken again."""

    def run_ended(self, name: str, diverged: bool) -> None:
        """A run is finished and stored."""

    def notice(self, text: str) -> None:
        """Something that the user should know."""
