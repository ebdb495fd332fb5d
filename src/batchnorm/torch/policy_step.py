"""Runs the statistics policy of one call, between its moments and the normalization by them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels.interface import Engine, wide_dtype
from batchnorm.statistics.moments import PooledMoments, pooled
from batchnorm.statistics.policy import Chosen, Known, Policy, gradient_coefficients

from .call import Call
from .collectives import operations as collectives
from .moments import check_finite, of_groups


class Recall(Protocol):
    """Running statistics of passes that may come again; `contexts.checkpointing.Memory` has them."""

    def known(self, known: Known, batch: PooledMoments, training: bool) -> Known:
        """Return what the first pass of a call knew."""


class OfTorch:
    """torch's functions of arrays, as policies call them."""

    sqrt = staticmethod(torch.sqrt)
    clip = staticmethod(torch.clip)
    where = staticmethod(torch.where)
    sum = staticmethod(torch.sum)
    stop_gradient = staticmethod(Tensor.detach)


class OfNumPy:
    """NumPy's functions: on a CPU they take a third of torch's time for a few hundred numbers."""

    sqrt = staticmethod(np.sqrt)
    clip = staticmethod(np.clip)
    where = staticmethod(np.where)
    sum = staticmethod(np.sum)

    @staticmethod
    def stop_gradient(values: Any) -> Any:
        """Return the values: nothing is differentiated."""
        return values


