"""The data of a study: what comes with the package, full MNIST, or the user's own; NumPy only."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchnorm.errors import DataError

from . import packaged
from .mnist import load_mnist
from .padding import Array, Examples, Padded
from .user_code import is_user_code, load_function, naming_the_line, source_of

# Labels beyond this, and beyond the number of examples, count no classes: each would get an output.
_CLASSES_OF_FEW_EXAMPLES = 1000
_NUMBERED = "numpy.unique(y, return_inverse=True)[1] numbers classes of any kind"


@dataclass(frozen=True)
class Dataset:
    """Training and held-out examples.

    Attributes:
        name: as reports show it; for the user's own, file and function without folders.
        source: where the examples come from, in one sentence.
        x_train, x_test: float32 `[N, ...]`; pixels of images are scaled from 0..255 to 0..1.
        y_train, y_test: int64 `[N]`, classes counted from 0.
        lengths_train, lengths_test: of the sequences padded in x, int64 `[N]`; None without padding.
    """

    name: str
    source: str
    x_train: npt.NDArray[np.float32]
    y_train: npt.NDArray[np.int64]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int64]
    lengths_train: npt.NDArray[np.int64] | None = None
    lengths_test: npt.NDArray[np.int64] | None = None

    @property
    def train(self) -> Examples:
        """Training examples, with their lengths where they have some."""
        return self.x_train if self.lengths_train is None else Padded(self.x_train, self.lengths_train)

    @property
    def held_out(self) -> Examples:
        """Held-out examples, with their lengths where they have some."""
        return self.x_test if self.lengths_test is None else Padded(self.x_test, self.lengths_test)

    @property
    def classes(self) -> int:
        return int(max(self.y_train.max(), self.y_test.max())) + 1

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
            "classes": self.classes,
            "input_shape": list(self.input_shape),
            **self._describe_lengths(),
        }

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
        baselines: plain models of scikit-learn, with their held-out accuracy by `scripts/baselines.py`.
    """

    load: Callable[[Path | None], tuple[Sequence[Examples], str]]
    description: str
    networks: tuple[str, ...] = ("mlp", "deep")
    is_padded: bool = False
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
        baselines=(("logistic regression on mean, deviation, first and last frame", 0.9838),),
    ),
    "languages": DataSource(
        lambda _: packaged.languages(),
        "12,000 fragments of 5 to 80 characters; which of 60 languages is it?",
        ("characters",),
        is_padded=True,
        baselines=(
            ("logistic regression on a bag of characters", 0.6840),
            ("naive Bayes on 1- to 3-grams of characters (multinomial, alpha 0.1)", 0.8883),
        ),
    ),
}


def load_data(name: str, data_dir: Path | None = None, *, channels_last: bool = False) -> Dataset:
    """Loads a data set by name.

    Args:
        name: of `SOURCES`, or the user's own as `package.module:function` or `file.py:function`. The
            function takes nothing and returns NumPy arrays `(x_train, y_train, x_test, y_test)`: x numbers
            `[N, ...]`, y whole numbers `[N]` counted from 0.
        data_dir: where `mnist` is looked for (see `mnist.load_mnist`).
        channels_last: whether colours come last, as in Keras, or first, as in torch; the user's own stays as
            it is.

    Raises:
        DataError: no such data, a file that cannot be read, or arrays of the wrong form.
        StudyError: the user's function raised.
    """
    if name in SOURCES:
        (x_train, train, x_test, test), source = SOURCES[name].load(data_dir)
        y_train, y_test = np.asarray(train, np.int64), np.asarray(test, np.int64)
        if isinstance(x_train, Padded) and isinstance(x_test, Padded):
            lengths = x_train.lengths, x_test.lengths
            return Dataset(name, source, x_train.values, y_train, x_test.values, y_test, *lengths)
        x_train, x_test = (_scaled(np.asarray(images), channels_last) for images in (x_train, x_test))
        return Dataset(name, source, x_train, y_train, x_test, y_test)
    if is_user_code(name):
        return _load_own(name)
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


