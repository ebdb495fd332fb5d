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
from typing import TypeVar

from batchnorm.errors import OptionError

from .arms import UNMASKED, parse_arm, split_outside_brackets
from .data import SOURCES, source_named
from .frameworks import FRAMEWORKS, keras_backend
from .networks import NETWORKS
from .objectives import check_objective, default_metric
from .settings import OPTIMIZERS, Recipe, Setting, display_name, run_name, shown_number, slug
from .user_code import is_user_code

ARMS = ("none", "batchnorm", "dropout", "l1", "l2", "layernorm", "batchnorm+dropout")
ARMS_WITH_PADDING = ("none", "batchnorm", UNMASKED, "dropout", "l2", "layernorm", "batchnorm+dropout")
# Of several data sets, unless they are told: a first look at each, in minutes.
FEWER_ARMS = ("none", "batchnorm", "layernorm")
FEWER_ARMS_WITH_PADDING = ("none", "batchnorm", UNMASKED)
AUTO = ("auto",)
_MOMENTUM = 0.9  # of SGD
# A host by its name or number, an IPv6 one in brackets, and a port.
_EXECUTOR = re.compile(r"dask:(tcp|tls)://([\w.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class StudyOptions:
    """The options of `batchnorm study`.

    Attributes:
        networks: of `networks.NETWORKS`, or the user's own as `file.py:function`; `auto` alone is those of
            the data.
        data: of `data.SOURCES`, or the user's own as `file.py:function`.
        data_dir: where `mnist` is looked for.
        arms: see `arms.parse_arm`; `auto` alone is those of the data, and fewer with several data sets.
        learning_rates: each above 0; None for those of the optimizer, and fewer with several data sets.
        seeds: how many; they are 0, 1, 2, ...
        epochs: passes over the training data; None for those of the data, and fewer with several data sets.
        weight_decay, target_accuracy, loss: see `settings.Recipe`.
        metric: see `settings.Recipe`; None for `accuracy` with `cross_entropy`, else `r2`.
        batch_sizes, depths: see `settings.Setting`; without them data and networks have their own.
        optimizer: of `settings.OPTIMIZERS`.
        momentum: of SGD alone; None for 0.9.
        jobs: training runs at a time, each on one thread; None for one per core, or thread of a cluster.
        executor: `dask:` and the address of a scheduler, as in `dask:tcp://host:8786`; None for this machine.
        out: the study's folder; None for `runs/study-<data>`, with the networks' names where they are chosen
            and `keras-<backend>` where it is Keras.
        framework: `torch`, or `keras` on the backend that it takes when it is imported.
        padded: the user's own data that turned out to have padding when it was loaded.

    Raises:
        OptionError: a value outside its range, or an unknown name.
    """

    networks: tuple[str, ...] = AUTO
    data: tuple[str, ...] = ("digits", "vowels", "languages")
    data_dir: Path | None = None
    arms: tuple[str, ...] = AUTO
    learning_rates: tuple[float, ...] | None = None
    seeds: int = 5
    epochs: int | None = None
    batch_sizes: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    optimizer: str = "adam"
    momentum: float | None = None
    weight_decay: float = 0.0
    loss: str = "cross_entropy"
    metric: str | None = None
    target_accuracy: float = 0.85
    jobs: int | None = None
    out: Path | None = None
    framework: str = "torch"
    executor: str | None = None
    padded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(f"unknown optimizer {self.optimizer!r}: known are {', '.join(OPTIMIZERS)}")
        if self.metric is None:
            object.__setattr__(self, "metric", default_metric(self.loss))
        assert self.metric is not None
        check_objective(self.loss, self.metric)
        for field, what in _LISTS.items():
            if getattr(self, field) is None:
                continue
            values = tuple(dict.fromkeys(getattr(self, field)))
            object.__setattr__(self, field, values)
            if not values and field not in ("depths", "batch_sizes"):
                raise OptionError(f"no {what} was given")
        if self.framework not in FRAMEWORKS:
            raise OptionError(f"unknown framework {self.framework!r}: known are {', '.join(FRAMEWORKS)}")
        if self.executor is not None and not _is_executor(self.executor):
            raise OptionError(
                f"--executor {self.executor!r} is no address of a Dask scheduler, such as "
                "dask:tcp://host:8786 (or dask:tls://host:8786)"
            )
        self._check_numbers()
        if self.learning_rates is not None:
            object.__setattr__(self, "learning_rates", tuple(map(float, self.learning_rates)))
        for name in self.networks if self.networks != AUTO else ():
            self._check_network(name)
        if self.depths and self.networks == AUTO:
            raise OptionError(f"--depth needs --network with one of {', '.join(_with_depth())}, or your own")
        for name in self.data:
            for arm in self.arms_on(name):
                parse_arm(arm)
        self._check_arms()
        self._check_that_no_two_runs_share_a_file()

    def _check_numbers(self) -> None:
        for rate in self.learning_rates or ():
            if not (math.isfinite(rate) and rate > 0):
                raise OptionError(f"learning rate {rate} is not a number above 0")
        least = {"seeds": 1, "epochs": 1, "batch_sizes": 1, "depths": 1, "jobs": 1}
        for field, low in least.items():
            found = getattr(self, field)
            for value in found if isinstance(found, tuple) else (found,):
                if value is not None and value < low:
                    raise OptionError(f"--{_option(field)} {value} is below {low}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise OptionError(f"--weight-decay {self.weight_decay} is not a number of 0 or more")
        if self.momentum is not None and self.optimizer != "sgd":
            raise OptionError(f"--momentum is of sgd; {self.optimizer} has betas of its own: leave it out")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise OptionError(f"--momentum {self.momentum} is not a fraction from 0 to below 1")
        if not 0 < self.target_accuracy <= 1:
            raise OptionError(
                f"--target-accuracy {self.target_accuracy} is not a fraction above 0 and up to 1"
            )

    def _check_network(self, name: str) -> None:
        if name not in NETWORKS and not is_user_code(name):
            known = ", ".join(NETWORKS)
            raise OptionError(f"unknown network {name!r}: known are {known}, or your own as file.py:function")
        if self.depths and name in NETWORKS and NETWORKS[name].depth is None:
            with_depth = ", ".join(_with_depth())
            raise OptionError(f"network {name} has one depth; --depth is for {with_depth}, or your own")

    def _check_arms(self) -> None:
        """Raises where an arm is one that none of the networks, or none of the data, can have."""
        arms = [parse_arm(arm) for arm in self.arms] if self.arms != AUTO else []
        networks = {setting.network for setting in self.settings()}
        flat = [name for name in networks if name in NETWORKS and not NETWORKS[name].is_residual]
        if flat and any(arm.skip_init for arm in arms):
            residual = ", ".join(name for name, network in NETWORKS.items() if network.is_residual)
            raise OptionError(
                f"arm skipinit is for residual networks, which {flat[0]} is not: take --network {residual}"
            )

    def arms_on(self, data: str) -> tuple[str, ...]:
        """Returns the arms on one data set."""
        if self.arms != AUTO:
            has_no_padding = data in SOURCES and not SOURCES[data].is_padded
            left_out = UNMASKED if has_no_padding and len(self.data) > 1 else None
            return tuple(arm for arm in self.arms if arm != left_out)
        is_padded = source_named(data).is_padded or data in self.padded
        if len(self.data) > 1:
            return FEWER_ARMS_WITH_PADDING if is_padded else FEWER_ARMS
        return ARMS_WITH_PADDING if is_padded else ARMS

    def settings(self) -> tuple[Setting, ...]:
        """Returns every setting in which arms are compared: data, network, depth and batch size."""
        return tuple(
            Setting(data, network, batch_size, depth)
            for data in self.data
            for network in (source_named(data).networks if self.networks == AUTO else self.networks)
            for depth in self.depths or (None,)
            for batch_size in self.batch_sizes or (source_named(data).batch_size,)
        )

    def rates_on(self, data: str) -> tuple[float, ...]:
        """Returns the learning rates on one data set."""
        if self.learning_rates is not None:
            return self.learning_rates
        rates = OPTIMIZERS[self.optimizer]
        return tuple(sorted(rates[: source_named(data).fewer_rates] if len(self.data) > 1 else rates))

    def recipe(self, data: str) -> Recipe:
        """Returns how every run on a data set trains."""
        source = source_named(data)
        momentum = self.momentum if self.momentum is not None else _MOMENTUM
        assert self.metric is not None
        return Recipe(
            epochs=self.epochs or (source.fewer_epochs if len(self.data) > 1 else source.epochs),
            optimizer=self.optimizer,
            momentum=momentum if self.optimizer == "sgd" else 0.0,
            weight_decay=self.weight_decay,
            target_accuracy=self.target_accuracy,
            loss=self.loss,
            metric=self.metric,
        )

    def _check_that_no_two_runs_share_a_file(self) -> None:
        """Raises where two runs would have one name, also on a file system that ignores case.

        One seed is enough, as a name ends with it.
        """
        runs: dict[str, str] = {}
        for setting in self.settings():
            for arm, rate in itertools.product(self.arms_on(setting.data), self.rates_on(setting.data)):
                name = run_name(setting, arm, rate, 0)
                run = f"{setting.data}, {setting.network}, {arm}, {shown_number(rate)}"
                if (other := runs.setdefault(name.casefold(), run + name)) != run + name:
                    other = other.removesuffix(name)
                    raise OptionError(
                        f"two runs would share the file {name}.json: {other} and {run}; rename a network's "
                        "file or function, or study them in two folders"
                    )

    @property
    def folder(self) -> Path:
        """The folder of the files: one for each framework, data and choice of networks, where it resumes."""
        if self.out is not None:
            return self.out
        chosen = self.networks if self.networks != AUTO else ()
        names = [slug(display_name(name)) for name in (*self.data, *chosen)]
        which = ["study"] if self.framework == "torch" else ["study", "keras", slug(keras_backend())]
        return Path("runs") / "-".join((*which, *names))

    @property
    def workers(self) -> int:
        """Training runs at a time on this machine."""
        return self.jobs if self.jobs is not None else usable_cores()

    @property
    def scheduler(self) -> str | None:
        """The address of the Dask scheduler; None for this machine."""
        return self.executor.removeprefix("dask:") if self.executor is not None else None

    def command(self) -> str:
        """Returns the command line of this study, without folders, as a shell reads it."""
        backend = f"KERAS_BACKEND={shlex.quote(keras_backend())} " if self.framework == "keras" else ""
        recipe = self.recipe(self.data[0])
        parts: dict[str, object] = {
            **({"framework": self.framework} if backend else {}),
            "data": ",".join(map(display_name, self.data)),
            "network": ",".join(map(display_name, self.networks)),
            **({"depth": ",".join(map(str, self.depths))} if self.depths else {}),
            "arms": ",".join(self.arms),
            "optimizer": self.optimizer,
            **({"momentum": shown_number(recipe.momentum)} if self.optimizer == "sgd" else {}),
            **({"weight-decay": shown_number(self.weight_decay)} if self.weight_decay else {}),
            "learning-rate": ",".join(map(shown_number, self.learning_rates or ())) or "auto",
            "seeds": self.seeds,
            "epochs": self.epochs or "auto",
            "batch-size": ",".join(map(str, self.batch_sizes)) or "auto",
            **({"loss": display_name(self.loss)} if self.loss != "cross_entropy" else {}),
            **({"metric": display_name(recipe.metric)} if recipe.metric != default_metric(self.loss) else {}),
            "target-accuracy": shown_number(self.target_accuracy),
        }
        words = [word for name, value in parts.items() for word in (f"--{name}", str(value))]
        return backend + shlex.join(["batchnorm", "study", *words])


_LISTS = {
    "networks": "network",
    "data": "data",
    "arms": "arm",
    "learning_rates": "learning rate",
    "batch_sizes": "batch size",
    "depths": "depth",
}


def _is_executor(text: str) -> bool:
    parts = _EXECUTOR.fullmatch(text)
    return parts is not None and 0 < int(parts[3]) < 2**16


def _option(field: str) -> str:
    return {"batch_sizes": "batch-size", "depths": "depth"}.get(field, field.replace("_", "-"))


def _with_depth() -> list[str]:
    return [name for name, network in NETWORKS.items() if network.depth is not None]


def usable_cores() -> int:
    """Returns the cores that this process may use: fewer than there are under taskset or a batch system."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def split_list(text: str) -> tuple[str, ...]:
    """Returns the parts of a comma-separated list, without blanks; commas in brackets part nothing."""
    return tuple(filter(None, split_outside_brackets(text, ",")))


def parse_numbers(parts: Iterable[str], kind: type[N], what: str) -> tuple[N, ...]:
    """Returns numbers from text.

    Args:
        parts: of text, a number each.
        kind: float or int.
        what: they are, for errors, such as "learning rate".

    Raises:
        OptionError: one is not a number.
    """
    numbers = []
    for part in parts:
        try:
            numbers.append(kind(part))
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise OptionError(f"{what} {part!r} is not {wanted}") from None
    return tuple(numbers)
