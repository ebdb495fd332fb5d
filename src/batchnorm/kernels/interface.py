"""The primitives that every engine offers: torch tensors in, torch tensors out, no autograd, no modules.

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

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Apple's GPUs have no float64; statistics are float32 there, and accurate for |mean|/std up to about 10.
_WITHOUT_FLOAT64 = frozenset({"mps"})


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which statistics travel on `device`: float64, or float32 where that is missing."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


# a, b and c of dx = a dy' + b x̂ + c, each `[G, C]`, wide.
Coefficients = tuple[Tensor, Tensor, Tensor]


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


class RunningStatistics(NamedTuple):
    """Running statistics that a batch of x moves in place, `[C]` each: momentum is the batch's fraction.

        running = (1 - momentum) * running + momentum * batch, where var is m2 / (count - 1)

    The batch is what the mask leaves in of all groups together: their moments are merged in order, by Chan's
    formula. Fewer than two values have no variance, and leave mean and var as they are.

    Attributes:
        mean, var: None where they are not tracked.
        batches: number of batches so far, an integer tensor of one value, which grows by 1, whatever the
            count; or None.
        momentum: 0..1.
        skipped: number of batches that were skipped, an integer tensor of one value. Where it is given, a
            batch whose mean or m2 is inf or NaN, in any group and channel, adds 1 to it and leaves all the
            others alone. None = such a batch moves them as any other does.
        sequential: whether each group moves them as a batch of its own, in order, a group of fewer than two
            values being passed over; `batches` grows by G then. A batch is skipped all the same as a whole.
    """

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None
    momentum: float
    skipped: Tensor | None = None
    sequential: bool = False


class Engine(Protocol):
    """What an engine module offers; arguments and shapes as in the notation above."""

    def moments(self, x: Tensor, *, mask: Tensor | None = None, group_size: int | None = None) -> Moments:
        """Return the moments of x: two passes, the second one centred; never E[x²] - E[x]²."""

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        group_size: int | None = None,
    ) -> Tensor:
        """Return y `[N, C, *S]` in the dtype and layout of x."""

    def backward_reduce(
        self,
        x: Tensor,
        dy: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        group_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return sum_dy = Σ dy' and sum_dy_xhat = Σ dy' x̂, each `[G, C]` in the wide dtype."""

    def backward_apply(
        self,
        x: Tensor,
        dy: Tensor,
        mean: Tensor,
        rstd: Tensor,
        coefficients: Coefficients,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        group_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return dx = a dy' + b x̂ + c and dresidual = dy', for coefficients (a, b, c), each `[G, C]`.

        The statistics policy computes the coefficients, so that none is a special case here. The middle term
        takes x̂, not x: b x + c would cancel where |mean| is far above std.
        """

    def forward(
        self,
        x: Tensor,
        eps: float,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        group_size: int | None = None,
        running: RunningStatistics | None = None,
    ) -> tuple[Tensor, Moments, Tensor]:
        """Return y, the moments of x, and rstd: `moments` and `normalize` with nothing between them.

        `running`, for which `moves` was true, is moved.
        """

    def moves(self, x: Tensor, running: RunningStatistics) -> bool:
        """Whether `forward` of x can move these; else they need the framework's own operations."""

    def backward(
        self,
        x: Tensor,
        dy: Tensor,
        mean: Tensor,
        rstd: Tensor,
        given: bool,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        mask: Tensor | None = None,
        group_size: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return dx, dweight, dbias and dresidual: both backward halves with no policy between them.

        With n values per channel and a = weight * rstd, as mean and rstd are those of x itself:

            dx = a dy' - a x̂ sum_dy_xhat / n - a sum_dy / n

        Where they are `given`, and so constants: dx = a dy'. dweight and dbias are sum_dy_xhat and sum_dy of
        all groups, `[C]`, in float64 where x is, and else float32.
        """

    def activation_mask(self, x: Tensor, activation: str | None, group_size: int | None) -> Tensor | None:
        """Return room for one bit per value, whether the activation has a slope there; None: none is kept.

        An engine that returns it takes it as `activation_mask=` in `forward` and `normalize`, which fill it,
        and in `backward`, where residual and bias are then None; dresidual is laid out as x.
        """

    def given(self, running_mean: Tensor, running_var: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """Return mean and rstd = 1 / sqrt(running_var + eps), `[1, C]`, copied; None as `moves` is False."""
