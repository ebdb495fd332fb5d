"""Time of one layer, ours and its rivals interleaved: with the default allocator, and `reuse_memory()`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from . import layer_cases
from .interleaved import clocked, interleave, ratio, rest, rest_and_wake
from .layer_cases import Case
from .layer_rivals import steps
from .progress import progress
from .reusing_process import REUSING, ReusingProcess
from .tables import Row, Rows

# Values of a tensor -> rounds; a short step is a noisy one.
_ROUNDS = ((layer_cases.TINY, 201), (layer_cases.LARGE, 101), (2**22, 41))
_LEAST_ROUNDS, _QUICK_ROUNDS, _MOST_ROUNDS_RESTED = 25, 7, 31


def measure(quick: bool = False) -> Rows:
    """Return a row per case: medians in seconds, and the ratio of each rival to ours, round by round."""
    found = []
    for case in progress(layer_cases.cases(quick), "layers"):
        found.append(_measured(case, _rounds(case, quick)))
    return found


def _measured(case: Case, rounds: int) -> Row:
    """Time a case; rivals with threads of their own afterwards, beside ours again and with rests between."""
    others = tuple(name for name in case.rivals if name in layer_cases.OTHER_RIVALS)
    plain = replace(case, rivals=tuple(name for name in case.rivals if name not in others))
    first = row(case, interleave({name: clocked(step) for name, step in steps(plain).items()}, rounds))
    if not others:
        return first
    rested = {
        name: clocked(step, rest) for name, step in steps(replace(case, rivals=("ours", *others))).items()
    }
    second = row(case, interleave(rested, min(rounds, _MOST_ROUNDS_RESTED)))
    return first | {part: second[part] | first[part] for part in ("rivals", "ratios")}


def measure_reusing_memory(quick: bool = False) -> Rows:
    """Return a row per case, with and without `reuse_memory()`: two processes take turns."""
    found = []
    with ReusingProcess(steps) as other:
        for case in progress(layer_cases.reuse_memory_cases(quick), "layers, with reuse_memory()"):
            rivals = {name: clocked(step, rest_and_wake) for name, step in steps(case).items()}
            rivals |= {name + REUSING: step for name, step in other.prepare(case).items()}
            times = interleave(rivals, min(_rounds(case, quick), _MOST_ROUNDS_RESTED))
            found.append(row(case, times, {"": "copy", REUSING: "copy" + REUSING}))
    return found


def row(
    case: Case, times: dict[str, list[float]], copies: Mapping[str, str] = MappingProxyType({"": "copy"})
) -> Row:
    """Return what a result file holds of a case.

    Args:
        case: what was measured.
        times: seconds per rival and round.
        copies: ending of a rival's name -> whose times are those of a copy in the same process.
    """
    passes = {ending: statistics.median(times[name]) / 2 for ending, name in copies.items()}
    rivals, ratios = {}, {}
    for name, taken in times.items():
        if name in copies.values():
            continue
        seconds = statistics.median(taken)
        ending = REUSING if name.endswith(REUSING) else ""
        rivals[name] = {
            "seconds": seconds,
            "gigabytes_per_second": case.bytes_moved / seconds / 1e9,
            "over_floor": seconds / (case.passes * passes[ending]),
        }
        for ours in ("ours" + REUSING,) if ending else ("ours", "ours" + REUSING):
            if ours in times and not name.startswith("ours"):
                ratios[f"{name} / {ours}"] = ratio(taken, times[ours])
    return {
        "operation": case.operation,
        "network": case.network,
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": case.dtype,
        "values": case.values,
        "tensor_bytes": case.tensor_bytes,
        "bytes_moved": case.bytes_moved,
        "copy_seconds": {name: statistics.median(times[name]) for name in copies.values()},
        "rivals": rivals,
        "ratios": ratios,
    }


def _rounds(case: Case, quick: bool) -> int:
    if quick:
        return _QUICK_ROUNDS
    return next((rounds for values, rounds in _ROUNDS if case.values <= values), _LEAST_ROUNDS)
