"""Damage to files: what a broken disk, a torn download or a malicious hand makes of bytes that were right."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from random import Random

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_TEXTS = (
    b"-1", b"0", b"1e400", b"2000000000", b"9" * 40, b"9" * 5000, b"NaN", b"Infinity", b"null", b"true",
    b"[]", b"{}", b'""', b"[[[[", b'"\xff"',
)  # fmt: skip
_EXTREMES = (0, 1, -1, 2**7, 2**15, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)


def mutated(content: bytes, random: Random) -> bytes:
    """Return `content` with one to four kinds of damage; the same ones for the same state of `random`."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = random.choice(KINDS)(content, random)
    return content


def _flip_bits(content: bytes, random: Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8)) if damaged else 0):
        damaged[_place(damaged, random)] ^= 1 << random.randrange(8)
    return bytes(damaged)


def _cut(content: bytes, random: Random) -> bytes:
    start, stop = _span(content, random)
    return random.choice((content[:start], content[stop:], content[:start] + content[stop:]))


def _zero(content: bytes, random: Random) -> bytes:
    start, stop = _span(content, random)
    return content[:start] + bytes(stop - start) + content[stop:]


def _repeat(content: bytes, random: Random) -> bytes:
    start, stop = _span(content, random)
    return content[:stop] + content[start:stop] * random.choice((1, 1, 3)) + content[stop:]


def _insert(content: bytes, random: Random) -> bytes:
    at = _place(content, random)
    return content[:at] + random.randbytes(random.choice((1, 2, 4, 8, 64))) + content[at:]


def _swap(content: bytes, random: Random) -> bytes:
    """Two of the numbers that are written out, or two ranges, change places."""
    found = list(_NUMBER.finditer(content))
    if len(found) > 1 and random.random() < 0.7:
        one, other = sorted(random.sample(found, 2), key=re.Match.start)
        return b"".join(
            (
                content[: one.start()],
                other[0],
                content[one.end() : other.start()],
                one[0],
                content[other.end() :],
            )
        )
    size = random.choice((1, 2, 4, 8))
    first, second = sorted((_place(content, random), _place(content, random)))
    if second - first < size or second + size > len(content):
        return content
    a, b = content[first : first + size], content[second : second + size]
    return content[:first] + b + content[first + size : second] + a + content[second + size :]


def _extreme(content: bytes, random: Random) -> bytes:
    """A number that is written out becomes another text; or some bytes an integer at the end of its range."""
    found = list(_NUMBER.finditer(content))
    if found and random.random() < 0.5:
        number = random.choice(found)
        return content[: number.start()] + random.choice(_TEXTS) + content[number.end() :]
    code = random.choice("bhiq")
    value = random.choice(_EXTREMES) % 2 ** (8 * struct.calcsize(f"={code}"))
    packed = struct.pack(random.choice("<>") + code.upper(), value)
    at = _place(content, random)
    return content[:at] + packed + content[at + len(packed) :]


KINDS: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flip_bits, _cut, _zero, _repeat, _insert, _swap, _extreme,
)  # fmt: skip


def _place(content: bytes | bytearray, random: Random) -> int:
    """Return a position; the head and the tail, where formats keep their sizes, as often as all the rest."""
    size = len(content)
    where = random.random()
    if where < 0.25:
        return random.randrange(min(size, 128) or 1)
    if where < 0.5:
        return max(0, size - 1 - random.randrange(min(size, 256) or 1))
    return random.randrange(size or 1)


def _span(content: bytes, random: Random) -> tuple[int, int]:
    start = _place(content, random)
    return start, min(len(content), start + random.choice((1, 4, 16, 64, 1024, len(content) + 1)))