def _load_own(spec: str) -> Dataset:
    function = load_function(spec)
    with naming_the_line(f"data {spec}", source_of(spec)):
        returned = function()
    if not isinstance(returned, tuple | list) or len(returned) != 4:
        raise DataError(
            f"data {spec} returned {_what(returned)}, not four arrays (x_train, y_train, x_test, y_test)"
        )
    x_train = _checked_inputs(f"data {spec}: x_train", returned[0])
    y_train = _checked_classes(f"data {spec}: y_train", returned[1], len(x_train), least=2)
    x_test = _checked_inputs(f"data {spec}: x_test", returned[2])
    y_test = _checked_classes(f"data {spec}: y_test", returned[3], len(x_test), least=1)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"data {spec}: examples of x_train have shape {x_train.shape[1:]}, of x_test {x_test.shape[1:]}"
        )
    unseen = np.setdiff1d(y_test, y_train)
    if len(unseen):
        raise DataError(f"data {spec}: y_test holds classes that y_train has not: {unseen[:5].tolist()}")
    name = f"{Path(spec.rpartition(':')[0]).name}:{spec.rpartition(':')[2]}"
    return Dataset(name, f"the user's own, {name}", x_train, y_train, x_test, y_test)


def _checked_inputs(what: str, values: object) -> npt.NDArray[np.float32]:
    array = _as_array(what, values)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{what} holds {array.dtype}, not real numbers: return it as .astype(numpy.float32)")
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{what} has shape {array.shape}, not [examples, ...] with some of each")
    with np.errstate(over="ignore"):  # what overflows is found, and named, below
        array = array.astype(np.float32)
    if bad := int((~np.isfinite(array)).sum()):
        raise DataError(f"{what} holds {bad} values that are NaN, infinite or beyond float32")
    return array


def _checked_classes(what: str, values: object, examples: int, *, least: int) -> npt.NDArray[np.int64]:
    array = _as_array(what, values)
    if array.ndim != 1 or len(array) != examples:
        x = what.rpartition(": y_")[2]
        raise DataError(f"{what} has shape {array.shape}, not [{examples}] as x_{x} asks")
    if array.dtype.kind not in "iub" and not (
        array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.round(array)).all()
    ):
        wanted = "whole numbers that count classes from 0"
        raise DataError(f"{what} holds {array.dtype}, not {wanted}: {_NUMBERED}")
    low, high = array.min(), array.max()
    if low < 0 or high + 1 < least:
        wanted = "two or more counted from 0"
        raise DataError(f"{what} holds classes {low} to {high}, not {wanted}: {_NUMBERED}")
    if high >= (most := max(_CLASSES_OF_FEW_EXAMPLES, examples)):
        wanted = f"classes counted from 0 stay below {most}"
        raise DataError(f"{what} holds labels up to {high}, and {wanted}: {_NUMBERED}")
    return array.astype(np.int64)


def _as_array(what: str, values: object) -> npt.NDArray[Any]:
    """Returns values as an array, without gradients, and of a dtype that NumPy computes with.

    Args:
        what: they are, for errors.
        values: an array, a tensor, or lists of them.

    Raises:
        DataError: they are masked, ragged, or cannot be converted.
    """
    if _is_masked(values):
        raise DataError(
            f"{what} is a masked array, and a study has no use for the mask: leave masked examples out, or "
            "fill them with .filled(value)"
        )
    try:
        array = np.asarray(_without_gradient(values))
    except (Exception, SystemExit) as error:  # whatever the user's __array__ raises
        said = (str(error).strip() or "no message").splitlines()[0]
        ragged = "; every example needs the same shape" if "inhomogeneous" in said else ""
        raise DataError(
            f"{what} cannot be made an array: {type(error).__name__}: {said.rstrip('.')}{ragged}"
        ) from error
    is_of_another_library = array.dtype.kind == "V" and not issubclass(array.dtype.type, np.void)
    return array.astype(np.float32) if is_of_another_library else array  # such as JAX's bfloat16


def _is_masked(values: object, depth: int = 0) -> bool:
    if isinstance(values, list | tuple) and depth < 32:  # NumPy itself has no more dimensions than 64
        return any(_is_masked(item, depth + 1) for item in values)
    return np.ma.isMaskedArray(values)


def _without_gradient(values: object) -> object:
    torch = sys.modules.get("torch")
    if torch is None:
        return values
    if isinstance(values, torch.Tensor):
        plain = values.detach().cpu().resolve_conj()
        # NumPy has no bfloat16 and no float8; float32 holds all of their numbers.
        return plain.float() if plain.is_floating_point() and plain.itemsize <= 2 else plain
    if isinstance(values, Sequence) and len(values) and isinstance(values[0], torch.Tensor):
        return [_without_gradient(item) for item in values]
    return values


def _what(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{type(value).__module__}.{type(value).__qualname__}"
