"""Decides which layers that read the same value, and whose outputs are added, become one layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from .flow import Call, Flow, Layer, origin
from .sums import whole_sum


@dataclass(frozen=True)
class Merge(Generic[Layer]):
    """One layer whose weights are added to those of a layer beside it.

    Attributes:
        layer: which; it gives zeros from then on.
        into: the other one.
        sign: of its output relative to the other's, 1 or -1.
        is_overwritten: whether the sum is written over its output.
    """

    layer: Layer
    into: Layer
    sign: int
    is_overwritten: bool


def merges(flow: Flow[Layer], fits: Callable[[Layer, Layer], bool]) -> list[Merge[Layer]]:
    """Return which layers are merged, in the order in which their weights are added.

    A layer is called once, and nothing but the sum reads its output, nor that of the layer that takes it.

    Args:
        flow: of the model.
        fits: whether a layer's weights have a place in another one's.
    """
    found: list[Merge[Layer]] = []
    times = Counter(call.module for call in flow.calls)
    seen: set[Call[Layer]] = set()
    for call in flow.calls:
        if call.module is None or call.axes == "same" or call in seen or len(call.gives) != 1:
            continue
        terms = {term.value.maker: term for term in whole_sum(call.gives[0])}
        seen.update(maker for maker in terms if maker is not None)
        left = [
            (maker, maker.module, term)
            for maker, term in terms.items()
            if maker is not None and maker.module is not None and times[maker.module] == 1 and term.is_alone
        ]
        for one in list(left):
            for other in left:
                if one is not other and _reads_the_same(one[0], other[0]) and fits(one[1], other[1]):
                    sign = one[2].sign * other[2].sign
                    found.append(Merge(one[1], other[1], sign, one[2].is_written))
                    left.remove(one)
                    break
    return found


def _reads_the_same(one: Call[Layer], other: Call[Layer]) -> bool:
    return len(one.reads) == len(other.reads) == 1 and origin(one.reads[0]) is origin(other.reads[0])
