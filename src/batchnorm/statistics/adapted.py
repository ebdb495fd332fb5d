"""Mixes the running statistics and the mini-batch's at test time."""

from __future__ import annotations

from dataclasses import dataclass

from .moments import PooledMoments
from .policy import Chosen, Known, Namespace, Policy, biased_var, by_batch, check_number


@dataclass(frozen=True)
class Adapted(Policy):
    """Adapts evaluation to data unlike the training data, by the statistics of the batch at hand.

        training:    as by `Batch()`
        evaluation:  mean = (1 - s) running_mean + s batch mean     s = n / (n + prior)
                     var  = (1 - s) running_var  + s batch var      n = samples of the batch;  nothing moves

    The running statistics weigh as much as `prior` samples of the batch; with 0 those of the batch alone are
    used. The output of a sample then depends on the other samples of its batch. Gradients flow through the
    batch's mean and var.

    Args:
        prior: N of the paper, in samples, 0 or more.

    Raises:
        OptionError: (a ValueError) `prior` is no such number; by the layer that gets the policy: it tracks no
            running statistics.

    Example:
        >>> norm = batchnorm.BatchNorm2d(16, statistics=batchnorm.Adapted(prior=16)).eval()
        >>> y = norm(torch.randn(64, 16, 8, 8) + 1)  # 16 parts running statistics, 64 parts this batch

    Source: Schneider et al. 2020, arXiv:2006.16971, equation 3; 16 is near its best for batches from 8.
    """

    prior: float = 16.0

    name = "adapted"
    needs_running = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior", check_number("Adapted: prior, in samples,", self.prior, 0.0))
        super().__post_init__()

    def measures(self, training: bool) -> bool:  # noqa: ARG002
        """Return True: every call takes the moments of its batch."""
        return True

    def moves(self, training: bool) -> bool:
        """Return whether the layer is in training."""
        return training

    def is_plain(self, training: bool) -> bool:
        """Return whether the layer is in training."""
        return training

    def choose(self, batch: PooledMoments, known: Known, training: bool, xp: Namespace) -> Chosen:
        """Return the mixture."""
        if training:
            return by_batch(batch, known.eps, xp)
        samples = known.samples
        # 1e-30 prevents 0 / 0 without samples, and is lost beside any number of samples.
        share = samples / (samples + max(self.prior, 1e-30))
        mean = (1.0 - share) * known.mean + share * batch.mean
        rstd = 1.0 / xp.sqrt((1.0 - share) * known.var + share * biased_var(batch) + known.eps)
        return Chosen(mean, rstd, share, 0.0, -0.5 * share * rstd * rstd * rstd)
