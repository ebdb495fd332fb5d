"""Normalizes by the statistics of all ranks of a process group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from batchnorm.errors import OptionError

from .batch import Batch
from .moments import PooledMoments
from .policy import Chosen, Known, Namespace, Policy, check_number


def _of_over(name: str) -> Any:
    """Return a property: the attribute of the policy that uses the shared moments."""
    return property(lambda policy: getattr(policy.over, name))


@dataclass(frozen=True)
class Synced(Policy):
    """Uses the statistics of the batches of all ranks together, as if one process had them all.

        training:    n = Σ n_r,  mean = Σ n_r mean_r / n,  m2 = Σ (m2_r + n_r (mean_r - mean)²) over ranks r;
                     the running statistics move by these, bit for bit the same on all ranks
        evaluation:  as by `over`: for `Batch()`, the running statistics, and no rank waits for another

    Ranks may have batches of different size, masks, or empty batches. A forward and a backward take one
    collective each.

    Args:
        group: global ranks that share statistics, such as (0, 1); None = all. A process group cannot be
            stored: pass `torch.distributed.get_process_group_ranks(group)`.
        over: the policy that uses the shared moments (keyword only): `Batch()`, `Ghost(size)` (the ghost
            batches g of all ranks share statistics; ranks must have equally many), `Renorm()` or `Adapted()`.
        timeout: seconds to wait for other ranks before an error names the missing ones (keyword only).

    Raises:
        OptionError: (a ValueError) a value out of range, or another policy in `over`.
        RankError: (in a call; a RuntimeError) another rank is missing, or calls another collective.

    Example:
        >>> norm = batchnorm.BatchNorm2d(16, statistics=batchnorm.Synced(timeout=60))
        >>> y = norm(torch.randn(8, 16, 4, 4))  # without torch.distributed, this process is the only rank

    Source: Peng et al. 2018, arXiv:1711.07240, section 3.2.
    """

    group: tuple[int, ...] | None = None
    over: Policy = field(default=Batch(), kw_only=True)
    timeout: float = field(default=600.0, kw_only=True)

    name = "synced"
    needs_running = _of_over("needs_running")
    group_size = _of_over("group_size")
    is_sequential = _of_over("is_sequential")
    is_shuffled = _of_over("is_shuffled")
    counts_batches = _of_over("counts_batches")

    def __post_init__(self) -> None:
        if self.group is not None:
            object.__setattr__(self, "group", _ranks(self.group))
        object.__setattr__(self, "timeout", check_number("Synced: timeout, in seconds,", self.timeout, 1e-3))
        over: object = self.over
        if not isinstance(over, Policy) or isinstance(over, Synced) or not over.measures(training=True):
            raise OptionError(
                "Synced: over must be Batch(), Ghost(...), Renorm(...) or Adapted(...), which take moments "
                f"of a batch; got {over!r}"
            )
        super().__post_init__()

    def measures(self, training: bool) -> bool:
        """As the policy that takes the shared moments."""
        return self.over.measures(training)

    def moves(self, training: bool) -> bool:
        """As the policy that takes the shared moments."""
        return self.over.moves(training)

    def is_plain(self, training: bool) -> bool:
        """As of the policy that takes the shared moments; valid for a rank that is alone."""
        return self.over.is_plain(training)

    def in_order(self) -> Synced:
        """Return the policy over groups of consecutive samples."""
        return replace(self, over=self.over.in_order())

    def choose(self, batch: PooledMoments, known: Known, training: bool, xp: Namespace) -> Chosen:
        """Return what the policy chooses by the moments of all ranks."""
        return self.over.choose(batch, known, training, xp)


def _ranks(group: object) -> tuple[int, ...]:
    ranks = tuple(group) if isinstance(group, list | tuple | range | set | frozenset) else ()
    is_whole = all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in ranks)
    if not ranks or not is_whole or len(set(ranks)) != len(ranks):
        raise OptionError(
            "Synced: group must be the global ranks of those who share statistics, such as (0, 1); "
            f"got {group!r}. Of a process group, torch.distributed.get_process_group_ranks(group) tells them"
        )
    return tuple(sorted(ranks))
