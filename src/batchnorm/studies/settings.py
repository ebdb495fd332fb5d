"""What a training run of a study is made of, and the names of its parts in files and reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Each with the learning rates that a study tries unless it is told; where it tries fewer, the first of them.
OPTIMIZERS: dict[str, tuple[float, ...]] = {
    "sgd": (1e-1, 1e-2, 1.0),
    "adam": (1e-2, 1e-3, 1e-4),
    "adamw": (1e-2, 1e-3, 1e-4),
}


@dataclass(frozen=True)
class Setting:
    """The setting in which the arms of a study are compared.

    Attributes:
        data: name of a data set, or the user's own as `file.py:function`.
        network: name of a network, or the user's own as `file.py:function`.
        batch_size: examples per step; a last, smaller batch of an epoch is left out.
        depth: of the network, for one that can have several; None for its own.
    """

    data: str
    network: str
    batch_size: int
    depth: int | None = None

    @property
    def network_name(self) -> str:
        """The network's name as reports show it, such as `mlp`, `deep(16)` or `net.py:build`."""
        return display_name(self.network) + ("" if self.depth is None else f"({self.depth})")

    def without_folders(self) -> Setting:
        """Returns it as records and results name it."""
        return replace(self, data=display_name(self.data), network=display_name(self.network))

    @property
    def file_name(self) -> str:
        """The name of files about this setting, without their ending."""
        return f"{slug(display_name(self.data))}-{slug(self.network_name)}-{self.batch_size}"


@dataclass(frozen=True)
class Recipe:
    """How every run of a study trains.

    Attributes:
        epochs: passes over the training data.
        optimizer: of `OPTIMIZERS`: SGD, Adam (betas 0.9 and 0.999, eps 1e-8) or AdamW; no schedule.
        momentum: of SGD.
        weight_decay: of the weights of dense and convolution layers, as `torch.optim` defines it: a part of
            the gradient in SGD and Adam, apart from it in AdamW.
        target_accuracy: the held-out accuracy, or other metric, at which `steps_to_target` stops counting.
        loss, metric: of `objectives.LOSSES` and `objectives.METRICS`, or the user's own, `file.py:function`.
    """

    epochs: int = 10
    optimizer: str = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    target_accuracy: float = 0.85
    loss: str = "cross_entropy"
    metric: str = "accuracy"

    def describe_optimizer(self) -> str:
        """Returns the optimizer with its constants, in words."""
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        if self.optimizer == "sgd":
            return f"SGD (momentum {self.momentum:g}{decay}, no schedule)"
        name = {"adam": "Adam", "adamw": "AdamW"}[self.optimizer]
        return f"{name} (betas 0.9 and 0.999, eps 1e-8{decay}, no schedule)"


def setting_names(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Returns a name for each setting that says what tells it from the others: `deep`, `mlp on digits`."""
    by_data = len({setting.data for setting in settings}) > 1
    by_batch = len({setting.batch_size for setting in settings}) > 1
    return {
        setting: setting.network_name
        + (f" on {display_name(setting.data)}" if by_data else "")
        + (f", batches of {setting.batch_size}" if by_batch else "")
        for setting in settings
    }


def run_name(setting: Setting, arm: str, rate: float, seed: int) -> str:
    """Returns the name of a run's file, without its ending."""
    return f"{setting.file_name}-{slug(arm)}-{shown_number(rate)}-{seed}"


def display_name(spec: str) -> str:
    """Returns a network's or data set's name without folders: `/home/x/net.py:build` is `net.py:build`."""
    place, colon, function = spec.rpartition(":")
    return f"{Path(place).name}:{function}" if colon else spec


def shown_number(value: float) -> str:
    """Returns the shortest text that reads back as the same number, such as 0.001 or 3e-05."""
    return repr(float(value)).removesuffix(".0")


def slug(name: str) -> str:
    """Returns a name made safe for files on every system."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-")
