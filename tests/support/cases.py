"""The one grid of cases on which every engine and every layer is compared with the reference."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from batchnorm import reference

from .covering import covering

Layout = Literal["contiguous", "channels_last", "strided", "mixed"]

ACTIVATIONS = tuple(name for name in reference.ACTIVATIONS if name is not None)

# Where a derivative jumps. Next to a jump, an error of one rounding in z is an error of the order of 1 in the
# derivative, and no engine could be held to anything.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
AROUND_A_KINK = 1e-4


class Inputs(NamedTuple):
    """The tensors of one case.

    Attributes:
        x: `[N, C, *S]`; NaN at masked positions.
        weight: `[C]`, of both signs and away from 0, 1 and -1; None where not affine.
        bias: `[C]`, away from 0; None where not affine.
        residual: `[N, C, *S]`, NaN at masked positions; None where the case has none.
        dy: `[N, C, *S]`, a random cotangent; NaN at masked positions.
        mask: `[N, *S]` bool, True = counts; None where not masked.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    dy: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Case:
    """One case of the grid: shapes, layout, dtype and options.

    Attributes:
        name: unique in the grid; it is the test's id.
        shape: of x, `[N, C, *S]`.
        layout: of x, residual and dy in memory. "mixed" is x channels-last, the others contiguous;
            "strided" is every second value along the last axis of a larger tensor.
        dtype: of x, residual and dy.
        parameter_dtype: of weight and bias; None = that of x.
        offset: |mean| of each channel, in units of its std, apart from a random part of the order of 1.
        masked: about a third of the positions do not count, and in the last of several groups none does.
        all_masked: no position counts at all.
        group_size: samples per statistics group; None = one group.
        residual: a residual is added.
        activation: name of the activation; None = identity.
        affine: weight and bias are there.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout = "contiguous"
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    offset: float = 0.0
    masked: bool = False
    all_masked: bool = False
    group_size: int | None = None
    residual: bool = False
    activation: str | None = None
    affine: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, int | str | None]:
        """The options that go to the reference and to every engine under the same name."""
        return {"group_size": self.group_size, "activation": self.activation}

    def make(self, seed: int = 0, device: str = "cpu") -> Inputs:
        """Return the case's tensors: the same ones for the same seed, whatever was drawn before.

        Everything is rounded to the case's dtype here, so that the reference, which widens these tensors,
        sees exactly the values that an engine sees.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + seed)

        def uniform(low: float, high: float) -> Tensor:
            draw = torch.rand(self.shape[1], generator=generator, dtype=torch.float64)
            return low + (high - low) * draw

        def sign() -> Tensor:
            return torch.where(uniform(-1, 1) < 0, -1.0, 1.0).double()

        def noise() -> Tensor:
            return torch.randn(self.shape, generator=generator, dtype=torch.float64)

        per_channel = (1, -1, *[1] * (len(self.shape) - 2))
        std = torch.exp(uniform(-1.0, 1.0)).view(per_channel)
        mean = (sign() * (self.offset + uniform(0.5, 1.5))).view(per_channel)
        x = std * (mean + noise())
        residual = noise() + 0.3 if self.residual else None
        dy = noise() + 0.2
        mask = self._mask(generator)

        weight = bias = None
        if self.affine:
            small = uniform(-1, 1) < 0
            weight = sign() * torch.where(small, uniform(0.3, 0.8), uniform(1.2, 2.0))
            bias = sign() * uniform(0.2, 1.0)
            # Both signs are there, not only probably.
            weight[0] = -weight[0].abs()
            weight[1:2] = weight[1:2].abs()

        rounded = Inputs(
            x.to(self.dtype),
            None if weight is None else weight.to(self.parameter_dtype or self.dtype),
            None if bias is None else bias.to(self.parameter_dtype or self.dtype),
            None if residual is None else residual.to(self.dtype),
            dy.to(self.dtype),
            mask,
        )
        return self._place(self._without_kinks(rounded), device)

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        if not (self.masked or self.all_masked):
            return None
        shape = (self.shape[0], *self.shape[2:])
        mask = torch.rand(shape, generator=generator) > 0.35
        if self.all_masked:
            mask[:] = False
        elif self.group_size is not None and self.group_size < self.shape[0]:
            mask[(self.shape[0] - 1) // self.group_size * self.group_size :] = False
        return mask

    def _without_kinks(self, inputs: Inputs) -> Inputs:
        """Return the inputs with dy = 0 where z is next to a kink under the batch's statistics."""
        kinks = KINKS.get(self.activation or "", ())
        if not kinks:
            return inputs
        x, weight, bias, residual, dy, mask = inputs
        z = torch.from_numpy(
            reference.forward(
                x.double().numpy(),
                None if weight is None else weight.double().numpy(),
                None if bias is None else bias.double().numpy(),
                residual=None if residual is None else residual.double().numpy(),
                mask=None if mask is None else mask.numpy(),
                group_size=self.group_size,
            ).y
        )
        near = torch.stack([(z - kink).abs() < AROUND_A_KINK for kink in kinks]).any(dim=0)
        return inputs._replace(dy=dy.masked_fill(near, 0.0))

    def _place(self, inputs: Inputs, device: str) -> Inputs:
        """Return the inputs on the device, in the case's layout, with NaN at the masked positions."""

        def placed(values: Tensor | None, layout: Layout) -> Tensor | None:
            if values is None:
                return None
            if inputs.mask is not None:
                values = values.masked_fill(~inputs.mask[:, None], torch.nan)
            return lay_out(values.to(device), layout)

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        others: Layout = "contiguous" if self.layout == "mixed" else self.layout
        x, dy = placed(inputs.x, self.layout), placed(inputs.dy, others)
        assert x is not None
        assert dy is not None
        weight, bias, mask = moved(inputs.weight), moved(inputs.bias), moved(inputs.mask)
        return Inputs(x, weight, bias, placed(inputs.residual, others), dy, mask)


def lay_out(values: Tensor, layout: Layout) -> Tensor:
    """Return the values `[N, C, *S]` in another layout in memory; the shape and the values stay."""
    if layout in ("channels_last", "mixed"):
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([values, torch.full_like(values, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    return values.contiguous()


def _shapes() -> list[Case]:
    return [
        Case("2d", (13, 5)),
        Case("2d-long", (1031, 3)),
        Case("2d-wide", (6, 67)),
        Case("3d", (4, 3, 7)),
        Case("4d", (3, 5, 7, 9)),
        Case("4d-wide", (2, 33, 3, 3)),
        Case("4d-large", (4, 6, 65, 63)),
        Case("5d", (2, 3, 3, 5, 4)),
        Case("one-channel-2d", (9, 1)),
        Case("one-channel-4d", (6, 1, 5, 5)),
        Case("one-sample", (1, 4, 5, 3)),
        Case("two-values-2d", (2, 4)),
        Case("two-values-3d", (1, 4, 2)),
        Case("two-values-4d", (1, 4, 1, 2)),
        Case("empty-2d", (0, 3)),
        Case("empty-4d", (0, 3, 4, 4)),
        Case("empty-4d-fused", (0, 3, 4, 4), residual=True, activation="relu"),
        Case("empty-space", (2, 3, 0)),
        Case("no-affine", (3, 5, 7, 9), affine=False),
        Case("no-affine-fused", (3, 5, 7, 9), affine=False, residual=True, activation="silu"),
    ]


def _layouts() -> list[Case]:
    return [
        Case("channels-last-3d", (4, 3, 7), "channels_last"),
        Case("channels-last-4d", (3, 5, 7, 9), "channels_last"),
        Case("channels-last-4d-wide", (2, 67, 3, 3), "channels_last"),
        Case("channels-last-4d-large", (4, 6, 65, 63), "channels_last"),
        Case("channels-last-5d", (2, 3, 3, 5, 4), "channels_last"),
        Case("channels-last-fused", (3, 5, 7, 9), "channels_last", residual=True, activation="relu"),
        Case("channels-last-one-channel", (6, 1, 5, 5), "channels_last"),
        Case("strided-2d", (13, 5), "strided"),
        Case("strided-4d", (3, 5, 7, 9), "strided"),
        Case("strided-fused", (3, 5, 7, 9), "strided", residual=True, activation="relu"),
        Case("mixed-fused", (3, 5, 7, 9), "mixed", residual=True, activation="gelu"),
    ]


def _dtypes() -> list[Case]:
    cases = []
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        cases += [
            Case(f"{name}-2d", (13, 5), dtype=dtype),
            Case(f"{name}-4d", (3, 5, 7, 9), dtype=dtype),
            Case(f"{name}-channels-last", (3, 5, 7, 9), "channels_last", dtype=dtype),
            Case(f"{name}-strided", (3, 5, 7, 9), "strided", dtype=dtype),
            Case(f"{name}-fused", (3, 5, 7, 9), dtype=dtype, residual=True, activation="silu"),
            Case(f"{name}-masked", (5, 4, 6, 3), dtype=dtype, masked=True, residual=True, activation="relu"),
            Case(f"{name}-groups", (7, 3, 5, 5), dtype=dtype, group_size=3),
        ]
    # Under autocast the parameters stay float32.
    cases += [
        Case("bfloat16-wide-parameters", (3, 5, 7, 9), dtype=torch.bfloat16, parameter_dtype=torch.float32),
        Case("float16-wide-parameters", (13, 5), dtype=torch.float16, parameter_dtype=torch.float32),
    ]
    return cases


def _offsets() -> list[Case]:
    cases = []
    for offset, name in ((1e3, "1e3"), (1e6, "1e6")):
        cases += [
            Case(f"offset-{name}-2d", (13, 5), offset=offset),
            Case(f"offset-{name}-2d-long", (1031, 3), offset=offset),
            Case(f"offset-{name}-4d", (3, 5, 7, 9), offset=offset),
            Case(f"offset-{name}-channels-last", (3, 5, 7, 9), "channels_last", offset=offset),
            Case(f"offset-{name}-strided", (3, 5, 7, 9), "strided", offset=offset),
            Case(f"offset-{name}-masked", (5, 4, 6, 3), offset=offset, masked=True),
            Case(f"offset-{name}-groups", (7, 3, 5, 5), offset=offset, group_size=3),
            Case(f"offset-{name}-fused", (3, 5, 7, 9), offset=offset, residual=True, activation="gelu"),
        ]
    # Beyond these, a dtype of 8 or 11 significant bits keeps nothing of the spread, and beyond 65504 float16
    # keeps nothing at all. In float64 the rounding of the mean itself would be the largest error at 1e6.
    cases += [
        Case("offset-1e2-bfloat16", (3, 5, 7, 9), dtype=torch.bfloat16, offset=1e2),
        Case("offset-1e2-float16", (3, 5, 7, 9), dtype=torch.float16, offset=1e2),
        Case("offset-1e3-float16", (13, 5), dtype=torch.float16, offset=1e3),
        Case("offset-1e3-float64", (3, 5, 7, 9), dtype=torch.float64, offset=1e3),
    ]
    return cases


def _activations() -> list[Case]:
    cases = [Case("residual", (3, 5, 7, 9), residual=True), Case("residual-2d", (13, 5), residual=True)]
    for name in ACTIVATIONS:
        cases += [
            Case(f"{name}-2d", (13, 5), activation=name),
            Case(f"{name}-residual-4d", (3, 5, 7, 9), residual=True, activation=name),
        ]
    return cases


def _masks_and_groups() -> list[Case]:
    return [
        Case("masked-2d", (13, 5), masked=True),
        Case("masked-3d", (4, 3, 7), masked=True),
        Case("masked-4d", (5, 4, 6, 3), masked=True),
        Case("masked-5d", (2, 3, 3, 5, 4), masked=True),
        Case("masked-channels-last", (5, 4, 6, 3), "channels_last", masked=True),
        Case("masked-strided", (5, 4, 6, 3), "strided", masked=True),
        Case("masked-fused", (5, 4, 6, 3), masked=True, residual=True, activation="hardswish"),
        Case("masked-planes", (3, 4, 9, 23), masked=True, residual=True, activation="relu"),
        Case("all-masked-2d", (13, 5), all_masked=True),
        Case("all-masked-fused", (5, 4, 6, 3), all_masked=True, residual=True, activation="sigmoid"),
        Case("groups-2d-ragged", (11, 4), group_size=4),
        Case("groups-3d", (6, 3, 7), group_size=2),
        Case("groups-4d-ragged", (7, 3, 5, 5), group_size=3),
        Case("groups-channels-last", (7, 3, 5, 5), "channels_last", group_size=3),
        Case("groups-fused", (7, 3, 5, 5), group_size=3, residual=True, activation="tanh"),
        Case("groups-empty", (0, 3, 5, 5), group_size=3),
        Case("groups-of-one", (4, 3, 5, 5), group_size=1),
        Case("group-larger-than-batch", (4, 3, 5, 5), group_size=9),
        Case("groups-masked", (7, 3, 5, 5), group_size=3, masked=True),
        Case("groups-masked-fused", (11, 4, 6), group_size=4, masked=True, residual=True, activation="elu"),
        Case("groups-2d-wide", (11, 517), group_size=4),
        Case("groups-wide-masked", (5, 300, 4), group_size=2, masked=True),
        Case("groups-all-masked", (7, 3, 5, 5), group_size=3, all_masked=True),
    ]


CASES: tuple[Case, ...] = (
    *_shapes(),
    *_layouts(),
    *_dtypes(),
    *_offsets(),
    *_activations(),
    *_masks_and_groups(),
)

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def covering_cases(cases: Iterable[Case]) -> frozenset[Case]:
    """Return a small set of the cases: each value of each attribute that occurs in them occurs in it."""
    return frozenset(covering(sorted(cases, key=lambda case: math.prod(case.shape)), _values))


def _values(case: Case) -> frozenset[tuple[str, object]]:
    """Return a case's attributes and their values; of its shape and its groups, the kind alone."""
    size = case.group_size
    return frozenset(
        {
            ("axes and layout", (len(case.shape), case.layout)),
            ("channels", min(case.shape[1], 2)),
            ("layout and dtype", (case.layout, case.dtype)),
            ("parameter_dtype", case.parameter_dtype),
            ("offset", case.offset),
            ("masked and groups", (case.masked, case.all_masked, size if size is None else min(size, 2))),
            ("residual and groups", (case.residual, size is None)),
            ("activation", case.activation),
            ("affine", case.affine),
        }
    )
