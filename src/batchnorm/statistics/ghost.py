"""Normalizes parts of the mini-batch by statistics of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .policy import Policy, check_count


@dataclass(frozen=True)
class Ghost(Policy):
    """Normalizes each ghost batch, `size` samples of the batch, by statistics of its own in training.

        training:    mean_g, var_g over samples [g size, (g + 1) size) and all positions; the last group may
                     be smaller; the running statistics move once, by the mean and var of the whole batch
        evaluation:  mean = running_mean,  var = running_var;  nothing moves

    A large batch then has the regularizing noise of small ones. All groups are one call of a kernel.

    Args:
        size: number of samples of a ghost batch, 1 or more.
        sequential: move and count the running statistics as if each ghost batch were a batch of its own, as
            in the paper: of G ghost batches, batch_g then weighs (1 - momentum)^(G - 1 - g) momentum, and
            what was there before (1 - momentum)^G. This variance is the one within ghost batches, and lacks
            the variance of their means.
        shuffle: draw the ghost batches at random in every call, by the framework's generator, as dropout
            does, instead of taking consecutive samples; the output has the order of the input. In contrastive
            learning, the samples of a ghost batch then tell the network nothing about each other. It costs a
            copy of the batch before and after.

    Raises:
        OptionError: (a ValueError) `size` is no such number.
        InputShapeError: (in the forward; a ValueError and RuntimeError) a ghost batch has one value per
            channel.

    Example:
        >>> norm = batchnorm.BatchNorm2d(16, statistics=batchnorm.Ghost(size=32))
        >>> y = norm(torch.randn(128, 16, 8, 8))  # four ghost batches

    Source: Hoffer, Hubara & Soudry 2017, arXiv:1705.08741, algorithm 1; shuffled: He et al. 2020,
    arXiv:1911.05722, section 3.3.
    """

    size: int
    sequential: bool = False
    shuffle: bool = False

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

    @property
    def is_shuffled(self) -> bool:  # type: ignore[override]
        """Whether the samples of each group are drawn at random."""
        return self.shuffle

    def in_order(self) -> Ghost:
        """Return the policy with groups of consecutive samples."""
        return replace(self, shuffle=False)
