"""The engine for GPUs: what the grid of cases does not show. On a GPU, or in Triton's interpreter (slow)."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cases import ACTIVATIONS, Case, Inputs, lay_out
from tests.support.compare import Results, assert_close, reference_results
from tests.support.interpreted import DEVICE, every_combination, interpreting
from tests.support.primitives import Primitives

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from batchnorm.kernels.gpu import engine as gpu
from batchnorm.kernels.gpu import partition
from batchnorm.kernels.gpu.tiles import tile_of
from tests.support.programs import run_python

engine = Primitives(gpu)

EPS = 1e-5
REGIMES = ["single", "whole", "parts"]
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here: the kernels run in Triton's interpreter")


def put(inputs: Inputs) -> Inputs:
    return Inputs(*(None if t is None else t.to(DEVICE) for t in inputs))


def run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return all that a forward and a backward of the engine give."""
    x, weight, bias, residual, dy, mask = put(inputs)
    options = {"residual": residual, "mask": mask, **case.options}
    y, (count, mean, m2), rstd = engine.forward(x, EPS, weight, bias, **options)
    dx, dweight, dbias, dresidual = engine.backward(x, dy, mean, rstd, False, weight, bias, **options)
    found = {"y": y, "count": count, "mean": mean, "m2": m2, "rstd": rstd}
    found |= {"dx": dx, "dweight": dweight, "dbias": dbias}
    return found if dresidual is None else found | {"dresidual": dresidual}


def assert_right(
    case: Case, inputs: Inputs, found: dict[str, Tensor], expected: Results | None = None
) -> None:
    expected = expected or reference_results(case, inputs, eps=EPS)
    var = found["m2"].cpu() / found["count"].cpu().clamp(min=1).unsqueeze(1)
    assert_close(var, expected.var, dtype=torch.float32, scale=1 / (expected.var + EPS), what="var")
    rstd = expected.rstd
    assert_close(found["mean"], expected.mean, dtype=torch.float32, scale=rstd, what="mean")
    assert_close(found["y"], expected.y, dtype=case.dtype, what="y")
    assert_close(found["dx"], expected.dx, dtype=case.dtype, scale=expected.std, what="dx")
    assert_close(found["dweight"], expected.dweight, dtype=torch.float32, what="dweight")
    assert_close(found["dbias"], expected.dbias, dtype=torch.float32, what="dbias")


