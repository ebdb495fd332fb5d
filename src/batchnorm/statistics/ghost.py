"""Statistics of parts of the mini-batch.

Source: Hoffer, Hubara & Soudry 2017, arXiv:1705.08741, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Policy, check_count


@dataclass(frozen=True)
class Ghost(Policy):
    """Ghost batches: in training, each `size` samples that follow each other have statistics of their own.

        training:    mean_g, var_g over samples [g size, (g + 1) size) and all positions; the last group may
                     be smaller; the running ones move once, by the pooled mean and var of the whole batch
        evaluation:  mean = running_mean,  var = running_var;  nothing moves

    All groups are one call of a kernel. A large batch trains as noisily as small ones do. A ghost batch of
    one value per channel is refused, as a batch of one is.

    Args:
        size: samples of a ghost batch.
        sequential: the running statistics move as if each ghost batch had been a batch of its own, in order,
            and are counted so: the form of the paper,
                running = (1 - momentum)^G running + Σ_g (1 - momentum)^(G - 1 - g) momentum batch_g
            in which the variance is that within ghost batches, too small by that of their means.

    Source: Hoffer, Hubara & Soudry 2017, arXiv:1705.08741, algorithm 1.
    """

    size: int
    sequential: bool = False

    name = "ghost"

    def __post_init__(self) -> None:
        check_count("Ghost: size, samples of a ghost batch,", self.size, 1)
        super().__post_init__()

    @property
    def group_size(self) -> int:  # type: ignore[override]
        """Samples that share statistics in training."""
        return self.size

    @property
    def is_sequential(self) -> bool:  # type: ignore[override]
        """Whether each group moves the running statistics as a batch of its own."""
        return self.sequential
