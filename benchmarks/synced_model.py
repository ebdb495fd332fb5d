"""Models the cost of synchronizing a network, by two figures of a cluster: latency and bandwidth.

`python -m benchmarks.synced_model --ranks 8 --latency 20e-6 --bandwidth 10e9` prints it for ResNet-50.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

from . import networks
from .tables import Rows, table

_NUMBER = 8  # bytes of a float64


def terms(kind: str, packet: float, ranks: int) -> tuple[float, float]:
    """Return how many latencies a collective takes, and how many bytes follow each other on its way.

    With R ranks and packets of p bytes, gathering takes ⌈log2 R⌉ rounds and moves all (R - 1) p; adding takes
    as many rounds of p each:

        gather  ⌈log2 R⌉ latency + (R - 1) p / bandwidth
        add     ⌈log2 R⌉ (latency + p / bandwidth)
    """
    rounds = math.ceil(math.log2(ranks)) if ranks > 1 else 0
    return float(rounds), (ranks - 1.0) * packet if kind == "gather" else rounds * packet


def fit(rows: Rows) -> tuple[float, float]:
    """Return latency in seconds and bandwidth in bytes per second, fitted to measured collectives.

    Least squares of relative errors: a packet of 1 MB counts no more than one of 1 KB.
    """
    equations, values = [], []
    for row in rows:
        for kind in ("gather", "add"):
            if "packet_bytes" in row:
                seconds = row["seconds"][kind]
                latencies, moved = terms(kind, row["packet_bytes"], row["ranks"])
                equations.append((latencies / seconds, moved / seconds))
                values.append(1.0)
    (latency, per_byte), *_ = np.linalg.lstsq(np.array(equations), np.array(values), rcond=None)
    return float(latency), 1.0 / float(per_byte)


def seconds_of(
    channels: Sequence[int], ranks: int, latency: float, bandwidth: float, packed: int = 1
) -> tuple[float, float]:
    """Return the seconds that a step's collectives take: waiting, and moving bytes.

    Args:
        channels: of each norm.
        packed: norms whose messages travel as one.
    """
    waiting = moving = 0.0
    for count in channels:
        for kind, numbers in (("gather", 2 + 2 * count), ("add", 2 * count)):
            latencies, moved = terms(kind, _NUMBER * numbers, ranks)
            waiting += latencies * latency / packed
            moving += moved / bandwidth
    return waiting, moving


def resnet50() -> tuple[int, ...]:
    """Return the channels of each norm of ResNet-50."""
    with torch.device("meta"):
        model = networks.NETWORKS["ResNet-50"](networks.stock)
    return tuple(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def model_table(ranks: Sequence[int], latency: float, bandwidth: float) -> str:
    """Milliseconds per step of ResNet-50, message by message and with several norms' messages as one."""
    channels = resnet50()
    rows = []
    for count in ranks:
        cells = [str(count)]
        for packed in (1, 2, 4):
            waiting, moving = seconds_of(channels, count, latency, bandwidth, packed)
            cells.append(f"{(waiting + moving) * 1e3:.2f}")
            if packed == 1:
                cells.append(f"{waiting * 1e3:.2f}")
        rows.append(tuple(cells))
    return table(("ranks", "ms per step", "of which waiting", "2 norms a message", "4 norms a message"), rows)


def fitted_table(rows: Rows) -> str:
    """The fit to this machine's collectives, and how far off it is."""
    latency, bandwidth = fit(rows)
    errors = []
    for row in (row for row in rows if "packet_bytes" in row):
        for kind in ("gather", "add"):
            latencies, moved = terms(kind, row["packet_bytes"], row["ranks"])
            errors.append((latencies * latency + moved / bandwidth) / row["seconds"][kind])
    low, high = min(errors), max(errors)
    return (
        f"Fitted to the collectives below: latency {latency * 1e6:.0f} µs, bandwidth {bandwidth / 1e9:.2f} "
        f"GB/s; the model is {low:.2f} to {high:.2f} times what was measured. ResNet-50 with these:\n\n"
        + model_table((2, 4, 8, 16), latency, bandwidth)
    )


def main(
    latency: Annotated[
        float, typer.Option(help="Seconds from one rank's send to another's receive.")
    ] = 20e-6,
    bandwidth: Annotated[float, typer.Option(help="Bytes per second from one rank to another.")] = 10e9,
    ranks: Annotated[
        list[int] | None, typer.Option(help="Number of ranks; several times for several.")
    ] = None,
) -> None:
    """Print what synchronizing ResNet-50 costs per step on a cluster of these two figures."""
    typer.echo(model_table(ranks or (2, 4, 8, 16, 64), latency, bandwidth))


if __name__ == "__main__":
    typer.run(main)
