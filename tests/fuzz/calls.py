"""Descriptions of one call, in plain numbers that hypothesis draws; its tensors follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import batchnorm
from batchnorm.statistics.policy import Policy
from tests.support.cases import ACTIVATIONS
from tests.torch.twins import relaid

KINDS = {1: batchnorm.BatchNorm1d, 2: batchnorm.BatchNorm2d, 3: batchnorm.BatchNorm3d}
RANKS = {1: (2, 3), 2: (4,), 3: (5,)}
HALVES = (torch.float16, torch.bfloat16)

VALUES = ("normal", "offset", "huge", "tiny", "denormal", "constant", "mixed", "inf", "nan")
MASKS = ("none", "random", "all", "one", "no", "shape", "channels", "dtype", "device")
LENGTHS = ("none", "fitting", "negative", "long", "count", "dtype")
RESIDUALS = ("none", "fitting", "other dtype", "broadcasts", "dtype", "device")


@dataclass(frozen=True)
class Call:
    """One call of a layer or a function.

    Attributes:
        kind: dimensions of the layer, 1 to 3.
        shape: of x.
        channels: that the layer has.
        dtype: of x; `parameter_dtype` of weight and bias.
        layout: of x and the residual.
        values: what kind of numbers x has; others are near 1.
        mask, lengths, residual: what kind of these; some do not fit.
        past: batches that the layer has seen.
        seed: of everything random.
    """

    kind: int
    shape: tuple[int, ...]
    channels: int
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    layout: str
    values: str
    affine: bool
    bias: bool
    tracked: bool
    training: bool
    eps: float
    momentum: float | None
    is_momentum_a_tensor: bool
    policy: Policy
    activation: str | None
    nonfinite: str
    small_batch: str
    mask: str
    lengths: str
    residual: str
    past: int
    engine: str
    seed: int

    @property
    def momentum_used(self) -> float | None:
        """Return the number that momentum is: a tensor of it is float32."""
        if self.momentum is None or not self.is_momentum_a_tensor:
            return self.momentum
        return float(torch.tensor(self.momentum))

    @property
    def wide(self) -> torch.dtype:
        """Return the dtype that running statistics have."""
        return torch.promote_types(self.parameter_dtype, torch.float32)


@st.composite
def shapes(draw: st.DrawFn, rank: int) -> tuple[int, ...]:
    """Draw a shape: odd sizes, ones and empty ones; now and then one of several thousand values."""
    if rank < 2:
        return tuple(draw(st.integers(0, 5)) for _ in range(rank))
    samples = draw(st.sampled_from((0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 13, 33)))
    channels = draw(st.sampled_from((1, 1, 2, 3, 3, 5, 8, 17, 0)))
    sizes = [draw(st.sampled_from((1, 1, 2, 3, 4, 5, 7, 0))) for _ in range(rank - 2)]
    if rank == 4 and draw(st.integers(0, 24)) == 24:
        sizes = [33, 35]
    return (samples, channels, *sizes)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Draw a policy with random fields."""
    name = draw(
        st.sampled_from(
            ("Batch", "Batch", "Ghost", "Ghost", "Renorm", "Renorm", "Running", "Adapted", "Synced")
        )
    )
    if name == "Ghost":
        return batchnorm.Ghost(draw(st.sampled_from((1, 2, 2, 3, 4, 7, 64))), draw(st.booleans()))
    if name == "Renorm":
        starts, spans = st.sampled_from((0, 0, 2, 5)), st.sampled_from((0, 0, 3, 7))
        steps = [(start := draw(starts), start + draw(spans)) for _ in range(2)]
        r_max, d_max = (
            draw(st.sampled_from((1.0, 1.1, 3.0, 1e3))),
            draw(st.sampled_from((0.0, 0.3, 5.0, 1e3))),
        )
        return batchnorm.Renorm(r_max, d_max, *steps)
    if name == "Adapted":
        return batchnorm.Adapted(draw(st.sampled_from((0.0, 0.5, 16.0, 1e6))))
    if name == "Synced":
        over = draw(policies().filter(lambda p: not isinstance(p, batchnorm.Running | batchnorm.Synced)))
        return batchnorm.Synced(over=over)
    return getattr(batchnorm, name)()


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draw a call; most of its parts fit together, and some do not."""
    seldom = st.integers(0, 19).map(lambda n: n == 19)
    kind = draw(st.sampled_from((1, 1, 2, 2, 3)))
    rank = draw(st.integers(0, 5)) if draw(seldom) else draw(st.sampled_from(RANKS[kind]))
    shape = draw(shapes(rank))
    fitting = shape[1] if rank > 1 else 3
    dtypes = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    dtype = draw(st.sampled_from(dtypes))
    parameters = (dtype, torch.float32) if dtype in HALVES else (dtype,)
    any_of = {"mask": MASKS, "residual": RESIDUALS, "lengths": LENGTHS}
    usual = {"mask": MASKS[:5], "residual": RESIDUALS[:3], "lengths": LENGTHS[:2]}
    odd = {name: draw(st.sampled_from((any_of if draw(seldom) else usual)[name])) for name in any_of}
    if odd["lengths"] == "fitting" and not (draw(seldom) or (rank == 3 and odd["mask"] == "none")):
        odd["lengths"] = "none"
    tracked = draw(st.sampled_from((True, True, True, False)))
    fits = tracked or draw(seldom)  # options that need running statistics
    return Call(
        kind,
        shape,
        fitting + draw(st.sampled_from((1, 2))) if draw(seldom) else fitting,
        torch.int64 if draw(seldom) and draw(seldom) else dtype,
        draw(st.sampled_from(dtypes if draw(seldom) else parameters)),
        draw(st.sampled_from(("contiguous", "channels_last", "strided", "expanded", "batch_last"))),
        draw(st.sampled_from(VALUES)),
        draw(st.booleans()),
        draw(st.booleans()),
        tracked,
        draw(st.sampled_from((True, True, False))),
        draw(st.sampled_from((0.0, -1e-5) if draw(seldom) else (1e-5, 1e-3, 1e-12, 1e-30, 1.0, 1e8))),
        draw(st.sampled_from((0.1, 0.0, 1.0, 0.3, None))),
        draw(seldom),
        draw(policies()),
        draw(st.sampled_from(("swish", "", "ReLU") if draw(seldom) else (None, None, *ACTIVATIONS))),
        draw(st.sampled_from(("propagate", "propagate", "raise", *(("skip",) if fits else ())))),
        draw(st.sampled_from(("raise", "running") if fits else ("raise",))),
        **odd,
        past=draw(st.sampled_from((0, 1, 3, 6, 10**9))),
        engine=draw(st.sampled_from(("cpu", "cpu", "eager"))),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass(frozen=True)
class Tensors:
    """The tensors of a call; the mask is there too where lengths stand for it."""

    x: Tensor
    residual: Any
    mask: Any
    lengths: Any
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    dy: Tensor


def tensors_of(call: Call) -> Tensors:
    """Return the tensors; the same ones for the same call."""
    generator = torch.Generator().manual_seed(call.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(values: Tensor) -> Tensor:
        if call.layout == "expanded" and call.dtype.is_floating_point and values.dim():
            # Along the last axis: the first value stands for all.
            return values[..., :1].expand(values.shape)
        return relaid(values, call.layout) if values.dim() > 1 and call.layout != "expanded" else values

    x = placed(_values(call, normal(*call.shape)).to(call.dtype))
    residual = placed(normal(*call.shape).to(call.dtype))
    mask, lengths = _mask(call, generator), _lengths(call, generator)
    applies = mask if lengths is None else _of_lengths(call, lengths)
    if (
        applies is not None
        and applies.is_cpu
        and x.dim() > 1
        and applies.shape == (*call.shape[:1], *call.shape[2:])
    ):
        x, residual = (_with_garbage(call, t, applies.bool()) for t in (x, residual))
    return Tensors(
        x,
        _residual(call, residual),
        mask,
        lengths,
        normal(call.channels).to(call.parameter_dtype) if call.affine else None,
        normal(call.channels).to(call.parameter_dtype) if call.affine and call.bias else None,
        normal(call.channels).to(call.wide),
        normal(call.channels).exp().to(call.wide),
        normal(*call.shape),
    )


def _values(call: Call, noise: Tensor) -> Tensor:
    """Return x in float64 out of noise."""
    largest = torch.finfo(call.dtype).max if call.dtype.is_floating_point else 100.0
    smallest = torch.finfo(call.dtype).tiny if call.dtype.is_floating_point else 1.0
    channel = torch.arange(noise.shape[1] if noise.dim() > 1 else 1).view(1, -1, *[1] * (noise.dim() - 2))
    scale = {"huge": min(1e30, largest / 16), "tiny": max(1e-30, smallest * 16), "denormal": smallest / 64}
    if call.values in scale:
        return noise * scale[call.values]
    if call.values == "offset":
        return noise + {torch.float16: 1e3, torch.bfloat16: 1e2}.get(call.dtype, 1e6)
    if call.values == "constant" and noise.dim() > 1:
        return (noise * 0 + torch.tensor([0.1, -1234.5, 0.0])[channel % 3]).double()
    if call.values == "mixed" and noise.dim() > 1:  # by channel
        return noise * torch.tensor([1.0, 1e4, 1e-4])[channel % 3] + torch.tensor([0.0, 30.0])[channel % 2]
    if call.values in ("inf", "nan") and noise.numel():
        noise.view(-1)[call.seed % noise.numel()] = float(call.values) * (1 if call.seed % 2 else -1)
    return noise


def _mask(call: Call, generator: torch.Generator) -> Tensor | None:
    shape = (*call.shape[:1], *call.shape[2:])
    if call.mask == "none":
        return None
    if call.mask in ("shape", "channels"):
        wrong = call.shape if call.mask == "channels" else (*shape, 1)
        return torch.ones(wrong, dtype=torch.bool)
    if call.mask == "dtype":
        return torch.ones(shape)
    if call.mask == "device":
        return torch.ones(shape, dtype=torch.bool, device="meta")
    if call.mask == "all":
        return torch.ones(shape, dtype=torch.bool)
    mask = torch.zeros(shape, dtype=torch.bool)
    if call.mask == "one" and mask.numel():
        mask.view(-1)[call.seed % mask.numel()] = True
    if call.mask == "random":
        mask = torch.rand(shape, generator=generator) > torch.rand((), generator=generator)
    return mask


def _lengths(call: Call, generator: torch.Generator) -> Tensor | None:
    if call.lengths == "none":
        return None
    samples = call.shape[0] if call.shape else 1
    most = call.shape[2] if len(call.shape) > 2 else 4
    lengths = torch.randint(0, most + 1, (samples,), generator=generator)
    if call.lengths in ("negative", "long") and samples:
        lengths[-1] = -1 if call.lengths == "negative" else most + 1
    if call.lengths == "count":
        return torch.cat([lengths, lengths[:1], torch.ones(1, dtype=torch.int64)])
    return lengths.float() if call.lengths == "dtype" else lengths


def _residual(call: Call, fitting: Tensor) -> Tensor | None:
    if call.residual == "other dtype":
        return fitting.to(torch.float64 if call.dtype is torch.float32 else torch.float32)
    return {
        "none": None,
        "fitting": fitting,
        "broadcasts": fitting[:1, ..., None] if fitting.dim() else fitting[None],
        "dtype": fitting.nan_to_num(0, 0, 0).to(torch.int32),
        "device": fitting.to("meta"),
    }[call.residual]


def _with_garbage(call: Call, values: Tensor, mask: Tensor) -> Tensor:
    """Return the values with what must have no influence where the mask is False."""
    if not call.dtype.is_floating_point:
        return values
    garbage = (math.nan, math.inf, float(torch.finfo(call.dtype).max), 3.0)[call.seed % 4]
    return relaid(
        values.masked_fill(~mask.unsqueeze(1), garbage),
        "contiguous" if call.layout == "expanded" else call.layout,
    )


def _of_lengths(call: Call, lengths: Tensor) -> Tensor | None:
    if len(call.shape) != 3 or lengths.shape != call.shape[:1]:
        return None
    return torch.arange(call.shape[2]) < lengths.unsqueeze(1)


def mask_that_applies(call: Call, tensors: Tensors) -> Tensor | None:
    """Return the mask of a call that is not refused, be it given by lengths."""
    return tensors.mask if tensors.lengths is None else _of_lengths(call, tensors.lengths)
