"""The choice of an engine, its reasons, and the ways to override it."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.kernels import choose
from tests.support.interpreted import DEVICE, HAS_TRITON
from tests.support.programs import run_python

needs_triton = pytest.mark.skipif(
    not HAS_TRITON or DEVICE != "cpu",
    reason="Triton is not interpreted here: not installed, or there is a GPU",
)


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    """Let the environment be read again after a test that changed it."""
    yield
    choose._environment.cache_clear()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Register a second engine, `spy`, which notes its calls and hands them on."""
    calls: list[str] = []

    class Spy:
        def __getattr__(self, primitive: str) -> object:
            calls.append(primitive)
            return getattr(choose.ENGINES["eager"], primitive)

    monkeypatch.setitem(choose.ENGINES, "spy", Spy())
    return calls


def test_explain_says_what_and_why() -> None:
    text = batchnorm.kernels.explain(torch.zeros(2, 3))
    assert text == "cpu for float32 [2, 3] on cpu: Numba kernels, at every size"


class Tagged(torch.Tensor):
    """A tensor of a class of its own."""


@pytest.mark.parametrize(
    ("x", "obstacle"),
    [
        (torch.zeros(2, 3, device="meta"), "tensors on meta"),
        (torch.zeros(0, 3), "tensors without values"),
        (torch.zeros(2, 3).as_subclass(Tagged), "a Tagged"),
        (torch.zeros(2, 3, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(2, 3).to_sparse(), "torch.sparse_coo"),
    ],
    ids=["device", "empty", "subclass", "dtype", "sparse"],
)
def test_eager_runs_what_the_cpu_engine_does_not_take(x: torch.Tensor, obstacle: str) -> None:
    if obstacle == "torch.sparse_coo":
        x = x + torch.eye(3)[:2].to_sparse()
    for forced in (False, True):
        with batchnorm.kernels.use("cpu") if forced else contextlib.nullcontext():
            name, reason = choose.choose(x)
        assert name == "eager"
        assert reason == f"plain torch operations; the engine for CPUs does not take {obstacle}"


@pytest.fixture
def fresh() -> Iterator[None]:
    """Let libraries be looked for again."""
    choose._missing.cache_clear()
    yield
    choose._missing.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_numba_eager_runs_and_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose.choose(torch.zeros(2, 3)).name == "eager"
    assert "pip install numba" in batchnorm.kernels.explain(torch.zeros(2, 3))


_BROKEN = """
import torch, batchnorm
from batchnorm.kernels import choose
torch.manual_seed(0)
x, layer = torch.randn(8, 3), batchnorm.BatchNorm1d(3)
assert torch.allclose(layer(x), torch.nn.BatchNorm1d(3)(x), atol=1e-5)
print(batchnorm.kernels.explain(layer))
print(choose._missing("gpu"))
"""


def test_libraries_that_cannot_be_imported_are_done_without(tmp_path: Path) -> None:
    for library, error in (
        ("numba", "ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')"),
        ("triton", "SystemError('no\\ndriver')"),
    ):
        (tmp_path / library).mkdir()
        (tmp_path / library / "__init__.py").write_text(f"raise {error}")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    on_cpu, missing = run_python("-c", _BROKEN, TRITON_INTERPRET="1", PYTHONPATH=path).splitlines()
    assert on_cpu == (
        "eager for BatchNorm1d, float32 inputs on cpu: plain torch operations; the engine for CPUs does not "
        "take anything, as Numba cannot be imported (ImportError: Numba needs NumPy 2.3 or "
        "less. Got NumPy 2.4.)"
    )
    assert missing == "anything, as Triton cannot be imported (SystemError: no driver)"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("engine", ["cpu", "gpu"])
@pytest.mark.parametrize("error", [OSError("no libLLVM"), AttributeError("x"), RuntimeError("a\nb")])
def test_whatever_a_library_raises_is_in_the_reason(
    engine: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(_: str) -> None:
        raise error

    monkeypatch.setattr(choose, "ENGINES", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(importlib, "import_module", import_module)
    said = str(error).replace("\n", " ")
    assert f"cannot be imported ({type(error).__name__}: {said})" in str(choose._missing(engine))


@needs_triton
def test_the_gpu_engine_runs_cpu_tensors_where_it_is_asked_to_and_interpreted() -> None:
    x = torch.zeros(2, 3)
    with batchnorm.kernels.use("gpu"):
        assert (
            batchnorm.kernels.explain(x) == "gpu for float32 [2, 3] on cpu: forced by batchnorm.kernels.use"
        )
    assert choose.choose(x).name == "cpu"


@needs_triton
def test_the_gpu_engine_runs_no_cpu_tensors_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_interprets_triton", lambda: False)
    with batchnorm.kernels.use("gpu"):
        found = choose.choose(torch.zeros(2, 3))
    assert found == ("eager", "plain torch operations; the engine for GPUs does not take tensors on cpu")


@needs_triton
@pytest.mark.parametrize(
    ("x", "obstacle"),
    [
        (torch.zeros(0, 3), "tensors without values"),
        (torch.zeros(2, 3).as_subclass(Tagged), "a Tagged"),
        (torch.zeros(2, 3, dtype=torch.complex64), "torch.complex64"),
    ],
    ids=["empty", "subclass", "dtype"],
)
def test_eager_runs_what_the_gpu_engine_does_not_take(x: torch.Tensor, obstacle: str) -> None:
    with batchnorm.kernels.use("gpu"):
        found = choose.choose(x)
    assert found == ("eager", f"plain torch operations; the engine for GPUs does not take {obstacle}")


def on_cuda(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that says it is on a GPU, whether there is one or not; it has no memory."""
    with FakeTensorMode():
        return torch.empty(shape, device="cuda")


@pytest.mark.usefixtures("fresh")
def test_on_gpus_triton_runs_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    x = on_cuda((2, 3))
    assert choose.choose(x).reason.endswith("the engine for GPUs does not take a FakeTensor")
    monkeypatch.setattr(choose, "type", lambda _: torch.Tensor, raising=False)
    assert batchnorm.kernels.explain(x) == "gpu for float32 [2, 3] on cuda:0: Triton kernels, at every size"
    choose._missing.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert choose.choose(x).name == "eager"
    assert "does not take anything without Triton: pip install triton" in batchnorm.kernels.explain(x)


def test_use_forces_an_engine_within_its_context(spy: list[str]) -> None:
    x = torch.randn(4, 3)
    with batchnorm.kernels.use("spy"):
        assert batchnorm.kernels.explain(x).startswith("spy for float32 [4, 3] on cpu: forced")
        batchnorm.functional.batch_norm(x, None, None, training=True)
        assert spy.count("forward") == 1
    batchnorm.functional.batch_norm(x, None, None, training=True)
    assert spy.count("forward") == 1


@pytest.mark.usefixtures("spy")
def test_use_is_undone_on_error() -> None:
    with pytest.raises(ZeroDivisionError), batchnorm.kernels.use("spy"):
        _ = 1 / 0
    assert batchnorm.kernels.explain(torch.zeros(1)).startswith("cpu")


@pytest.mark.usefixtures("spy")
def test_the_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_ENGINE", "spy")
    choose._environment.cache_clear()
    assert "BATCHNORM_ENGINE=spy" in batchnorm.kernels.explain(torch.zeros(1))
    with batchnorm.kernels.use("eager"):
        assert batchnorm.kernels.explain(torch.zeros(1)).startswith("eager")


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(OptionError, match="asks for the engine 'warp'; there are: eager"),
        batchnorm.kernels.use("warp"),
    ):
        pass
    monkeypatch.setenv("BATCHNORM_ENGINE", "warp")
    choose._environment.cache_clear()
    with pytest.raises(OptionError, match="BATCHNORM_ENGINE asks for the engine 'warp'"):
        batchnorm.kernels.explain(torch.zeros(1))
