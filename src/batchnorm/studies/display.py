"""Receives what a study does; terminal.py shows it, with packages of the extra `study`."""

from __future__ import annotations

from pathlib import Path

from .records import Run


class Display:
    """Hears what a study is doing, and shows nothing."""

    def stage(self, text: str) -> None:
        """A part of the study begins."""

    def training(self, runs: int, finished: int, work: float, workers: int) -> None:
        """Training begins: `finished` of `runs` are there already, `work` seconds of one core are left."""

    def advance(self, work: float) -> None:
        """So many of these seconds' work was done; where it is negative, it has to be done again."""

    def run_ended(self, name: str, setting: str, run: Run) -> None:
        """A run is finished and stored; `setting` is the name of the setting that it belongs to."""

    def setting_ended(self, setting: str, verdict: str) -> None:
        """All runs of a setting are there, and what they say in short."""

    def published(self, report: Path) -> None:
        """A report of the runs that are there was written, before the end."""

    def notice(self, text: str) -> None:
        """Something that the user should know."""
