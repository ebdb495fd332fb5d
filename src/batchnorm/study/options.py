"""The options of a study, checked before anything runs."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from batchnorm.errors import OptionError

from .arms import UNMASKED, parse_arm
from .data import source_named
from .frameworks import FRAMEWORKS, keras_backend
from .networks import NETWORKS
from .user_code import is_user_code

ARMS = ("none", "batchnorm", "dropout", "l1", "l2", "layernorm", "batchnorm+dropout")
ARMS_WITH_PADDING = ("none", "batchnorm", UNMASKED, "dropout", "l2", "layernorm", "batchnorm+dropout")


@dataclass(frozen=True)
class StudyOptions:
    """The options of `batchnorm study`.

    Attributes:
        networks: of `networks.NETWORKS`, or the user's own as `file.py:function`; `auto` alone is those of
            the data.
        data: of `data.SOURCES`, or the user's own as `file.py:function`.
        data_dir: where `mnist` is looked for.
        arms: see `arms.parse_arm`; `auto` alone is those of the data.
        learning_rates: Adam's, each above 0.
        seeds: how many; they are 0, 1, 2, ...
        epochs: passes over the training data.
        batch_size: examples per step; a last, smaller batch of an epoch is left out.
        target_accuracy: the fraction of held-out examples at which `steps_to_target` stops counting.
        jobs: training runs at a time, each on one thread; None for one per core.
        out: the study's folder; None for `runs/study-<data>-<networks>`, with Keras
            `runs/study-keras-<backend>-<data>-<networks>`.
        framework: `torch`, or `keras` on the backend that it takes when it is imported.

    Raises:
        OptionError: a value outside its range, or an unknown name.
    """

    networks: tuple[str, ...] = ("auto",)
    data: str = "digits"
    data_dir: Path | None = None
    arms: tuple[str, ...] = ("auto",)
    learning_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    seeds: int = 3
    epochs: int = 10
    batch_size: int = 32
    target_accuracy: float = 0.85
    jobs: int | None = None
    out: Path | None = None
    framework: str = "torch"

    def __post_init__(self) -> None:
        if self.networks == ("auto",):
            object.__setattr__(self, "networks", source_named(self.data).networks)
        if self.arms == ("auto",):
            object.__setattr__(self, "arms", ARMS_WITH_PADDING if source_named(self.data).is_padded else ARMS)
        for field, what in (("networks", "network"), ("arms", "arm"), ("learning_rates", "learning rate")):
            values = tuple(dict.fromkeys(getattr(self, field)))
            object.__setattr__(self, field, values)
            if not values:
                raise OptionError(f"no {what} was given")
        if self.framework not in FRAMEWORKS:
            raise OptionError(f"unknown framework {self.framework!r}: known are {', '.join(FRAMEWORKS)}")
        for name in self.networks:
            if name not in NETWORKS and not is_user_code(name):
                known = ", ".join(NETWORKS)
                raise OptionError(
                    f"unknown network {name!r}: known are {known}, or your own as file.py:function"
                )
        for arm in self.arms:
            parse_arm(arm)
        for rate in self.learning_rates:
            if not (math.isfinite(rate) and rate > 0):
                raise OptionError(f"learning rate {rate} is not a number above 0")
        for field, least in (("seeds", 1), ("epochs", 1), ("batch_size", 1), ("jobs", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise OptionError(f"--{field.replace('_', '-')} {value} is below {least}")
        if not 0 < self.target_accuracy <= 1:
            raise OptionError(
                f"--target-accuracy {self.target_accuracy} is not a fraction above 0 and up to 1"
            )
        object.__setattr__(self, "learning_rates", tuple(map(float, self.learning_rates)))
        self._check_that_no_two_runs_share_a_file()

    def _check_that_no_two_runs_share_a_file(self) -> None:
        """Raises where two runs would have one name, also on a file system that ignores case.

        One seed is enough, as a name ends with it.
        """
        runs: dict[str, str] = {}
        for network, arm, rate in itertools.product(self.networks, self.arms, self.learning_rates):
            name, run = run_name(network, arm, rate, 0), f"{network}, {arm}, {shown_number(rate)}"
            if (other := runs.setdefault(name.casefold(), run)) != run:
                raise OptionError(
                    f"two runs would share the file {name}.json: {other} and {run}; rename a network's file "
                    "or function, or study them in two folders"
                )

    @property
    def folder(self) -> Path:
        """The folder of the files: one for each framework, data and networks, where a study resumes."""
        if self.out is not None:
            return self.out
        names = [slug(display_name(name)) for name in (self.data, *self.networks)]
        which = ["study"] if self.framework == "torch" else ["study", "keras", slug(keras_backend())]
        return Path("runs") / "-".join((*which, *names))

    @property
    def workers(self) -> int:
        return self.jobs if self.jobs is not None else usable_cores()

    def command(self) -> str:
        """Returns the command line of this study, without folders, as a shell reads it."""
        backend = f"KERAS_BACKEND={shlex.quote(keras_backend())} " if self.framework == "keras" else ""
        parts: dict[str, object] = {
            **({"framework": self.framework} if backend else {}),
            "network": ",".join(map(display_name, self.networks)),
            "data": display_name(self.data),
            "arms": ",".join(self.arms),
            "learning-rate": ",".join(map(shown_number, self.learning_rates)),
            "seeds": self.seeds,
            "epochs": self.epochs,
            "batch-size": self.batch_size,
            "target-accuracy": shown_number(self.target_accuracy),
        }
        words = [word for name, value in parts.items() for word in (f"--{name}", str(value))]
        return backend + shlex.join(["batchnorm", "study", *words])


def usable_cores() -> int:
    """Returns the cores that this process may use: fewer than there are under taskset or a batch system."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def display_name(spec: str) -> str:
    """Returns a network's or data set's name without folders: `/home/x/net.py:build` is `net.py:build`."""
    place, colon, function = spec.rpartition(":")
    return f"{Path(place).name}:{function}" if colon else spec


def shown_number(value: float) -> str:
    """Returns the shortest text that reads back as the same number, such as 0.001 or 3e-05."""
    return repr(float(value)).removesuffix(".0")


def run_name(network: str, arm: str, rate: float, seed: int) -> str:
    """Returns the name of a run's file, without its ending."""
    return f"{slug(display_name(network))}-{slug(arm)}-{shown_number(rate)}-{seed}"


def slug(name: str) -> str:
    """Returns a name made safe for files on every system."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-")


def split_list(text: str) -> tuple[str, ...]:
    """Returns the parts of a comma-separated list, without blanks."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_rates(parts: Iterable[str]) -> tuple[float, ...]:
    """Returns learning rates from text.

    Raises:
        OptionError: one is not a number.
    """
    rates = []
    for part in parts:
        try:
            rates.append(float(part))
        except ValueError:
            raise OptionError(f"learning rate {part!r} is not a number") from None
    return tuple(rates)
