"""The data of a study: what comes with the package, full MNIST, or the user's own; NumPy only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from batchnorm.errors import DataError

from . import packaged
from .arrays import checked_classes, checked_inputs, checked_numbers, checked_targets
from .loaders import Loaded, Names, is_loader, lengthened, read
from .mnist import load_mnist
from .padding import Array, Examples, Padded
from .settings import display_name
from .user_code import is_user_code, load_function, naming_the_line, source_of

# What targets are: classes counted from 0, numbers, or whatever the user's own loss takes.
Targets = Literal["classes", "numbers", "any"]


@dataclass(frozen=True)
class Dataset:
    """Training and held-out examples.

    Attributes:
        name: as reports show it; for the user's own, file and function without folders.
        source: where the examples come from, in one sentence.
        x_train, x_test: float32 `[N, ...]`; pixels of images are scaled from 0..255 to 0..1. Whole
            numbers that came under a name stay int64.
        y_train, y_test: int64 `[N]`, classes counted from 0; or numbers, float32 `[N, K...]`.
        lengths_train, lengths_test: of the sequences padded in x, int64 `[N]`; None without padding.
        names: the arguments by which the network takes them; None where they are positional.
    """

    name: str
    source: str
    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    lengths_train: npt.NDArray[np.int64] | None = None
    lengths_test: npt.NDArray[np.int64] | None = None
    names: Names | None = None

    @property
    def train(self) -> Examples:
        """Training examples, with their lengths where they have some."""
        return self.x_train if self.lengths_train is None else Padded(self.x_train, self.lengths_train)

    @property
    def held_out(self) -> Examples:
        """Held-out examples, with their lengths where they have some."""
        return self.x_test if self.lengths_test is None else Padded(self.x_test, self.lengths_test)

    @property
    def has_classes(self) -> bool:
        """Whether targets are classes."""
        return self.y_train.dtype.kind == "i" and self.y_train.ndim == 1

    @property
    def outputs(self) -> int:
        """How many outputs a network has for each example: one for each class, or for each number."""
        if self.y_train.dtype.kind == "i":
            return int(max(self.y_train.max(), self.y_test.max())) + 1
        return math.prod(self.y_train.shape[1:])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.x_train.shape[1:]

    def fingerprint(self) -> str:
        """Returns a digest of every value, so that runs on other data are told apart."""
        digest = hashlib.sha256()
        of_sequences = (self.lengths_train, self.lengths_test)
        for array in (self.x_train, self.y_train, self.x_test, self.y_test, *of_sequences):
            if array is not None:
                digest.update(f"{array.shape}{array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """Returns name, source and sizes, for the provenance of results."""
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.x_train),
            "held_out": len(self.x_test),
            **self._describe_targets(),
            "input_shape": list(self.input_shape),
            **self._describe_lengths(),
        }

    def _describe_targets(self) -> dict[str, object]:
        if not self.has_classes:
            return {"targets": f"{self.y_train.dtype} of shape {list(self.y_train.shape[1:])}"}
        missing = np.setdiff1d(np.arange(self.outputs), self.y_test).tolist()
        return {"classes": self.outputs, **({"classes_not_held_out": missing} if missing else {})}

    def _describe_lengths(self) -> dict[str, object]:
        if self.lengths_train is None or self.lengths_test is None:
            return {}
        lengths = np.concatenate([self.lengths_train, self.lengths_test])
        padding = 1 - lengths.mean() / self.input_shape[0]
        return {"lengths": f"{lengths.min()} to {lengths.max()}", "padding": f"{padding:.0%} of positions"}


@dataclass(frozen=True)
class DataSource:
    """A data set that a study knows by name.

    Attributes:
        load: returns x and y to train, x and y held out, and where they come from; x is images in bytes, or
            sequences; it takes the folder of `--data-dir`.
        description: what it is, in one line.
        networks: those that a study takes unless it is told.
        is_padded: whether x is sequences of several lengths.
        epochs, batch_size: those of a study unless it is told.
        fewer_epochs, fewer_rates: passes, and how many learning rates, of a study of several data sets unless
            it is told: a first look.
        baselines: plain models of scikit-learn, with their held-out accuracy by `scripts/baselines.py`.
    """

    load: Callable[[Path | None], tuple[Sequence[Examples], str]]
    description: str
    networks: tuple[str, ...] = ("mlp", "deep")
    is_padded: bool = False
    epochs: int = 10
    batch_size: int = 32
    fewer_epochs: int = 5
    fewer_rates: int = 2
    baselines: tuple[tuple[str, float], ...] = ()


OWN = DataSource(lambda _: ((), ""), "your own, as file.py:function")
SOURCES = {
    "digits": DataSource(
        lambda _: packaged.digits(),
        "5,000 handwritten digits, 28 x 28 grey",
        baselines=(
            ("logistic regression on pixels", 0.8920),
            ("a support vector machine on pixels (RBF, C=1)", 0.9404),
        ),
    ),
    "mnist": DataSource(load_mnist, "all 70,000 of them, from files that you have"),
    "icons": DataSource(
        lambda _: packaged.icons(),
        "1,906 emoji, 16 x 16 in colour, in 9 groups",
        ("cnn",),
        baselines=(("a support vector machine on pixels (RBF, C=10)", 0.6792),),
    ),
    "vowels": DataSource(
        lambda _: packaged.vowels(),
        "640 utterances of 7 to 29 frames; which of 9 speakers is it?",
        ("conv1d",),
        is_padded=True,
        fewer_epochs=10,
        baselines=(("logistic regression on mean, deviation, first and last frame", 0.9838),),
    ),
    "languages": DataSource(
        lambda _: packaged.languages(),
        "12,000 fragments of 5 to 80 characters; which of 60 languages is it?",
        ("characters",),
        is_padded=True,
        epochs=4,
        fewer_epochs=1,
        fewer_rates=1,
        baselines=(
            ("logistic regression on a bag of characters", 0.6840),
            ("naive Bayes on 1- to 3-grams of characters (multinomial, alpha 0.1)", 0.8883),
        ),
    ),
}


def load_data(
    name: str, data_dir: Path | None = None, *, channels_last: bool = False, targets: Targets = "classes"
) -> Dataset:
    """Loads a data set by name.

    Args:
        name: of `SOURCES`, or the user's own as `package.module:function` or `file.py:function`. The
            function takes nothing and returns what `own_data` takes.
        data_dir: where `mnist` is looked for (see `mnist.load_mnist`).
        channels_last: whether colours come last, as in Keras, or first, as in torch; the user's own stays as
            it is.
        targets: what they have to be.

    Raises:
        DataError: no such data, a file that cannot be read, or arrays of the wrong form.
        StudyError: the user's function raised.
    """
    if name in SOURCES:
        if targets == "numbers":
            raise DataError(f"data {name} has classes, which loss mse is not for: take cross_entropy")
        (x_train, train, x_test, test), source = SOURCES[name].load(data_dir)
        y_train, y_test = np.asarray(train, np.int64), np.asarray(test, np.int64)
        if isinstance(x_train, Padded) and isinstance(x_test, Padded):
            lengths = x_train.lengths, x_test.lengths
            return Dataset(name, source, x_train.values, y_train, x_test.values, y_test, *lengths)
        x_train, x_test = (_scaled(np.asarray(images), channels_last) for images in (x_train, x_test))
        return Dataset(name, source, x_train, y_train, x_test, y_test)
    if is_user_code(name):
        function = load_function(name)
        with naming_the_line(f"data {name}", source_of(name), kept=DataError):
            return own_data(f"data {name}", display_name(name), function(), targets)
    raise DataError(f"unknown data {name!r}: known are {', '.join(SOURCES)}, or your own as file.py:function")


def load_digits() -> Dataset:
    """Returns the 5,000 packaged digits in halves, with every class in equal parts and a fixed seed."""
    return load_data("digits")


def source_named(name: str) -> DataSource:
    """Returns what a study knows of this data, the user's own too."""
    return SOURCES.get(name, OWN)


