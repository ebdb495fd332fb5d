"""The engine for CPUs: what the grid of cases does not show."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm.kernels.cpu import engine as cpu
from batchnorm.kernels.cpu import huge_pages, jit, parallel
from batchnorm.kernels.cpu.partition import partition
from batchnorm.kernels.cpu.prepared_launch import prepare
from tests.support.cases import Case
from tests.support.compare import assert_close, reference_results
from tests.support.primitives import Primitives
from tests.support.programs import run_python

engine = Primitives(cpu)

LARGE = (16, 24, 40, 36)  # of 552,960 values: on threads, and written past the caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "short"])
def test_relu_has_a_slope_just_where_y_is_above_zero(dtype: torch.dtype, layout: str) -> None:
    """The backward finds the forward's z again, bit for bit: dy passes if and only if y > 0."""
    x = torch.randn((8, 24, 7, 7) if layout == "short" else (8, 24, 20, 17)).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(24).to(torch.float64 if dtype == torch.float64 else torch.float32)
    # Values next to 0, where the sign of z hangs on its last bit: each channel's bias puts one of them there.
    mean, rstd = torch.randn(1, 24, dtype=torch.float64), torch.rand(1, 24, dtype=torch.float64) + 0.5
    bias = -(x[0, :, 0, 0].double() - mean[0]) * rstd[0] * weight.double()
    bias = bias.to(weight.dtype)
    weight[1] = bias[1] = 0.0  # z is 0, where relu has no slope
    one, zero = torch.ones(1, 24, dtype=torch.float64), torch.zeros(1, 24, dtype=torch.float64)
    for scale in (1.0, 1e-6):  # in the narrow dtypes, small z round to 0
        small = (weight * scale, bias * scale)
        y = engine.normalize(x, mean, rstd, *small, activation="relu")
        dx, _ = engine.backward_apply(
            x, torch.ones_like(x), mean, rstd, (one, zero, zero), *small, activation="relu"
        )
        assert torch.equal(dx, (y > 0).to(dtype))
    assert 0 < (y == 0).sum() < y.numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(13, 5), (3, 5, 7, 9), (4, 6, 20, 17)], ids=str)
def test_row_18_huge_magnitudes_do_not_overflow(shape: tuple[int, ...], layout: str) -> None:
    case = Case("huge", shape, layout)
    x, weight, bias, _, dy, _ = case.make()
    x = x * 1e30
    expected = reference_results(case, case.make()._replace(x=x))
    y, found, rstd = engine.forward(x, 1e-5, weight, bias)
    assert_close(y, expected.y, dtype=torch.float32, what="y")
    assert_close(found.mean, expected.mean, dtype=torch.float32, scale=expected.rstd, what="mean")
    dx, dweight, dbias, _ = engine.backward(x, dy, found.mean, rstd, False, weight, bias)
    assert_close(dx, expected.dx, dtype=torch.float32, scale=expected.std, what="dx")
    assert_close(dbias, expected.dbias, dtype=torch.float32, what="dbias")
    assert_close(dweight, expected.dweight, dtype=torch.float32, what="dweight")


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(600, 131), (2, 67, 6, 6)], ids=str)
def test_columns_that_stay_in_the_cache(shape: tuple[int, ...], masked: bool) -> None:
    """Blocks of columns of moderate length are one task each, which reads them twice."""
    case = Case("columns", shape, "channels_last", masked=masked, residual=True, activation="relu")
    inputs = case.make()
    assert partition(shape, inputs.x.stride(), masked, None).parts == 1
    expected = reference_results(case, inputs)
    x, weight, bias, residual, dy, mask = inputs
    options = {"residual": residual, "activation": "relu", "mask": mask}
    y, found, rstd = engine.forward(x, 1e-5, weight, bias, **options)
    assert_close(y, expected.y, dtype=torch.float32, what="y")
    dx, dweight, dbias, dresidual = engine.backward(x, dy, found.mean, rstd, False, weight, bias, **options)
    assert_close(dx, expected.dx, dtype=torch.float32, scale=expected.std, what="dx")
    assert_close(dweight, expected.dweight, dtype=torch.float32, what="dweight")
    assert_close(dbias, expected.dbias, dtype=torch.float32, what="dbias")
    assert_close(dresidual, expected.dresidual, dtype=torch.float32, what="dresidual")


