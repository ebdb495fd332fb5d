"""Records what checks look at: the state of each norm, and its place in the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Framework = Literal["torch", "keras"]


@dataclass(frozen=True)
class NormState:
    """A batch normalization as it is.

    Attributes:
        name: qualified name in the model.
        kind: its class.
        is_stock: whether it is the framework's own layer, not this library's.
        training: whether it normalizes by its batch now.
        is_tracked: whether it has running statistics.
        moves: whether they move in training.
        momentum: in torch's convention, the batch's share; None = plain average.
        warm_start: whether the first batch replaces the initial 0 and 1.
        eps: added to var.
        mean, var: the running statistics, `[C]`; None without.
        batches: number of batches that have moved them; None where it is not counted.
        dtype: of the running statistics.
        weight, bias: `[C]`; None without.
        learns: whether weight or bias is trained.
        is_synchronized: whether it shares moments over processes.
        places: names under which it is registered.
        adapts: whether evaluation depends on the batch by its policy (`Adapted`).
        unreadable: why it has no values to look at; "" where it has.
    """

    name: str
    kind: str
    is_stock: bool = True
    training: bool = False
    is_tracked: bool = True
    moves: bool = True
    momentum: float | None = 0.1
    warm_start: bool = False
    eps: float = 1e-5
    mean: Array | None = None
    var: Array | None = None
    batches: int | None = None
    dtype: str = "float32"
    weight: Array | None = None
    bias: Array | None = None
    learns: bool = True
    is_synchronized: bool = False
    places: tuple[str, ...] = ()
    adapts: bool = False
    unreadable: str = ""

    @property
    def is_initial(self) -> bool:
        """Whether the running statistics are exactly 0 and 1."""
        return (
            self.mean is not None
            and self.var is not None
            and bool((self.mean == 0).all() and (self.var == 1).all())
        )

    @property
    def is_trained(self) -> bool:
        """Whether weight and bias differ from channel to channel.

        Both do once they were trained; networks begin with a random weight here and there, but not with both.
        """
        both = [values for values in (self.weight, self.bias) if values is not None]
        return bool(both) and all(map(_is_learned, both))


def _is_learned(values: Array) -> bool:
    if values.size == 1:
        return float(values[0]) not in (0.0, 1.0)
    return bool((values != values[0]).any())


@dataclass(frozen=True)
class Place:
    """What surrounds a norm in the forward.

    Attributes:
        calls: number of calls in one forward; None where it is not known.
        biased: the layers right before it whose bias it removes.
        dropout: the dropout right before it; None without.
        rate: of that dropout; None where it is not known.
        values: number of values per channel and sample; None where it is not known.
    """

    calls: int | None = None
    biased: tuple[str, ...] = ()
    dropout: str | None = None
    rate: float | None = None
    values: int | None = None


@dataclass(frozen=True)
class DecayedGroup:
    """A group of an optimizer with weight decay, and the norms whose weight or bias is in it."""

    weight_decay: float
    learning_rate: float
    norms: tuple[str, ...]


@dataclass(frozen=True)
class ModelState:
    """A model as it is.

    Attributes:
        name: its class.
        framework: of the model; decides the words of remedies.
        norms: its batch normalizations, in the order of the model.
        training: whether the model is in training mode.
        learns: whether any parameter is trained.
        places: by the name of the norm, where known.
        decayed: groups of the optimizer with weight decay on norms.
        fixed: names of graphs whose norms are fixed in training.
    """

    name: str
    framework: Framework
    norms: tuple[NormState, ...]
    training: bool = False
    learns: bool = True
    places: dict[str, Place] = field(default_factory=dict)
    decayed: tuple[DecayedGroup, ...] = ()
    fixed: tuple[str, ...] = ()