class PolicyStep(NamedTuple):
    """The policy of a call, and what it takes into account.

    Attributes:
        policy: the layer's policy.
        training: the mode.
        known: running statistics, wide, and more; copies that no later step changes.
        ranks: the ranks that share statistics; None = no other rank does.
        label: the name by which other ranks know the layer.
        small_batch_fallback: whether the running statistics normalize groups of fewer than two values.
        memory: remembers the running statistics for forwards that may be recomputed; None = not needed.
    """

    policy: Policy
    training: bool
    known: Known
    ranks: collectives.Ranks | None = None
    label: str = ""
    small_batch_fallback: bool = False
    memory: Recall | None = None

    def measured(self, engine: Engine, call: Call, *, strict: bool) -> tuple[PooledMoments, Chosen]:
        """Return the moments of all ranks that share them, and what the policy chooses by these.

        Args:
            engine: takes the moments of this rank.
            call: the call.
            strict: raise NonFiniteError where moments are not finite.
        """
        with torch.no_grad():
            found = engine.moments(Call(call.x.detach(), mask=call.mask, group_size=call.group_size))
            batch, samples = self.share(of_groups(*found))
            if strict:
                check_finite(batch)
            return batch, self.recalled(batch).choose(batch, samples, plain=True)

    def gradients(
        self,
        engine: Engine,
        call: Call,
        dy: Tensor,
        batch: PooledMoments,
        chosen: Chosen,
        needs_dx: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Return dx, dweight, dbias and dresidual; the parameters' are sums over this rank's values alone."""
        sum_dy, sum_dy_xhat = engine.backward_reduce(call, dy, chosen[:2])
        dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
        dweight, dbias = sum_dy_xhat.sum(0).to(dtype), sum_dy.sum(0).to(dtype)
        if needs_dx:
            sum_dy, sum_dy_xhat = self.add(sum_dy, sum_dy_xhat)
        elif call.activation is None or call.residual is None:
            return None, dweight, dbias, None
        coefficients = _coefficients(call.weight, chosen, batch, sum_dy, sum_dy_xhat)
        dx, dresidual = engine.backward_apply(call, dy, chosen[:2], coefficients)
        return dx, dweight, dbias, dresidual

    def share(
        self, batch: PooledMoments, *, differentiable: bool = False
    ) -> tuple[PooledMoments, float | Tensor]:
        """Return the moments of all ranks that share them, and the number of samples that these ranks have.

        One packet carries the number of samples, and count, mean and m2 of each group.
        """
        if self.ranks is None:
            return batch, self.known.samples
        groups, channels = batch.mean.shape
        samples = batch.mean.new_zeros(1) + self.known.samples
        count = (batch.mean.new_zeros(groups, 1) + batch.count).reshape(-1)
        packet = torch.cat([samples, count, batch.mean.reshape(-1), batch.m2.reshape(-1)])
        gather = collectives.differentiable_gather if differentiable else collectives.gather
        everyone = gather(packet, self.ranks, f"{self.label} forward, {groups} x {channels}")
        samples, count, mean, m2 = torch.split(
            everyone, [1, groups, groups * channels, groups * channels], dim=1
        )
        size = len(everyone)
        parts = PooledMoments(
            count.reshape(size, groups, 1),
            mean.reshape(size, groups, channels),
            m2.reshape(size, groups, channels),
        )
        return pooled(parts, torch), samples.sum()

    def add(self, sum_dy: Tensor, sum_dy_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of all ranks."""
        if self.ranks is None:
            return sum_dy, sum_dy_xhat
        groups, channels = sum_dy.shape
        total = collectives.add(
            torch.stack([sum_dy, sum_dy_xhat]), self.ranks, f"{self.label} backward, {groups} x {channels}"
        )
        return total[0], total[1]

    def recalled(self, batch: PooledMoments) -> PolicyStep:
        """Return the step with the running statistics of the first pass, if this forward is a recompute."""
        if self.memory is None:
            return self
        return self._replace(known=self.memory.known(self.known, batch, self.training))

    def choose(self, batch: PooledMoments, samples: float | Tensor, *, plain: bool = False) -> Chosen:
        """Return what the call normalizes by, `[G, C]` each or a number, given what `share` returned.

        Args:
            plain: whether no graph is built and no transform is active, so that NumPy may compute it.
        """
        known = self.known._replace(samples=samples)
        if not (plain and shows_its_memory(batch.mean)):
            return self._choose(batch, known, OfTorch)
        with np.errstate(all="ignore"):  # torch does not warn of inf and NaN either
            found = self._choose(PooledMoments(*map(array, batch)), Known(*map(array, known)), OfNumPy)
        return Chosen(*map(tensor, found))

    def _choose(self, batch: PooledMoments, known: Known, xp: Any) -> Chosen:
        chosen = self.policy.choose(batch, known, self.training, xp)
        if not self.small_batch_fallback:
            return chosen
        assert known.mean is not None
        assert known.var is not None
        enough = batch.count >= 2
        given = (known.mean, 1.0 / xp.sqrt(known.var + known.eps), 0.0, 0.0, 0.0)
        if isinstance(enough, bool):  # counted on the host
            return chosen if enough else Chosen(*given)
        return Chosen(*(xp.where(enough, own, other) for own, other in zip(chosen, given, strict=True)))


def shows_its_memory(values: Tensor) -> bool:
    """Whether `array` can share the memory of a tensor: a plain one on a CPU; fake tensors have no memory."""
    return values.is_cpu and type(values) is Tensor


def array(value: Any) -> Any:
    """Return a tensor as an array of the same memory; anything else as it is."""
    return value.numpy() if isinstance(value, Tensor) else value


def tensor(value: Any) -> Any:
    """Return an array as a tensor of the same memory; a number as it is."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def known_to(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    samples: Any,
    eps: float,
    like: torch.dtype,
) -> Known:
    """Return what a policy reads besides the moments: wide copies of the running statistics."""
    mean, var = (None if t is None else t.detach().to(like, copy=True) for t in (running_mean, running_var))
    return Known(mean, var, None if batches is None else batches.detach().clone(), samples, eps)


def samples_of(x: Tensor, mask: Tensor | None) -> float | Tensor:
    """Return the number of samples with a value that counts; wide, as fractions of integers are float32."""
    if mask is None:
        return 1.0 * x.shape[0]  # not float(): an exporter's size may be a symbol
    return mask.unsqueeze(1).flatten(1).any(1).sum(dtype=wide_dtype(x.device))


def _coefficients(
    weight: Tensor | None, chosen: Chosen, batch: PooledMoments, sum_dy: Tensor, sum_dy_xhat: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # A copy: torch cannot resize memory that an array shares, and FSDP resizes that of its parameters.
    wide = 1.0 if weight is None else weight.detach().to(sum_dy.dtype, copy=True)
    if not shows_its_memory(sum_dy):
        return gradient_coefficients(wide, chosen, batch, sum_dy, sum_dy_xhat)
    with np.errstate(all="ignore"):
        found = gradient_coefficients(
            array(wide),
            Chosen(*map(array, chosen)),
            PooledMoments(*map(array, batch)),
            array(sum_dy),
            array(sum_dy_xhat),
        )
    a, b, c = map(tensor, found)
    return a, b, c