def test_an_outlier_costs_the_variance_no_accuracy() -> None:
    """The first values of a channel say nothing about the others: deviations from them would cancel."""
    for layout in ("contiguous", "channels_last"):
        case = Case("outlier", (8, 20, 40, 36), layout)
        inputs = case.make()
        inputs.x[0, :, 0, 0] = 1e6
        inputs.x[1] += 1e4
        expected = reference_results(case, inputs)
        y, found, _ = engine.forward(inputs.x, 1e-5, inputs.weight, inputs.bias)
        assert_close(y, expected.y, dtype=torch.float32, what="y")
        assert_close(
            found.m2[0] / found.count,
            expected.var[0],
            dtype=torch.float32,
            what="var",
            scale=expected.rstd[0] ** 2,
        )


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((4, 6, 20, 17), "contiguous"), ((4, 6, 20, 17), "channels_last"), ((90, 5), "contiguous")],
)
def test_a_first_guess_far_off_is_found_out(shape: tuple[int, ...], layout: str) -> None:
    """The first values are masked, so that the mean is guessed as 0, a million standard deviations away."""
    case = Case("guess", shape, layout, offset=1e6, masked=True)
    inputs = case.make()
    mask = inputs.mask
    assert mask is not None
    mask[: 60 if len(shape) == 2 else 2] = False
    expected = reference_results(case, inputs)
    y, found, _ = engine.forward(inputs.x, 1e-5, inputs.weight, inputs.bias, mask=mask)
    assert_close(y, expected.y, dtype=torch.float32, what="y")
    assert_close(
        found.m2[0] / found.count,
        expected.var[0],
        dtype=torch.float32,
        what="var",
        scale=expected.rstd[0] ** 2,
    )


