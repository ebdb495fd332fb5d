"""Chooses the engine that runs a tensor, and says why.

The order of precedence is: an override by `use` in this context, the environment variable BATCHNORM_ENGINE,
then the tensor itself. What an engine does not take runs on eager, even where that engine was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from batchnorm.errors import ArgumentTypeError, OptionError, naming_the_extra

from . import eager
from .interface import Engine

if TYPE_CHECKING:
    from .cpu.plain_call import PlainCall

ENVIRONMENT_VARIABLE = "BATCHNORM_ENGINE"
ENGINES: dict[str, Engine] = {"eager": cast(Engine, eager)}
# Imported on first use: Numba takes half a second, and Triton may not be there.
_LATER = {"cpu": "batchnorm.kernels.cpu.engine", "gpu": "batchnorm.kernels.gpu.engine"}
_LIBRARIES = {"cpu": "Numba", "gpu": "Triton"}
_KERNELS = {"cpu": "Numba kernels, at every size", "gpu": "Triton kernels, at every size"}
_ENGINE_FOR = {"cpu": "the engine for CPUs", "gpu": "the engine for GPUs"}
# Devices that Triton compiles for; AMD's GPUs are called cuda by torch.
_GPUS = frozenset({"cuda", "xpu"})
_override: ContextVar[str | None] = ContextVar("batchnorm_engine", default=None)
forced = _override.get  # the engine that `use` asks for in this context, or None

_FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


class Choice(NamedTuple):
    """An engine's name, and the reason why it was chosen."""

    name: str
    reason: str


def choose(x: Tensor) -> Choice:
    """Returns which engine runs `x`, and why.

    Raises:
        OptionError: the environment variable names no engine.
    """
    name, obstacle = _chosen(x)
    if obstacle is not None:
        return Choice(name, f"plain torch operations; {obstacle}")
    if _override.get() is not None:
        return Choice(name, "forced by batchnorm.kernels.use")
    asked = _environment()
    return Choice(name, f"{ENVIRONMENT_VARIABLE}={asked} asks for it" if asked else _KERNELS[name])


def _chosen(x: Tensor) -> tuple[str, str | None]:
    """Returns the engine's name, and why it is eager where another one was wanted."""
    wanted = _override.get() or _environment()
    if wanted is None:
        wanted = "cpu" if x.is_cpu or x.device.type not in _GPUS else "gpu"
    if wanted not in _ENGINE_FOR:
        return wanted, None
    obstacle = _obstacle(x, wanted)
    if obstacle is None:
        return wanted, None
    return "eager", f"{_ENGINE_FOR[wanted]} does not take {obstacle}"


@functools.cache
def _environment() -> str | None:
    """Returns what the environment variable asks for; reading it takes longer than a small kernel."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    return _known(wanted, ENVIRONMENT_VARIABLE) if wanted else None


def _obstacle(x: Tensor, wanted: str) -> str | None:
    """Returns what keeps the engine for CPUs or the one for GPUs from running `x`, or None."""
    if wanted == "cpu" and not x.is_cpu:
        return f"tensors on {x.device.type}"
    if wanted == "gpu" and x.device.type not in _GPUS and not (x.is_cpu and _interprets_triton()):
        return f"tensors on {x.device.type}"
    if x.dtype not in _FLOATING:
        return str(x.dtype)
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return f"a {type(x).__name__}"  # a fake one of the compiler, say: it has no memory to read
    if x.is_nested:
        return "nested tensors"
    if x.layout is not torch.strided or x.numel() == 0:
        return f"{x.layout}" if x.numel() else "tensors without values"
    return _missing(wanted)


@functools.cache
def _missing(wanted: str) -> str | None:
    """Returns what an engine cannot be loaded without, or None.

    An installed library may raise anything on import: Numba refuses a NumPy that is newer than itself.
    """
    library = _LIBRARIES[wanted]
    if importlib.util.find_spec(library.lower()) is None:
        return f"anything without {library}: pip install {library.lower()}"
    try:
        load(wanted)
    except Exception as error:
        said = " ".join(str(error).split())
        return f"anything, as {library} cannot be imported ({type(error).__name__}: {said})"
    return None


@functools.cache
def _interprets_triton() -> bool:
    """Returns whether Triton's interpreter runs its kernels on CPUs: TRITON_INTERPRET=1 at their import."""
    return _missing("gpu") is None and bool(importlib.import_module(_LATER["gpu"]).IS_INTERPRETED)


