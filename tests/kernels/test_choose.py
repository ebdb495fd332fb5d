"""The choice of an engine, its reasons, and the ways to override it."""

from __future__ import annotations

import pytest
import torch

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.kernels import choose


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
    assert text.startswith("eager for float32 [2, 3] on cpu: plain torch operations")


def test_use_forces_an_engine_within_its_context(spy: list[str]) -> None:
    x = torch.randn(4, 3)
    with batchnorm.kernels.use("spy"):
        assert batchnorm.kernels.explain(x).startswith("spy for float32 [4, 3] on cpu: forced")
        batchnorm.functional.batch_norm(x, None, None, training=True)
        assert spy == ["forward"]
    batchnorm.functional.batch_norm(x, None, None, training=True)
    assert spy == ["forward"]


@pytest.mark.usefixtures("spy")
def test_use_is_undone_on_error() -> None:
    with pytest.raises(ZeroDivisionError), batchnorm.kernels.use("spy"):
        _ = 1 / 0
    assert batchnorm.kernels.explain(torch.zeros(1)).startswith("eager")


@pytest.mark.usefixtures("spy")
def test_the_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_ENGINE", "spy")
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
    with pytest.raises(OptionError, match="BATCHNORM_ENGINE asks for the engine 'warp'"):
        batchnorm.kernels.explain(torch.zeros(1))