def test_rows_that_do_not_begin_a_cache_line_are_not_streamed_to() -> None:
    """Streaming to any other address would end the process."""
    case = Case("rows", (8200, 67), residual=True, activation="relu")
    inputs = case.make()
    x, weight, bias, residual, dy, _ = inputs
    expected = reference_results(case, inputs)
    y, found, rstd = engine.forward(x, 1e-5, weight, bias, residual=residual, activation="relu")
    assert_close(y, expected.y, dtype=torch.float32, what="y")
    dx, _, _, dresidual = engine.backward(
        x, dy, found.mean, rstd, False, weight, bias, residual=residual, activation="relu"
    )
    assert_close(dx, expected.dx, dtype=torch.float32, scale=expected.std, what="dx")
    assert_close(dresidual, expected.dresidual, dtype=torch.float32, what="dresidual")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_what_is_huge_or_not_finite_spoils_its_channel_and_no_other(bad: float) -> None:
    for shape in ((13, 5), (3, 5, 20, 17), (8, 5, 6, 6)):
        x = torch.randn(shape) * 1e-3
        clean = engine.forward(x, 1e-5)[0]
        x[1, 2] = bad
        y = engine.forward(x, 1e-5)[0]
        wide = x[:, 2].double()
        expected = (wide - wide.mean()) / (wide.var(correction=0) + 1e-5).sqrt()  # all NaN, but for 3e38
        torch.testing.assert_close(y[:, 2].double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        others = [0, 1, 3, 4]
        assert torch.equal(y[:, others], clean[:, others])


def step(x: Tensor) -> tuple[Tensor, ...]:
    y, found, rstd = engine.forward(x, 1e-5, activation="relu")
    dx, *sums, _ = engine.backward(x, y, found.mean, rstd, False, activation="relu")
    return y, dx, *sums


def test_several_python_threads_at_a_time() -> None:
    xs = [torch.randn(LARGE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [step(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(step, xs), expected, strict=True):
                assert all(map(torch.equal, found, wanted))


def test_threads_of_our_own_where_torch_has_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(LARGE)
    expected = step(x)
    monkeypatch.setattr(parallel, "_on_threads", lambda: parallel._on_threads_of_our_own)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(map(torch.equal, step(x), expected))


def test_row_25_on_linux_the_threads_are_torchs() -> None:
    """Evaluation too: one thread per core, and no second pool beside torch's."""
    if sys.platform.startswith("linux"):
        assert parallel._on_threads() is not parallel._on_threads_of_our_own


def test_torchs_number_of_threads_is_followed_and_left() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            step(torch.randn(LARGE))
            seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2]


CHILD = """
import os, sys, numpy, torch
import batchnorm
layer, x = batchnorm.BatchNorm2d(24), torch.randn(16, 24, 40, 36)
torch.set_num_threads(2)
expected = layer(x).detach().numpy()  # the parent has woken its threads
child = os.fork()
if child == 0:  # by NumPy: torch's own operators wait there for the parent's threads
    os._exit(0 if numpy.array_equal(layer(x).detach().numpy(), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_too() -> None:
    run_python("-c", CHILD)


COLD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from batchnorm.kernels.cpu.jit import kernel
assert kernel("groups_backward", torch.float32, True)  # the smallest: it compiles in a moment
"""


def run_cold(folder: Path, before: str = "") -> str:
    return run_python("-c", before + COLD, NUMBA_CACHE_DIR=folder)


@pytest.mark.slow
def test_the_first_process_compiles_and_says_so_and_the_second_does_not(tmp_path: Path) -> None:
    assert run_cold(tmp_path).count("compiling the kernels") == 1
    assert "compiling" not in run_cold(tmp_path)


def test_without_a_folder_that_can_be_written_to_every_process_compiles(tmp_path: Path) -> None:
    no_folder = "from numba.core import caching\ncaching.CacheImpl._locator_classes = []\n"
    assert "compiling the kernels" in run_cold(tmp_path, no_folder)
    assert list(tmp_path.iterdir()) == []


DAMAGED = """
import os, pathlib, torch
from batchnorm.kernels.cpu import jit
from numba.core.ccallback import CFunc

calls, compile_uncached = [], CFunc._compile_uncached

def counted(self):
    calls.append(self)
    return compile_uncached(self)

CFunc._compile_uncached = counted

def compiles():
    calls.clear()
    jit.kernel.cache_clear()
    assert jit.kernel("groups_backward", torch.float32, True)
    return bool(calls)

folder = pathlib.Path(os.environ["NUMBA_CACHE_DIR"])
assert compiles() and not compiles()
files = sorted(path for path in folder.rglob("*.nb?"))
assert [path.suffix for path in files] == [".nbc", ".nbi"], files
whole = [path.read_bytes() for path in files]
damages = {
    "empty": lambda old: b"",
    "a byte": lambda old: b"x",
    "truncated": lambda old: old[:-7],
    "zeroed": lambda old: bytes(len(old)),
    "zeroed in part": lambda old: old[:40] + bytes(40) + old[80:],
    "garbage": lambda old: bytes(range(256)) * 9,
    "a bit": lambda old: old[: len(old) // 2] + bytes([old[len(old) // 2] ^ 4]) + old[len(old) // 2 + 1 :],
    "longer": lambda old: old + b"more",
    "of Numba alone": lambda old: old[:-32],
}
for name, damage in damages.items():
    for path, old in zip(files, whole):
        path.write_bytes(damage(old))
        assert compiles(), (name, path.suffix)
        assert not compiles(), (name, path.suffix, "stays damaged")
        for file, content in zip(files, whole):
            file.write_bytes(content)
files[0].unlink()
assert compiles() and not compiles()
"""


def test_damaged_files_on_disk_are_compiled_again_and_mended(tmp_path: Path) -> None:
    run_python("-c", DAMAGED, NUMBA_CACHE_DIR=tmp_path)


def test_kernels_on_disk_are_those_of_this_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that changes with the text of any kernel is part of what Numba looks up."""
    before = jit.source()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path.name == "rows.py"))
    jit.source.cache_clear()
    assert jit.source() != before
    monkeypatch.undo()
    jit.source.cache_clear()


def test_large_outputs_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *call: asked.append(call))
    huge_pages.empty_like(torch.empty(2**19))
    assert asked == []
    y = huge_pages.empty_like(torch.empty(2**21))
    ((start, size, advice),) = asked
    assert (start % 2**21, size % 2**21, advice) == (0, 0, 14)
    assert y.data_ptr() <= start
    assert start + size <= y.data_ptr() + y.numel() * 4
    monkeypatch.setattr(huge_pages, "_madvise", lambda: None)
    assert huge_pages.empty_like(torch.empty(2**21)).shape == (2**21,)


def test_the_layer_runs_on_it_by_default(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    layer = batchnorm.BatchNorm2d(24, activation="relu")
    x = torch.randn(LARGE, requires_grad=True)
    y = layer(x)
    dy = torch.randn(LARGE)
    (dx,) = torch.autograd.grad(y, [x], dy)
    expected, found, rstd = engine.forward(
        x.detach(), layer.eps, layer.weight.detach(), layer.bias.detach(), activation="relu"
    )
    assert torch.equal(y, expected)
    again, *_ = engine.backward(
        x.detach(), dy, found.mean, rstd, False, layer.weight.detach(), layer.bias.detach(), activation="relu"
    )
    assert torch.equal(dx, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_rounded_to_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    x = torch.randn(4096, 8).to(dtype)
    x[:3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    weight = 1 + torch.arange(1, 9) * 2.0**-9  # exact products in float32, of which many are ties
    zero, one = torch.zeros(1, 8, dtype=torch.float64), torch.ones(1, 8, dtype=torch.float64)
    y = engine.normalize(x, zero, one, weight)
    expected = (x.float() * weight).to(dtype)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    exact = x.double() * weight
    halfway = (exact - expected.double()).abs() == (
        exact - torch.nextafter(expected, y.new_full((), 9)).double()
    ).abs()
    assert halfway.sum() > 30


def test_a_nan_of_any_bits_stays_one_in_bfloat16() -> None:
    """Rounding adds to the bits; of a NaN whose bits are all set that would make a small number."""
    x = torch.randn(6, 3).bfloat16()
    weight = torch.tensor([-1, 0x7FFFFFFF, 0x3F800000], dtype=torch.int32).view(torch.float32)
    y, *_ = engine.forward(x, 1e-5, weight)
    assert y.isnan().all(0).tolist() == [True, True, False]


@pytest.mark.parametrize("what", ["forward", "backward", "evaluate", "normalize"])
@pytest.mark.parametrize("layout", ["planes", "short planes", "channels-last", "[N, C]"])
def test_large_calls_run_on_threads_and_in_huge_pages_in_every_layout(layout: str, what: Any) -> None:
    shape = {"short planes": (32, 1024, 14, 14), "[N, C]": (4096, 1024)}.get(layout, (32, 64, 56, 56))
    x = torch.empty(shape)
    if layout == "channels-last":
        x = x.to(memory_format=torch.channels_last)
    launch = prepare(x.shape, x.stride(), x.dtype, False, None, None, what)
    assert (launch.is_small, launch.is_huge) == (False, True)
    tiny = prepare((4, 8), (8, 1), x.dtype, False, None, None, what)
    assert (tiny.is_small, tiny.is_huge) == (True, False)