def engine(x: Tensor) -> Engine:
    """Returns the engine that runs `x`."""
    name, _ = _chosen(x)
    return load(name)


def is_default() -> bool:
    """Returns whether the engine for CPUs runs tensors on a CPU: nothing asks for another one."""
    return _override.get() is None and _environment() is None and _missing("cpu") is None


@functools.cache
def load_plain_call() -> type[PlainCall]:
    """Returns `PlainCall` of the engine for CPUs, imported on first use."""
    found: type[PlainCall] = importlib.import_module("batchnorm.kernels.cpu.plain_call").PlainCall
    return found


def compiles(device: str, dtype: torch.dtype) -> bool:
    """Returns whether the engine for GPUs runs such tensors, by kernels that a compiler can look into."""
    wanted = _override.get() or _environment() or "gpu"
    is_its = wanted == "gpu" and device in _GPUS and dtype in _FLOATING
    return is_its and _missing("gpu") is None and not _interprets_triton()


def load(name: str) -> Engine:
    """Returns the engine of a name."""
    if name not in ENGINES:
        ENGINES[name] = cast(Engine, importlib.import_module(_LATER[name]))
    return ENGINES[name]


def explain(x: Tensor | torch.nn.Module) -> str:
    """Says in one line which engine runs `x`, and why.

    Args:
        x: an input `[N, C, *S]`; or a layer or model: then of inputs of the dtype and on the device of it.

    Example:
        >>> batchnorm.kernels.explain(torch.randn(32, 64))
        'cpu for float32 [32, 64] on cpu: Numba kernels, at every size'
    """
    if isinstance(x, torch.nn.Module):
        tensors = (*x.parameters(), *x.buffers())
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
        shown = torch.empty(2, 1, dtype=like.dtype, device=like.device)
        name, reason = choose(shown)
        kind = f"{str(shown.dtype).removeprefix('torch.')} inputs on {shown.device}"
        return f"{name} for {type(x).__name__}, {kind}: {reason}"
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"explain takes a tensor, or a layer of torch; got {type(x).__name__}")
    name, reason = choose(x)
    if x.is_nested:
        return f"{name} for a nested tensor on {x.device}: {reason}"
    return f"{name} for {str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}: {reason}"


def cache_folder() -> Path | None:
    """Returns the folder in which the compiled kernels for CPUs stay from one process to the next.

    It lies beside their source; in the user's cache folder where that cannot be written to; or within
    NUMBA_CACHE_DIR. A container image that holds it compiles nothing at its first call.

    Returns:
        The folder, which may not be there yet; None where no folder can be written to, so that every process
        compiles its kernels.

    Raises:
        MissingExtraError: Numba, which compiles them, is not installed.

    Example:
        >>> batchnorm.kernels.cache_folder().name
        '__pycache__'
    """
    with naming_the_extra("batchnorm.kernels.cache_folder"):
        module = importlib.import_module("batchnorm.kernels.cpu.compile_cache")
    found: Path | None = module.cache_folder()
    return found


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within this context (this thread, this task), run every batch normalization on the engine `name`.

    What the engine does not take runs on eager all the same.

    Raises:
        OptionError: there is no such engine.
    """
    token = _override.set(_known(name, "batchnorm.kernels.use"))
    try:
        yield
    finally:
        _override.reset(token)


def _known(name: str, source: str) -> str:
    names = dict.fromkeys((*ENGINES, *_LATER))
    if name not in names:
        raise OptionError(f"{source} asks for the engine {name!r}; there are: {', '.join(names)}")
    return name
