"""`merge_statistics`: the running statistics of the data of several models or clients together."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from batchnorm.errors import ArgumentTypeError, DataError, OptionError
from batchnorm.statistics.calibration import Accumulator, Count, count_of
from batchnorm.statistics.moments import PooledMoments

from .calibration.packing import Layout
from .calibration.ranks import Ranks
from .state_files import check_state, read_state

State = Mapping[str, Tensor] | str | Path

# `features.1.running_mean`, and `features.1.running_mean_2` for domain 2.
_MEAN = re.compile(r"(?:(.*)\.)?running_mean((?:_\d+)?)")


class _Names(NamedTuple):
    """The names of one set of running statistics in a state.

    Attributes:
        layer: the layer's name.
        mean, var, batches: those of the tensors; a state may lack the last.
    """

    layer: str
    mean: str
    var: str
    batches: str


def merge_statistics(
    states: Iterable[State],
    counts: Iterable[Count],
    *,
    group: distributed.ProcessGroup | Literal[False] | None = False,
) -> dict[str, Tensor]:
    """Merge the running statistics of several models into those of all their data together.

        n = Σ n_k        running_mean = Σ n_k mean_k / n
        running_var = (Σ (n_k - 1) var_k + Σ n_k (mean_k - running_mean)²) / (n - 1)

    where state k has mean_k, and the unbiased var_k, of n_k values per channel. That is exact: where each
    state has the statistics of all of its data, as after `calibrate`, the result has those of the pooled
    data. An average of the variances would lack the second sum, which is how far the means are apart.

    Args:
        states: a state_dict each, or the file of one: safetensors (needs that package), or what `torch.save`
            wrote, of which no code runs. They have the same batch normalizations.
        counts: n_k of each state, values per channel: a number for all layers, a dict by the layer's name
            (of further domains by that of their buffer, `features.1.running_mean_2`), or the report of
            `calibrate`. 0 = without data: the state's statistics are not looked at.
        group: of torch.distributed, whose processes call this together, each with states of its own, and get
            the same result bit for bit; None = all processes, False = this process alone.

    Returns:
        The merged statistics by the names in the states, and the sum of `num_batches_tracked`; on the device
        and in the dtype of the first state, for `model.load_state_dict(merged, strict=False)`.

    Raises:
        DataError: (a ValueError) a state without running statistics, states of different layers, statistics
            that are not finite, fewer than two values in all, or a file that is no state.
        OptionError: (a ValueError) a count that is missing, negative or not finite; not a count per state.
        FileError, RankError: (an OSError, a RuntimeError) a file cannot be read, another process raised.

    Example:
        >>> clients = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
        >>> merged = batchnorm.merge_statistics([c.state_dict() for c in clients], counts=[900, 100])
        >>> nn.BatchNorm1d(4).load_state_dict(merged, strict=False).unexpected_keys
        []

    Source: Chan, Golub & LeVeque, The American Statistician 37 (1983), equation 2.1;
    https://github.com/TsingZ0/PFLlib/issues/260 (buffers left out of federated averages).
    """
    ranks = Ranks(group, "merge_statistics")
    found: list[_Merged] = []

    def merge_own() -> Tensor:
        found.append(_Merged(states, counts))
        return torch.tensor([found[0].identity], dtype=torch.float64)

    if len({row.item() for row in ranks.gather(merge_own, 1)}) > 1:
        raise DataError(
            "the states of the ranks are not of the same layers: a model of one kind on all ranks"
        )
    (own,) = found
    total = ranks.accumulated(lambda: own.accumulated, own.layout)
    batches = ranks.gather(lambda: own.batches, len(own.names))
    return own.result(total, torch.stack(batches).sum(0))


class _Merged:
    """The states of this process, merged.

    Args: those of `merge_statistics`.

    Attributes:
        names: of each set of running statistics.
        layout: where each lies in a row of numbers.
        accumulated: the moments, by the name of the mean.
        batches: sums of `num_batches_tracked`, in the order of `names`.
    """

    def __init__(self, states: Iterable[State], counts: Iterable[Count]) -> None:
        read, given = _states(states), list(counts)
        if len(read) != len(given):
            raise OptionError(
                f"counts must have one entry per state: got {len(given)} for {len(read)} states"
            )
        label, self._first = read[0]
        self.names = _names(self._first, label)
        self.layout = Layout({name.mean: self._first[name.mean].numel() for name in self.names})
        self.accumulated = Accumulator()
        self.batches = torch.zeros(len(self.names), dtype=torch.float64)
        for (state_label, state), count in zip(read, given, strict=True):
            _check_same(state, state_label, self._first, label)
            for number, name in enumerate(self.names):
                values = count_of(count, name.layer, name.mean, state_label)
                if name.batches in state:
                    self.batches[number] += int(state[name.batches])
                if values:
                    self.accumulated.add(name.mean, _moments(state, name, values, state_label))

    @property
    def identity(self) -> int:
        """A number that other layers or channels do not have."""
        return zlib.crc32(json.dumps(dict(self.layout.channels)).encode())

    def result(self, total: Accumulator, batches: Tensor) -> dict[str, Tensor]:
        """Return the merged statistics of all processes as a state."""
        merged: dict[str, Tensor] = {}
        for name, number in zip(self.names, batches.tolist(), strict=True):
            found = total.moments.get(name.mean)
            count = 0.0 if found is None else float(found.count)
            if found is None or count < 2:
                raise DataError(
                    f"{count:g} values per channel in all states: two or more have a variance", name.layer
                )
            for key, value in ((name.mean, found.mean), (name.var, found.m2 / (count - 1))):
                merged[key] = value.to(self._first[key])
            if name.batches in self._first:
                merged[name.batches] = torch.full_like(self._first[name.batches], int(number))
        return merged


def _states(states: Iterable[State]) -> list[tuple[str, Mapping[str, Tensor]]]:
    """Return each state with its name for errors: its number, or its file."""
    if isinstance(states, (Mapping, str, Path, nn.Module)) or not isinstance(states, Iterable):
        raise ArgumentTypeError(
            f"states must be a list of state_dicts or files; got one {type(states).__name__}: make it a list"
        )
    found: list[tuple[str, Mapping[str, Tensor]]] = []
    for number, state in enumerate(states):
        if isinstance(state, (str, Path)):
            found.append((str(state), read_state(Path(state))))
            continue
        if isinstance(state, nn.Module):
            raise ArgumentTypeError(f"states[{number}] is a model: pass its .state_dict()")
        try:
            check_state(state)
        except DataError as error:
            raise DataError(f"states[{number}]: {error}") from None
        found.append((f"states[{number}]", state))
    if not found:
        raise DataError("there is no state to merge: each process needs one or more")
    return found


def _names(state: Mapping[str, Tensor], label: str) -> Sequence[_Names]:
    """Return the names of all sets of running statistics in a state, in its order."""
    names = []
    for key in state:
        if (match := _MEAN.fullmatch(key)) is not None:
            prefix, end = key[: match.start(2)].removesuffix("running_mean"), match[2]
            ends = (f"{name}{end}" for name in ("running_var", "num_batches_tracked"))
            names.append(_Names(match[1] or "", key, *(prefix + name for name in ends)))
    names = [name for name in names if name.var in state]
    if not names:
        raise DataError(f"{label} has no running statistics: no running_mean beside a running_var")
    return names


def _check_same(state: Mapping[str, Tensor], label: str, first: Mapping[str, Tensor], of_first: str) -> None:
    """Raise DataError unless a state has the layers and channels of the first."""
    own, wanted = (
        {key for n in _names(s, w) for key in n[1:3]} for s, w in ((state, label), (first, of_first))
    )
    for key in sorted(own ^ wanted):
        has, lacks = (label, of_first) if key in own else (of_first, label)
        raise DataError(f"{has} has {key} and {lacks} has not: merge states of the same model")
    for key in wanted:
        if state[key].shape != first[key].shape:
            raise DataError(
                f"{key} has shape {list(state[key].shape)} in {label} and {list(first[key].shape)} in "
                f"{of_first}: merge states of the same model"
            )


def _moments(state: Mapping[str, Tensor], name: _Names, count: float, label: str) -> PooledMoments:
    """Return the moments that a state's statistics of `count` values stand for."""
    mean, var = (state[key].detach().cpu().double().reshape(-1) for key in (name.mean, name.var))
    if not (mean.isfinite().all() and var.isfinite().all() and bool((var >= 0).all())):
        raise DataError(
            f"{label} has NaN, inf or a negative variance in {name.mean} or {name.var}: leave the state out "
            "(count 0), or calibrate its model"
        )
    return PooledMoments(count, mean, var * max(count - 1, 0.0))
