"""A process of its own in which `reuse_memory()` holds: it is for good, and ours is also compared without."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Self

import batchnorm

from .interleaved import Clocked, clocked, rest_and_wake

REUSING = "-reuse"  # behind the names of those that run in it
Build = Callable[[Any], Mapping[str, Callable[[], object]]]


class ReusingProcess:
    """Takes steps when told to, in turn with those of this process.

    Args:
        build: a function of a module, that makes a case's steps by their names.
    """

    def __init__(self, build: Build) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, theirs), daemon=True)
        self._process.start()
        theirs.close()  # else this process would wait for ever for one that has died

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._process.join()

    def prepare(self, case: Any) -> dict[str, Clocked]:
        """Have `case` built there, in place of the one before; return calls that return seconds, by name."""
        self._ours.send(("build", case))
        names: list[str] = self._ours.recv()
        return {name: lambda name=name: self._seconds(name) for name in names}  # type: ignore[misc]

    def _seconds(self, name: str) -> float:
        self._ours.send(("step", name))
        seconds: float = self._ours.recv()
        return seconds


def _serve(build: Build, connection: Connection) -> None:
    batchnorm.reuse_memory()
    steps: dict[str, Clocked] = {}
    while True:
        try:
            what, argument = connection.recv()
        except EOFError:
            return
        if what == "build":
            steps.clear()
            steps |= {name: clocked(step, rest_and_wake) for name, step in build(argument).items()}
            connection.send(list(steps))
        else:
            connection.send(steps[argument]())
