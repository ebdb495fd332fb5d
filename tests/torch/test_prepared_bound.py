"""However many shapes come, a bounded number of prepared launches is kept, and each call is right."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import functional
from batchnorm.kernels.cpu import engine
from batchnorm.kernels.cpu import prepared_launch as prepared
from tests.support.compare import assert_close


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: stock's small calls take ten times as long with two on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_calls(number: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield an input, a cotangent, a weight and a bias of many small shapes."""
    draw = random.Random(seed)
    for _ in range(number):
        shape = [draw.randint(2, 9), *(draw.randint(1, most) for most in (40, 9, 9))]
        shape = shape[: draw.choice((2, 3, 4, 4, 4, 4))]
        x, dy = torch.randn(2, *shape).unbind()
        yield x + 1, dy, *torch.randn(2, shape[1]).unbind()


def gradients_of(normalize: Callable[..., Tensor], dy: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of a function of input, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = normalize(leaves[0], None, None, *leaves[1:], training=True)
    names = ("y", "dx", "dweight", "dbias")
    return dict(zip(names, (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def assert_function_is_exact(x: Tensor, *others: Tensor, found: dict[str, Tensor]) -> None:
    """Raise unless output and gradients are those of the stock function in float64."""
    x = x.double()
    expected = gradients_of(F.batch_norm, others[0].double(), x, *(t.double() for t in others[1:]))
    dims = (0, *range(2, x.dim()))
    std = (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()
    for name, theirs in expected.items():
        scale = std if name == "dx" else 1.0
        assert_close(found[name], theirs, dtype=torch.float32, scale=scale, what=f"{name} {list(x.shape)}")


def test_launches_that_had_to_go_are_prepared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than are kept, each of them twice."""
    few = functools.lru_cache(maxsize=8)(prepared.prepare.__wrapped__)
    monkeypatch.setattr(prepared, "prepare", few)
    monkeypatch.setattr(engine, "prepare", few)
    for _ in range(2):
        for x, dy, *parameters in random_calls(150, seed=0):
            found = gradients_of(functional.batch_norm, dy, x, *parameters)
            assert_function_is_exact(x, dy, *parameters, found=found)
    info = few.cache_info()
    assert info.currsize == info.maxsize == 8
    assert info.misses > 400


def resident() -> int:
    """Return the bytes of memory that this process has, or 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.mark.slow
def test_any_number_of_shapes_takes_bounded_memory() -> None:
    """As much as the first thousands take, which are more than are kept."""
    before = 0
    for number, (x, dy, *parameters) in enumerate(random_calls(20_000, seed=1)):
        found = gradients_of(functional.batch_norm, dy, x, *parameters)
        if number % 20 == 0:
            assert_function_is_exact(x, dy, *parameters, found=found)
        if number == 5000:
            before = resident()
    info = prepared.prepare.cache_info()
    assert info.maxsize is not None
    assert info.currsize == info.maxsize
    assert resident() - before < 2**23
