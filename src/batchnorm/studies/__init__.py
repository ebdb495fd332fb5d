"""Experiments: what batch normalization buys a network on a data set."""

from __future__ import annotations

from .options import StudyOptions
from .runner import StudyResult, run_study

__all__ = ["StudyOptions", "StudyResult", "run_study"]
