"""At test time, the running statistics and the mini-batch's, mixed.

Source: Schneider et al. 2020, arXiv:2006.16971.
"""

from __future__ import annotations

from dataclasses import dataclass

from .moments import PooledMoments
from .policy import Chosen, Known, Namespace, Policy, biased_var, by_batch, check_number


@dataclass(frozen=True)
class Adapted(Policy):
    """Evaluation adapts to the batch at hand, as far as it has samples: for data unlike those of training.

        training:    as by `Batch()`
        evaluation:  mean = (1 - s) running_mean + s batch mean     s = n / (n + prior)
                     var  = (1 - s) running_var  + s batch var      n = samples of the batch;  nothing moves

    The running statistics count as much as `prior` samples of the batch do: with 0 the batch's alone are
    used. Outputs then depend on what else is in a batch. Gradients flow through the batch's mean and var.

    Args:
        prior: N of the paper, in samples, 0 or more.

    Source: Schneider et al. 2020, arXiv:2006.16971, equation 3; 16 is near its best for batches from 8.
    """

    prior: float = 16.0

    name = "adapted"
    needs_running = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior", check_number("Adapted: prior, in samples,", self.prior, 0.0))
        super().__post_init__()

    def measures(self, training: bool) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def moves(self, training: bool) -> bool:
        """In training."""
        return training

    def is_plain(self, training: bool) -> bool:
        """In training."""
        return training

    def choose(self, batch: PooledMoments, known: Known, training: bool, xp: Namespace) -> Chosen:
        """Return the mixture."""
        if training:
            return by_batch(batch, known.eps, xp)
        samples = known.samples
        # Not 0 / 0 where there is no sample; beside a sample, so little is nothing.
        share = samples / (samples + max(self.prior, 1e-30))
        mean = (1.0 - share) * known.mean + share * batch.mean
        rstd = 1.0 / xp.sqrt((1.0 - share) * known.var + share * biased_var(batch) + known.eps)
        return Chosen(mean, rstd, share, 0.0, -0.5 * share * rstd * rstd * rstd)
