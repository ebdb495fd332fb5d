"""Pictures of a network over batch sizes or depths: accuracy and steps to the target, a line per arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from batchnorm.studies.verdicts import formatting as q
from batchnorm.studies.verdicts.results import Network

from .canvas import Picture
from .multiples import bands_picture, log_axis, percent_axis, style_of
from .values import Band, Curve, Values

Vertical = Callable[[Axes], None]  # sets up the vertical axis of a panel

_AXES = {"batch_size": "batch size", "depth": "depth"}


@dataclass(frozen=True)
class Axis:
    """A network at several values of one setting.

    Attributes:
        name: of the network, and of its data where a study has several.
        what: the setting, "batch size" or "depth".
        networks: by its value, ascending.
    """

    name: str
    what: str
    networks: Mapping[int, Network]

    def pictures(self, prefix: str) -> tuple[Picture, ...]:
        """Draws accuracy, and steps to the target where it was reached, each arm at its best rate."""
        accuracy = replace(self._values("accuracy", "held-out accuracy"), percent=True)
        steps = replace(self._values("steps_to_target", "training steps"), log_y=True)
        pictures = []
        if accuracy.bands():
            title = f"Held-out accuracy, by {self.what}"
            pictures.append(self._picture(f"{prefix}-accuracy", title, accuracy, q.percent, percent_axis))
        if steps.bands():
            target = q.percent(next(iter(self.networks.values())).target)
            title = f"Steps to {target} held-out accuracy, by {self.what}, log scale"
            pictures.append(self._picture(f"{prefix}-steps", title, steps, q.count, log_axis))
        return tuple(pictures)

    def _values(self, measure: str, y: str) -> Values:
        found: dict[tuple[str, int], dict[int, float]] = {}
        arms = dict.fromkeys(arm for network in self.networks.values() for arm in network.arms)
        for arm in arms:
            for place, network in self.networks.items():
                for seed, run in network.at_best(arm).items():
                    found.setdefault((arm, seed), {})[place] = getattr(run, measure)
        curves = [
            Curve(labels, list(of.values()), list(of), style=style_of(labels[0]))
            for labels, of in found.items()
        ]
        return Values(("arm", "seed"), y, curves, self.what, log_x=True)

    def _picture(self, key: str, title: str, values: Values, show: q.Show, vertical: Vertical) -> Picture:
        def told(band: Band) -> str:
            return ", ".join(f"{show(one.mean)} at {x:g}" for x, one in band.items())

        parts = [f"{arm} {told(band)}" for arm, band in values.bands().items()]
        alt = f"{title} of {self.name}, each arm at its best learning rate. {'; '.join(parts)}."
        places = list(self.networks)

        def decorate(axes: Axes) -> None:
            axes.set_xscale("log")
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.xaxis.set_minor_locator(NullLocator())
            vertical(axes)

        return bands_picture(key, title, alt, values, decorate)


def axes_of(networks: Sequence[Network]) -> list[Axis]:
    """Returns every network that was trained at several batch sizes or depths, all else being the same."""
    found = []
    for field, what in _AXES.items():
        groups: dict[object, dict[int, Network]] = {}
        for network in networks:
            value = getattr(network.setting, field)
            if value is not None:
                setting = network.setting
                rest = replace(setting, depth=0) if field == "depth" else replace(setting, batch_size=0)
                groups.setdefault(rest, {})[value] = network
        for group in groups.values():
            if len(group) > 1:
                first = next(iter(group.values())).setting
                other = f", batches of {first.batch_size}" if field == "depth" else ""
                shown = first.network_name if field == "batch_size" else first.network
                name = f"{shown} on {first.data}{other}"
                found.append(Axis(name, what, dict(sorted(group.items()))))
    return found