def regime(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every partition be of one regime: a single tile, several tiles of a program, or parts."""
    sizes = {
        "single": {"_SINGLE": 2**20},
        "whole": {"_SINGLE": 1, "_WHOLE": 2**20, "_ENOUGH": 0, "_TILE": 64, "_LANE": 2**20},
        "parts": {
            "_SINGLE": 1,
            "_WHOLE": 0,
            "_TILE": 64,
            "_LANE": 3,
            "_MERGED": 64,
            "_BLOCK": 4,
            "_PROGRAMS": 8,
        },
    }
    for number, value in sizes[name].items():
        monkeypatch.setattr(partition, number, value)
    partition.partition.cache_clear()


@pytest.fixture(autouse=True)
def plans_anew(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield
    monkeypatch.undo()
    partition.partition.cache_clear()


SHAPES = {
    "planes": Case("planes", (5, 3, 9, 7), residual=True, activation="silu"),
    "rows": Case("rows", (5, 9, 5, 4), "channels_last", masked=True),
    "short": Case("short", (7, 9, 3), residual=True, activation="gelu", group_size=3),
    "flat": Case("flat", (90, 19), offset=1e6),
    "even-planes": Case("even-planes", (8, 3, 16, 16), residual=True, activation="relu", group_size=4),
    "ragged": Case("ragged", (6, 3, 16, 16), group_size=4),
    "even-rows": Case("even-rows", (8, 16, 4, 4), "channels_last", offset=1e6),
}


@every_combination("case, name", list(SHAPES.values()), REGIMES, strength=1)
def test_every_regime_gives_the_same(monkeypatch: pytest.MonkeyPatch, case: Case, name: str) -> None:
    regime(monkeypatch, name)
    inputs = case.make()
    found = partition.partition(inputs.x.shape, inputs.x.stride(), case.group_size)
    assert (found.is_whole, found.tiles == 1) == (name != "parts", name == "single")
    assert found.is_even == case.name.startswith("even")
    first = run(case, inputs)
    assert_right(case, inputs, first)
    for what, again in run(case, inputs).items():  # and bit for bit the same, each time
        assert torch.equal(again, first[what]), what


@every_combination("layout, name", ["contiguous", "channels_last"], REGIMES, strength=1)
def test_row_17_first_values_that_say_nothing_of_the_rest(
    monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    """Zeros and then a million, a masked beginning, outliers: deviations from these alone would cancel."""
    regime(monkeypatch, name)
    plain = Case("misled", (6, 3, 5, 8), layout, offset=1e6)
    zeros, outlier = plain.make(), plain.make()
    zeros.x[:2] = 0.0
    outlier.x[0, :, 0, 0] = -1e9
    masked = Case("misled", (6, 3, 5, 8), layout, offset=1e6, masked=True)
    late = masked.make()
    assert late.mask is not None
    late.mask[:3] = False
    for case, inputs in ((plain, zeros), (plain, outlier), (masked, late)):
        assert_right(case, inputs, run(case, inputs))


@every_combination("scale, name, layout", [1e30, 1e-12], REGIMES, ["contiguous", "channels_last"])
def test_row_18_magnitudes_whose_squares_float32_has_not(
    monkeypatch: pytest.MonkeyPatch, layout: str, name: str, scale: float
) -> None:
    """One channel of them, which has no influence on the others."""
    regime(monkeypatch, name)
    case = Case("huge", (4, 3, 5, 8), layout)
    clean = case.make()
    inputs = case.make()
    inputs.x[:, 1] *= scale
    found, expected = run(case, inputs), reference_results(case, inputs, eps=EPS)
    assert_right(case, inputs, found, expected)
    others = run(case, clean)
    assert torch.equal(found["y"][:, [0, 2]], others["y"][:, [0, 2]])


@every_combination("bad, name", [torch.nan, torch.inf, 3e38], REGIMES, strength=1)
def test_what_is_not_finite_spoils_its_channel_and_no_other(
    monkeypatch: pytest.MonkeyPatch, name: str, bad: float
) -> None:
    regime(monkeypatch, name)
    for shape in ((13, 5), (3, 5, 20)):
        x = torch.randn(shape, device=DEVICE) * 1e-3
        clean = engine.forward(x, EPS)[0]
        x[1, 2] = bad
        y = engine.forward(x, EPS)[0]
        wide = x[:, 2].double().cpu()
        expected = (wide - wide.mean()) / (wide.var(correction=0) + EPS).sqrt()  # all NaN, but for 3e38
        torch.testing.assert_close(y[:, 2].double().cpu(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        others = [0, 1, 3, 4]
        assert torch.equal(y[:, others], clean[:, others])


TINY = [
    Case("two-values-of-a-channel", (2, 3)),
    Case("two-positions", (1, 3, 2)),
    Case("one-value", (1, 3)),
    Case("one-channel", (37, 1)),
    Case("one-channel-of-planes", (3, 1, 17)),
    Case("a-single-number", (1, 1, 1)),
    Case("groups-of-many-blocks", (70, 3), group_size=2),
    Case("row-26-channels-odd-and-many", (3, 4097)),
    Case("row-27-channels-odd-and-last", (2, 131, 2, 2), "channels_last"),
]


@pytest.mark.parametrize("case", TINY, ids=str)
def test_row_26_27_sizes_at_the_edge(case: Case) -> None:
    inputs = case.make()
    assert_right(case, inputs, run(case, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_relu_has_a_slope_just_where_y_is_above_zero(dtype: torch.dtype, layout: str) -> None:
    """The backward finds the forward's z again, bit for bit: dy passes if and only if y > 0."""
    x = lay_out(torch.randn(3, 24, 5, 5).to(dtype), layout).to(DEVICE)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(24, dtype=real, device=DEVICE)
    mean = torch.randn(1, 24, dtype=torch.float64, device=DEVICE)
    rstd = torch.rand(1, 24, dtype=torch.float64, device=DEVICE) + 0.5
    bias = (-(x[0, :, 0, 0].double() - mean[0]) * rstd[0] * weight.double()).to(real)
    weight[1] = bias[1] = 0.0  # z is 0, where relu has no slope
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    for scale in (1.0, 1e-6):  # in the narrow dtypes, small z round to 0
        small = (weight * scale, bias * scale)
        y = engine.normalize(x, mean, rstd, *small, activation="relu")
        slopes = (one, zero, zero)
        dx, _ = engine.backward_apply(x, torch.ones_like(x), mean, rstd, slopes, *small, activation="relu")
        assert torch.equal(dx, (y > 0).to(dtype))
    assert 0 < (y == 0).sum() < y.numel()


@every_combination("dtype, name", [torch.float32, torch.bfloat16], REGIMES, strength=1)
def test_normalize_gives_the_output_of_forward_again(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    """Bit for bit: `lean` recomputes outputs so."""
    regime(monkeypatch, name)
    for number, activation in enumerate((None, *ACTIVATIONS)):
        layout = ("contiguous", "channels_last", "strided")[number % 3]
        case = Case("again", (4, 5, 3, 6), layout, dtype, residual=number % 2 == 0, activation=activation)
        x, weight, bias, residual, _, mask = put(case.make())
        options = {"residual": residual, "mask": mask, **case.options}
        y, found, rstd = engine.forward(x, EPS, weight, bias, **options)
        again = engine.normalize(x, found.mean, rstd, weight, bias, **options)
        assert torch.equal(again, y), activation
        assert again.stride() == y.stride()


@pytest.mark.one_in(3)
@every_combination("layout, name", ["contiguous", "channels_last", "strided"], REGIMES, strength=1)
def test_the_activation_mask_stands_for_bias_and_residual(
    monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    """Bit for bit the same gradients, from one bit per value that either half of a forward has written."""
    regime(monkeypatch, name)
    case = Case(
        "activation_mask", (7, 5, 9, 8), layout, residual=True, activation="relu6", masked=True, group_size=3
    )
    x, weight, bias, residual, dy, mask = put(case.make())
    options = {"mask": mask, "group_size": 3, "activation": "relu6"}
    _, found, rstd = engine.forward(x, EPS, weight, bias, residual=residual, **options)
    statistics = (found.mean, rstd)
    tensors = (x, dy, *statistics, False, weight)
    expected = engine.backward(*tensors, bias, residual=residual, **options)
    for half in ("forward", "normalize"):
        activation_mask = engine.activation_mask(x, "relu6", 3)
        given = (EPS,) if half == "forward" else statistics
        getattr(engine, half)(
            x, *given, weight, bias, residual=residual, activation_mask=activation_mask, **options
        )
        for ours, theirs in zip(
            engine.backward(*tensors, activation_mask=activation_mask, **options), expected, strict=True
        ):
            assert torch.equal(ours, theirs)


with interpreting():

    @triton.jit
    def write_offsets(
        found, tile, group, channel, channels, positions, units, group_units, ROWS: tl.constexpr
    ):
        """Write the offsets of a tile of 4 x 8 values, and whether they are in the tensor."""
        at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
        channel = channel + tl.arange(0, 8)[None, :] if ROWS else channel
        number = tl.load(tile)
        program = (tl.load(group), channel, None, (channels, positions, units, group_units))
        offsets, inside, _ = tile_of(number, program, ROWS, 4, 8, False)
        tl.store(found + at, offsets)
        tl.store(found + 32 + at, inside.to(tl.int64))


@pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
def test_row_26_addresses_of_more_than_2_to_the_31_values(rows: bool) -> None:
    """A tile near the end of a tensor of 2**33 values: its addresses, against Python's own numbers."""
    channels, positions, units, group_units = (
        (1000, 1, 9_000_000, 4_000_000) if rows else (3, 2**20 + 5, 2731, 1000)
    )
    group, tile = (2, 249_998) if rows else (2, (2730 - 2000) // 4 * 131_073 + 131_072)
    wide = {"dtype": torch.int64, "device": DEVICE}
    found, numbers = torch.empty(64, **wide), [torch.tensor([n], **wide) for n in (tile, group)]
    write_offsets[(1,)](found, *numbers, 992 if rows else 2, channels, positions, units, group_units, rows)
    first = group * group_units
    for row in range(4):
        for column in range(8):
            if rows:
                unit, position, channel = first + tile * 4 + row, 0, 992 + column
            else:
                blocks = -(-positions // 8)
                unit, position = first + tile // blocks * 4 + row, tile % blocks * 8 + column
                channel = 2
            inside = unit < units and position < positions and channel < channels
            offset = unit * channels + channel if rows else (unit * channels + channel) * positions + position
            assert found[row * 8 + column] == offset
            assert found[32 + row * 8 + column] == inside
    assert found[0] > 2**31


@on_a_gpu
def test_row_26_a_tensor_of_more_than_2_to_the_31_values() -> None:
    shape = (1100, 2, 1000, 1000)
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("too little free memory on this GPU")
    x = torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    x[1:] = -1
    _, found, _ = engine.forward(x, EPS)
    mean = 2 / shape[0] - 1
    assert found.mean.flatten().tolist() == pytest.approx([mean, mean])
    assert (found.m2 / found.count).flatten().tolist() == pytest.approx([1 - mean**2] * 2)


def test_row_26_the_plan_fills_a_device_and_fits_its_registers() -> None:
    """Tiny to huge: enough programs where there is enough to do, and no tile that is too large."""
    for shape in ((2, 1), (100_000, 3), (64, 64, 56, 56), (256, 2048, 7, 7), (8192, 4096), (3, 1, 2**30)):
        strides = {torch.empty(shape, device="meta").stride()}
        if len(shape) == 4:
            like = torch.empty(shape, device="meta").to(memory_format=torch.channels_last)
            strides.add(like.stride())
        for stride in strides:
            found = partition.partition(shape, stride, None)
            values = found.outer * found.inner
            assert values <= max(partition._SINGLE, partition._TILE)
            assert values // (found.warps * 32) <= 16
            assert found.part_tiles <= partition._LANE
            assert found.parts * found.part_tiles >= found.tiles
            programs = found.channel_tiles * (1 if found.is_whole else found.parts)
            assert programs >= min(128, math.prod(shape) // partition._TILE)


BEHIND_TENSORFLOW = """
import sys
import torch, tensorflow
flags = sys.getdlopenflags()
import batchnorm
from batchnorm import kernels
layer = batchnorm.BatchNorm1d(3, activation="relu")
with torch.no_grad():
    layer.weight.uniform_(0.5, 1.5)
    layer.bias.normal_()
x = torch.randn(5, 3)
with kernels.use("gpu"):
    print(kernels.explain(x))
    y = layer(x)
with kernels.use("eager"):
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
assert sys.getdlopenflags() == flags
twice = tensorflow.function(lambda a: tensorflow.exp(a) @ a, jit_compile=True)  # by its own LLVM
assert twice(tensorflow.ones((2, 2))).shape == (2, 2)
"""


@pytest.mark.slow
def test_row_74_triton_loads_behind_tensorflow() -> None:
    """Row 74: TensorFlow's LLVM is global, and Triton's library took it for its own: the process ended."""
    if importlib.util.find_spec("tensorflow") is None:  # not imported here, which would be in the others' way
        pytest.skip("TensorFlow, of the group test, is not there")
    # Without the variable, as TensorFlow imports Keras, and on torch that imports Triton.
    printed = run_python("-c", BEHIND_TENSORFLOW, TRITON_INTERPRET="1", KERAS_BACKEND=None)
    assert printed.startswith("gpu for float32 [5, 3] on cpu")


COMPILING = "tests.kernels.compile_for_gpu"
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_a_gpu_where_there_is_none(steps: str, tmp_path: Path) -> None:
    """By Triton's compiler, to machine code: what the interpreter lets pass, the compiler may not."""
    kernels = run_python("-m", COMPILING, steps, cwd=ROOT, TRITON_CACHE_DIR=tmp_path)
    assert set(kernels.split()) == {
        "add_groups",
        "backward_whole",
        "differentiate",
        "forward_whole",
        "measure_parts",
        "merge_moments",
        "merge_sums",
        "move_running",
        "normalize",
        "sum_parts",
        "take_running",
    }
