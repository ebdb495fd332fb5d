"""Keras's layer and ours on each backend: time of a training step, and accuracy as the mean grows.

Keras has one backend per process, so each is measured in one of its own: `python -m benchmarks.keras_layer`,
with KERAS_BACKEND set, prints the rows as JSON.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import numpy as np

from .fresh_process import json_of
from .interleaved import clocked, interleave, medians, ratio
from .tables import Row, Rows, table_of, with_quartiles

BACKENDS = ("tensorflow", "jax", "torch")
ROUNDS, QUICK_ROUNDS = 15, 2
STEPS = 10
OFFSETS = (0.0, 1e1, 1e3, 1e5, 1e6)
STACKS = {"dense": (256, (784,)), "conv": (32, (16, 16, 3))}


def step_times(quick: bool = False) -> Rows:
    """Return one row per backend and stack: medians in seconds, and ratios to stock, pair by pair."""
    return _on_each_backend("time", quick)


def accuracies(quick: bool = False) -> Rows:
    """Return one row per backend, layer and offset: |y - float64| / (1 + max |float64|), in training."""
    return _on_each_backend("accuracy", quick)


def step_table(rows: Rows) -> str:
    """Milliseconds of a training step, and ours as a multiple of stock's with the quartiles."""

    def shown(rival: Row) -> str:
        return with_quartiles({"median": rival["over_stock"], "quartiles": rival["over_stock_quartiles"]})

    return table_of(
        {
            "backend": row["backend"],
            "stack": row["stack"],
            "stock, ms": f"{row['stock']['seconds'] * 1e3:.1f}",
            "ours ÷ stock": shown(row["ours"]),
            "ours with activation= ÷ stock": shown(row["fused"]),
        }
        for row in rows
    )


def _on_each_backend(what: str, quick: bool) -> Rows:
    words = (what, *(["--quick"] if quick else []))
    rows: Rows = []
    for backend in BACKENDS:
        rows += json_of("benchmarks.keras_layer", *words, KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="3")
    return rows


def _time(quick: bool) -> Rows:
    import keras

    rows = []
    for stack, (batch_size, shape) in STACKS.items():
        models = {name: _model(stack, shape, name) for name in ("stock", "ours", "fused")}
        random = np.random.default_rng(0)
        x = random.standard_normal((batch_size * STEPS, *shape)).astype("float32")
        y = random.integers(0, 10, len(x))
        how = {"x": x, "y": y, "batch_size": batch_size, "shuffle": False, "verbose": 0}
        steps = {name: clocked(functools.partial(model.fit, **how)) for name, model in models.items()}
        times = interleave(steps, QUICK_ROUNDS if quick else ROUNDS, warm_up=1)  # the first round compiles
        row: Row = {"backend": keras.backend.backend(), "stack": stack, "batch_size": batch_size}
        for name, seconds in medians(times).items():
            over = ratio(times[name], times["stock"])
            row[name] = {
                "seconds": seconds / STEPS,
                "over_stock": over["median"],
                "over_stock_quartiles": over["quartiles"],
            }
        rows.append(row)
    return rows


def _model(stack: str, shape: tuple[int, ...], name: str) -> Any:
    """Four layers of dense or convolution → norm → ReLU; `fused`: the ReLU is the norm's own."""
    import keras

    from batchnorm.keras import BatchNormalization

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape)])
    for _ in range(4):
        if stack == "dense":
            model.add(keras.layers.Dense(512))
        else:
            model.add(keras.layers.Conv2D(32, 3, padding="same"))
        if name == "fused":
            model.add(BatchNormalization(activation="relu"))
        else:
            model.add(keras.layers.BatchNormalization() if name == "stock" else BatchNormalization())
            model.add(keras.layers.ReLU())
    if stack == "conv":
        model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _accuracy(quick: bool) -> Rows:
    import keras

    from batchnorm.keras import BatchNormalization

    rows = []
    for offset in OFFSETS[:: 2 if quick else 1]:
        x = (np.random.default_rng(0).standard_normal((16, 32, 32, 8)) + offset).astype("float32")
        wide = x.astype(np.float64)
        mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
        for name, kind in (("keras", keras.layers.BatchNormalization), ("batchnorm", BatchNormalization)):
            y = keras.ops.convert_to_numpy(kind(epsilon=1e-5)(x, training=True))
            expected = (wide - mean) / np.sqrt(var + 1e-5)
            error = float(np.abs(y - expected).max() / (1 + np.abs(expected).max()))
            rows.append(
                {"backend": keras.backend.backend(), "layer": name, "mean_over_std": offset, "y": error}
            )
    return rows


if __name__ == "__main__":
    measure = {"time": _time, "accuracy": _accuracy}[sys.argv[1]]
    print(json.dumps(measure("--quick" in sys.argv)))
