"""Declares the primitives of every engine: torch tensors in, torch tensors out, no autograd, no modules.

Notation, here and in every engine:

    x           [N, C, *S]   floating input, channels first in shape, any layout in memory; [N, C] has no S
    mask        [N, *S]      bool, True = the value counts; None = all count
    group_size  int          samples per statistics group: samples [0, group_size) are group 0, and so on; the
                             last group may be smaller. None = all N samples are one group
    G           int          number of groups, ceil(N / group_size) and at least 1
    mean, rstd  [G, C]       statistics that normalize, rstd = 1 / sqrt(var + eps), in the wide dtype
    weight, bias  [C]        learned scale and shift; None = 1 and 0
    residual    [N, C, *S]   added before the activation; None = 0
    activation  str          a name from `activations.ACTIVATIONS`; None = identity

    x̂ = (x - mean) * rstd        z = weight * x̂ + bias + residual        y = activation(z)
    dy' = dy * activation'(z)

Statistics travel in the wide dtype (`wide_dtype`: float64 wherever the device has it): a mean that was
rounded to float32 costs 2e-2 in y at |mean|/std = 1e6. Masked positions come out as zero, in y and in every
gradient, whatever was in x or dy there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Apple's GPUs have no float64; statistics are float32 there, and accurate for |mean|/std up to about 10.
_WITHOUT_FLOAT64 = frozenset({"mps"})


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype in which statistics travel on `device`: float64, or float32 where that is missing."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


# a, b and c of dx = a dy' + b x̂ + c, each `[G, C]`, wide.
Coefficients = tuple[Tensor, Tensor, Tensor]

# What a call normalizes by: (mean, rstd), `[G, C]` each, which every engine takes; or what `forward` or
# `evaluate` of an engine has returned, in a form of its own, which only that engine reads.
Statistics = tuple[Tensor, ...]


class Call(Protocol):
    """The fields of a call that an engine reads; the layers' record of a call has them (`torch/call.py`)."""

    @property
    def x(self) -> Tensor:
        """Input `[N, C, *S]`."""

    @property
    def weight(self) -> Tensor | None:
        """Scale `[C]`; None = 1."""

    @property
    def bias(self) -> Tensor | None:
        """Shift `[C]`; None = 0."""

    @property
    def residual(self) -> Tensor | None:
        """Added before the activation, `[N, C, *S]`; None = 0."""

    @property
    def mask(self) -> Tensor | None:
        """Values that count, `[N, *S]` bool; None = all."""

    @property
    def activation(self) -> str | None:
        """A name from `activations.ACTIVATIONS`; None = identity."""

    @property
    def group_size(self) -> int | None:
        """Samples per statistics group; None = all."""

    @property
    def eps(self) -> float:
        """Added to var."""


