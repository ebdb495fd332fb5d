"""Which engine runs a tensor, and why.

The order of precedence: an override by `use` in this context, the environment variable BATCHNORM_ENGINE, then
the device, dtype, layout and size of the tensor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple, cast

from torch import Tensor

from batchnorm.errors import OptionError

from . import eager
from .interface import Engine

ENVIRONMENT_VARIABLE = "BATCHNORM_ENGINE"
ENGINES: dict[str, Engine] = {"eager": cast(Engine, eager)}
_override: ContextVar[str | None] = ContextVar("batchnorm_engine", default=None)


class Choice(NamedTuple):
    """An engine's name, and the reason why it was chosen."""

    name: str
    reason: str


def choose(x: Tensor) -> Choice:
    """Return which engine runs `x`, and why.

    Raises:
        OptionError: the environment variable names no engine.
    """
    forced = _override.get()
    if forced is not None:
        return Choice(forced, "forced by batchnorm.kernels.use")
    if wanted := os.environ.get(ENVIRONMENT_VARIABLE):
        return Choice(_known(wanted, ENVIRONMENT_VARIABLE), f"{ENVIRONMENT_VARIABLE}={wanted} asks for it")
    return Choice(
        "eager", f"plain torch operations run {x.dtype} on {x.device.type}; no other engine takes it"
    )


def engine(x: Tensor) -> Engine:
    """Return the engine that runs `x`."""
    return ENGINES[choose(x).name]


def explain(x: Tensor) -> str:
    """Say in one line which engine runs `x`, and why.

    Example:
        >>> batchnorm.kernels.explain(torch.randn(32, 64))
        'eager for float32 [32, 64] on cpu: plain torch operations run ...'
    """
    name, reason = choose(x)
    return f"{name} for {str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}: {reason}"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within this context (this thread, this task), run every batch normalization on the engine `name`.

    Raises:
        OptionError: there is no such engine.
    """
    token = _override.set(_known(name, "batchnorm.kernels.use"))
    try:
        yield
    finally:
        _override.reset(token)


def _known(name: str, source: str) -> str:
    if name not in ENGINES:
        raise OptionError(f"{source} asks for the engine {name!r}; there are: {', '.join(ENGINES)}")
    return name