def _scaled(images: Array, channels_last: bool) -> npt.NDArray[np.float32]:
    if images.ndim == 4 and not channels_last:
        images = np.moveaxis(images, -1, 1)
    return np.ascontiguousarray(images, np.float32) * np.float32(1 / 255)


def own_data(what: str, name: str, value: object, targets: Targets = "classes") -> Dataset:
    """Returns a user's own data as arrays.

    Args:
        what: the data, for errors.
        name: of the data in reports.
        value: four arrays `(x_train, y_train, x_test, y_test)`: x numbers `[N, ...]`, y the targets of each;
            or two, `(train, held out)` or a dict of `train` and `test`: each a pair of arrays, a data set or
            a loader (see `loaders.read`).
        targets: what they have to be.

    Raises:
        DataError: it is something else, or arrays do not go together.
    """
    train, test = _parts_of(what, value)
    x_train, y_train, lengths_train = _checked(f"{what}: %s_train", train, targets, least=2)
    x_test, y_test, lengths_test = _checked(f"{what}: %s_test", test, targets, least=1)
    if (lengths_train is None) != (lengths_test is None) or train.names != test.names:
        raise DataError(
            f"{what}: training and held-out examples differ in names, or in whether they have lengths"
        )
    if lengths_train is not None:
        longest = max(x_train.shape[1], x_test.shape[1])
        x_train, x_test = lengthened(x_train, longest), lengthened(x_test, longest)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{what}: examples of x_train have shape {x_train.shape[1:]}, of x_test {x_test.shape[1:]}"
        )
    if y_train.shape[1:] != y_test.shape[1:] or y_train.dtype != y_test.dtype:
        raise DataError(
            f"{what}: targets are {y_train.dtype} {y_train.shape[1:]} in y_train, and {y_test.dtype} "
            f"{y_test.shape[1:]} in y_test"
        )
    data = Dataset(
        name,
        f"the user's own, {name}",
        x_train,
        y_train,
        x_test,
        y_test,
        lengths_train,
        lengths_test,
        train.names,
    )
    if data.has_classes and len(unseen := np.setdiff1d(y_test, y_train)):
        raise DataError(f"{what}: y_test holds classes that y_train has not: {unseen[:5].tolist()}")
    return data


