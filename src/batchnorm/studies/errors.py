"""The errors of a study, beyond those of wrong options and data."""

from __future__ import annotations

from pathlib import Path

from batchnorm.errors import BatchNormError


class StudyError(BatchNormError, RuntimeError):
    """A study cannot go on: the user's code raised, or a worker process died.

    Args:
        message: what happened and what to do about it, in one line.
        details: the traceback behind it, shown only on request.
    """

    def __init__(self, message: str, details: str | None = None) -> None:
        super().__init__(message)
        self.details = details


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C during a study; every finished run is kept.

    Args:
        finished: runs of this study that are on disk.
        total: runs of this study.
        folder: where they are.
    """

    def __init__(self, finished: int, total: int, folder: Path) -> None:
        super().__init__(
            f"stopped: {finished} of {total} runs are finished and kept in {folder}; "
            "the same command goes on from there"
        )
