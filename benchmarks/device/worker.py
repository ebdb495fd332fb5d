"""A process that measures cases: one that hangs, dies or ruins its device takes only its own case along."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from benchmarks.tables import Row

from .turns import free, reason

Measure = Callable[[Any], Row]
_PATIENCE = 10.0  # seconds in which a process that was told to end does


def device_facts(device: str) -> Row:
    """Return what a reader needs to know of a device, its name first."""
    if device == "cpu":
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": properties.name,
        "gigabytes": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton,
    }


class Worker:
    """Measures one case after the other; its process starts with the first, and again if one has ended it.

    It is told to end when the context does.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def row(self, measure: Measure, case: Any, seconds: float) -> Row:
        """Return what a function of a module returns of a case; or in `missing`, why it did not.

        Args:
            measure: the function.
            case: its argument.
            seconds: that it may take, the start of the process among them.
        """
        until = time.monotonic() + seconds
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((measure, case))
            if not self._pipe.poll(max(0.0, until - time.monotonic())):
                self._end(kill=True)
                return {"missing": f"stopped after {seconds:.0f} s"}
            row, is_fit = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_PATIENCE)
            code = self._process.exitcode
            self._end(kill=True)
            return {"missing": f"its process ended, with code {code}"}
        if not is_fit:
            self._end()
        return dict(row)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()  # else this process would wait for ever for one that has died

    def _end(self, kill: bool = False) -> None:
        if self._pipe is None:
            return
        self._pipe.close()
        if kill:
            self._process.kill()
        self._process.join(_PATIENCE)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join(_PATIENCE)
        self._pipe = self._process = None


def _serve(connection: Connection) -> None:
    while True:
        try:
            measure, case = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            row = measure(case)
        except Exception as error:
            row = {"missing": reason(error)}
        is_fit = _is_fit()
        try:
            connection.send((row, is_fit))
        except OSError:  # the parent has ended or given up
            return
        if not is_fit:
            return


def _is_fit() -> bool:
    """Return whether this process can still use the device; after an illegal access, say, it never can."""
    try:
        free()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as error:
        print(f"a new process follows: {reason(error)}", file=sys.stderr)
        return False
    return True