def _parts_of(what: str, value: object) -> tuple[Loaded, Loaded]:
    """Returns training and held-out examples, not yet checked."""
    found = (
        (value["train"], value["test"])
        if isinstance(value, Mapping) and {"train", "test"} <= value.keys()
        else value
    )
    if isinstance(found, tuple | list) and len(found) == 4 and not any(map(is_loader, found)):
        x_train, y_train, x_test, y_test = found
        return Loaded(x_train, y_train), Loaded(x_test, y_test)
    if isinstance(found, tuple | list) and len(found) == 2:
        parts = {f"{what}: {part}": examples for part, examples in zip(("train", "test"), found, strict=True)}
        pairs = [isinstance(examples, tuple | list) and len(examples) == 2 for examples in found]
        if all(is_pair or is_loader(examples) for is_pair, examples in zip(pairs, found, strict=True)):
            train, test = (
                Loaded(*examples) if is_pair else read(part, examples)
                for is_pair, (part, examples) in zip(pairs, parts.items(), strict=True)
            )
            return train, test
    raise DataError(
        f"{what} returned {_what(value)}, not four arrays (x_train, y_train, x_test, y_test), and not two "
        "data sets or loaders (train, held out)"
    )


def _checked(
    what: str, found: Loaded, targets: Targets, *, least: int
) -> tuple[Array, Array, npt.NDArray[np.int64] | None]:
    """Returns inputs, targets and lengths of a part of the data; `what` has a place for x, y or lengths."""
    x = checked_inputs(what % "x", found.x, keeps_integers=found.names is not None)
    if targets == "classes":
        y: Array = checked_classes(what % "y", found.y, len(x), least=least)
        if least > 1 and (low := y.min()) > 0:
            raise DataError(
                f"{what % 'y'} holds labels from {low} on; classes are counted from 0: subtract {low}"
            )
    elif targets == "numbers":
        y = checked_numbers(what % "y", found.y, len(x))
    else:
        y = checked_targets(what % "y", found.y, len(x))
    if found.lengths is not None:
        wrong = np.flatnonzero((found.lengths < 1) | (found.lengths > x.shape[1]))
        if len(wrong):
            length = found.lengths[wrong[0]]
            raise DataError(
                f"{what % 'x'}: example {wrong[0]} has length {length}, not 1 to {x.shape[1]}: leave "
                f"{'it' if len(wrong) == 1 else f'the {len(wrong)} of them'} out"
            )
    return x, y, found.lengths


def _what(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
