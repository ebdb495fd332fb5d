"""The kernels for GPUs on machines without one: in Triton's interpreter, on CPU tensors.

Triton decides it where a function is defined, its own functions included. So the variable is there while
Triton and our kernels are imported, and gone afterwards: what the compiler or a child process does is not
changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from batchnorm.torch.call import Call

from .cases import Case, covering_cases
from .covering import covering_array

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
GPU = ("gpu",) if HAS_TRITON else ()  # the engine's name, to test it along with others


def device(engine: str) -> str:
    """Return the device on which an engine of this name is tested."""
    return DEVICE if engine == "gpu" else "cpu"


def trimmed(engine: str, case: Case) -> Case:
    """Return a case of the same kind, of a size for Triton's interpreter."""
    if engine != "gpu" or DEVICE != "cpu":
        return case
    limits = (131, 21, 13, 13, 13)
    return dataclasses.replace(case, shape=tuple(map(min, case.shape, limits)))


def every_engine_and_case(names: Sequence[str], cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrize a test by `name` and `case`: each engine on each case that it takes.

    Of an empty tensor that is "eager". Triton's interpreter is slow: `make test` gives it a covering subset
    of the cases, and `make test-slow` the others.
    """
    few = covering_cases(case for case in cases if math.prod(case.shape))

    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}-{case}", marks=_slow_unless(name != "gpu" or case in few))
            for name in names
            for case in cases
            if math.prod(case.shape) or name == "eager"
        ],
    )


def every_combination(names: str, *options: Sequence[Any], strength: int = 2) -> pytest.MarkDecorator:
    """Parametrize a test of the interpreter by all combinations of the options.

    `make test` takes a covering array of that strength, and `make test-slow` the rest.
    """
    few = covering_array(*options, strength=strength)
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*one, id="-".join(map(str, one)), marks=_slow_unless(one in few))
            for one in itertools.product(*options)
        ],
    )


def _slow_unless(in_make_test: bool) -> list[pytest.MarkDecorator]:
    return [] if in_make_test or DEVICE != "cpu" else [pytest.mark.slow]


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Within this context, what is defined for Triton is interpreted where there is no GPU."""
    if DEVICE != "cpu":
        yield
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]


def _import() -> None:
    with interpreting():
        engine = importlib.import_module("batchnorm.kernels.gpu.engine")
        engine.moments(Call(torch.zeros(2, 2)))  # the first launch imports more of Triton


def _round_bfloat16() -> None:
    """Let the interpreter round to bfloat16 as GPUs do, to nearest and ties to even; Triton 3.9 cuts off."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    tl = importlib.import_module("triton.language")
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, source: Any, kind: Any) -> Any:
        pair = source.dtype.scalar, kind.scalar
        if pair == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(bits.numpy(), kind.scalar)
        if pair == (tl.bfloat16, tl.float32):
            values = (source.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(values, kind.scalar)
        return cast(self, source, kind)

    interpreter.InterpreterBuilder.cast_impl = rounding


def _sum_by_tree() -> None:
    """Let the interpreter add up as GPUs do, pair by pair; NumPy adds rows one after the other."""
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def total(self: Any, values: Any) -> Any:
        data = values.handle.data
        axis = self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        while data.shape[axis] > 1:
            first, second = (data.take(range(i, data.shape[axis], 2), axis) for i in range(2))
            data = first + second
        return self.to_tensor(data if self.keep_dims else data.squeeze(axis), values.dtype)

    interpreter.ReduceOps.sum = total


class _Nothing:
    def restore(self) -> None:
        """Leave all as it is."""


def _patch_once() -> None:
    """Let a launch make Triton's language an interpreted one once, not again for each helper function.

    That is half of the interpreter's time (Triton 3.9).
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    depth = 0

    def patched(function: Any) -> Any:
        nonlocal depth
        depth += 1
        return patch(function) if depth == 1 else _Nothing()

    def launched(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal depth
        depth = 0
        return run(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patched, launched


if HAS_TRITON and DEVICE == "cpu":
    _import()
    _round_bfloat16()
    _sum_by_tree()
    _patch_once()