class RunningState(NamedTuple):
    """Running statistics, which a batch of x moves in place; or none.

        running = (1 - momentum) * running + momentum * batch, where var is m2 / (count - 1)

    The batch is what the mask leaves in of all groups together: their moments are merged in order, by Chan's
    formula. Fewer than two values have no variance, and leave mean and var as they are.

    Attributes:
        mean, var: `[C]`; None = not tracked.
        batches: how many batches there were, an integer tensor of one value; any batch adds 1.
        momentum: a batch's fraction, 0..1, a number or a tensor of one; None = 1 / (number of batches). An
            engine takes numbers only.
        skipped: how many batches with inf or NaN were skipped, an integer tensor of one value. Where it is
            given, a batch whose mean or m2 is not finite, in any group and channel, adds 1 to it and leaves
            all the others alone; None = such a batch moves them as any other does.
        sequential: each group moves them as a batch of its own, in order. A group of fewer than two values is
            passed over; `batches` grows by G. A batch is skipped as a whole.
        memory, accumulator: of the layers; no engine reads them. The first remembers the statistics for
            forwards that checkpointing may recompute (`torch/contexts/checkpointing.py`), the second collects
            the moments of several batches, which move them as one (`torch/contexts/accumulation.py`).
        warm_start: a channel with mean 0 and var 1, the initial values, takes a momentum of 1. No engine does
            that: the framework's own operations move them then.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | Tensor | None = 0.1
    skipped: Tensor | None = None
    sequential: bool = False
    memory: Any = None
    accumulator: Any = None
    warm_start: bool = False

    @property
    def is_tracked(self) -> bool:
        """Whether there is a running statistic or a count that a batch moves."""
        return self.mean is not None or self.var is not None or self.batches is not None

    @property
    def is_complete(self) -> bool:
        """Whether there is a mean and a variance, to normalize by."""
        return self.mean is not None and self.var is not None


class Moments(NamedTuple):
    """Count, mean and centred second moment of the values of each group and channel.

    Attributes:
        count: `[G]`, number of values per channel, in the wide dtype.
        mean: `[G, C]`, mean; 0 where count is 0.
        m2: `[G, C]`, sum of (x - mean)²; 0 where count is 0. var = m2 / count.
    """

    count: Tensor  # type: ignore[assignment]  # hides the method `count` that tuples have
    mean: Tensor
    m2: Tensor


class Engine(Protocol):
    """What an engine module offers; shapes as in the notation above."""

    def moments(self, call: Call) -> Moments:
        """Returns the moments of x, from deviations: never E[x²] - E[x]².

        Args:
            call: x, mask and group_size, and nothing else.
        """

    def forward(
        self, call: Call, running: RunningState | None = None, activation_mask: Tensor | None = None
    ) -> tuple[Tensor, Statistics]:
        """Returns y `[N, C, *S]`, in the dtype and layout of x, and the statistics of x.

        Args:
            call: the call.
            running: running statistics for which `moves` was true; they are moved.
            activation_mask: a tensor from `activation_mask`, which is filled.
        """

    def evaluate(
        self,
        call: Call,
        mean: Tensor,
        var: Tensor,
        activation_mask: Tensor | None = None,
        *,
        keeps: bool = True,
    ) -> tuple[Tensor, Statistics]:
        """Returns y, normalized by running statistics, and copies of these: mean and 1 / sqrt(var + eps).

        Args:
            call: the call.
            mean, var: running statistics, `[C]`.
            activation_mask: as of `forward`.
            keeps: whether the caller keeps the copies; if not, an engine need not return them.
        """

    def normalize(self, call: Call, statistics: Statistics, activation_mask: Tensor | None = None) -> Tensor:
        """Returns y, normalized by given statistics."""

    def unpack(self, statistics: Statistics, channels: int) -> tuple[Moments, Tensor]:
        """Returns the moments and rstd, `[G, C]`, that the statistics of a `forward` hold."""

    def backward(
        self,
        call: Call,
        dy: Tensor,
        statistics: Statistics,
        constant: bool,
        activation_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns dx, dweight, dbias and dresidual: `backward_reduce` and `backward_apply`, without a policy.

        With n values per channel and a = weight * rstd, as mean and rstd are those of x itself:

            dx = a dy' - a x̂ sum_dy_xhat / n - a sum_dy / n

        Where the statistics are `constant`: dx = a dy'. dweight and dbias are sum_dy_xhat and sum_dy of all
        groups, `[C]`, in float64 where x is, and else float32.

        Args:
            activation_mask: as `forward` has filled it; the call then has neither bias nor residual, and
                dresidual is laid out as x.
        """

    def backward_reduce(self, call: Call, dy: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Returns sum_dy = Σ dy' and sum_dy_xhat = Σ dy' x̂, each `[G, C]` in the wide dtype."""

    def backward_apply(
        self, call: Call, dy: Tensor, statistics: Statistics, coefficients: Coefficients
    ) -> tuple[Tensor, Tensor | None]:
        """Returns dx = a dy' + b x̂ + c and dresidual = dy', for coefficients (a, b, c), each `[G, C]`.

        The statistics policy computes the coefficients, so that none is a special case here. The middle term
        takes x̂, not x: b x + c would cancel where |mean| is far above std.
        """

    def moves(self, x: Tensor, running: RunningState) -> bool:
        """Returns whether `forward` of x can move these; else they need the framework's own operations."""

    def activation_mask(self, call: Call) -> Tensor | None:
        """Returns memory for one bit per value, whether the activation has a slope there; None = not kept."""
