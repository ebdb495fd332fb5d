"""What identifies a message of one rank to the others."""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import torch

_FACTOR = 0x9E3779B97F  # odd, so that the last bits of its multiples differ: those that float32 carries


class Mark(NamedTuple):
    """What a rank sends, and for which layer.

    Attributes:
        act: what is done with it, and what it looks like: "gather 2 x 64 float64".
        sent: that, and the layer.
        number: a fingerprint of that, below 2⁴⁰.
    """

    act: str
    sent: str
    number: int

    def of_call(self, call: int) -> Mark:
        """Return the mark with the number of a call, by which one layer's calls are told apart.

        Of two calls of a layer, one rank may run the first one's backward only, where others begin with that
        of the second.
        """
        number = (self.number + call * _FACTOR) % (1 << 40)
        act, sent = (f"{text} of call {call}" for text in (self.act, self.sent))
        return Mark(act, sent, number)


@functools.lru_cache(maxsize=4096)
def mark_of(label: str, act: str, shape: torch.Size, dtype: torch.dtype) -> Mark:
    """Return the mark of a packet.

    Args:
        label: what identifies the sender, such as `features.3 (BatchNorm2d) forward`.
        act: what is done with the packet: "gather" or "add".
        shape: of the packet.
        dtype: of the packet.
    """
    act = f"{act} {' x '.join(map(str, shape)) or '1'} {str(dtype).removeprefix('torch.')}"
    sent = f"'{label}' ({act})"
    return Mark(act, sent, int.from_bytes(hashlib.blake2b(sent.encode(), digest_size=5).digest()))


class UnlikeError(RuntimeError):
    """A rank's message has another mark than one's own."""

    def __init__(self) -> None:
        super().__init__("a message of another layer came")
