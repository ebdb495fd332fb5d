"""What a statistics policy is: a declaration of which mean and variance a layer normalizes by."""

from __future__ import annotations

from typing import ClassVar


class Policy:
    """Which statistics a layer normalizes by, and whether its running ones move.

    A policy is a frozen dataclass of plain fields: equal where these are, and made again by
    `type(policy)(**dataclasses.asdict(policy))`. It holds no tensor and no state, so layers may share one.

    Attributes:
        name: in a word, as tables show it.
        needs_running: it makes no sense for a layer that tracks no running statistics.
    """

    name: ClassVar[str]
    needs_running: ClassVar[bool] = False

    def takes_batch(self, training: bool) -> bool:
        """Whether a call takes the batch's own statistics, which then move the running ones.

        Args:
            training: the layer's mode.

        Returns:
            False = the call takes the running statistics and leaves them alone.
        """
        raise NotImplementedError
