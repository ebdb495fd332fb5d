"""Whether two models give the same outputs at inference: the proof that `fold` asks for before it returns."""

from __future__ import annotations

from collections.abc import Iterable

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from batchnorm.errors import BatchNormError, OptionError

Array = NDArray[np.number]

# Largest |difference| of an output over its largest |value|, by the coarsest dtype that a layer computes in.
# A folded layer rounds other numbers than the pair it replaces, so a deep network moves by some tens of its
# dtype's eps. A wrong fold moves by far more: without epsilon, for one, by 5e-4 at variance 1.
_TOLERANCE = {
    "float64": 1e-10,  # eps 2.2e-16
    "float32": 1e-4,  # eps 1.2e-7
    "float16": 3e-2,  # eps 9.8e-4
    "bfloat16": 1e-1,  # eps 7.8e-3
}
_BATCH, _SIZE = 4, 32  # of a made example: samples, and an axis whose size the model leaves open


class FoldError(BatchNormError, ArithmeticError):
    """A folded model does not give the outputs of the original."""


def example_for(model: keras.Model) -> object:
    """Return an input batch of the shapes that a model says it takes: normal values, integers 0 and 1.

    Raises:
        OptionError: it takes strings, or sparse tensors.
    """
    random = np.random.default_rng(0)

    def values(tensor: keras.KerasTensor) -> Array:
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if dtype == "string" or tensor.sparse:
            kind = "strings" if dtype == "string" else "a sparse tensor"
            raise OptionError(
                f"input {tensor.name} takes {kind}, of which fold makes no example: pass example=", model.name
            )
        batch, *rest = tensor.shape
        shape = (batch or _BATCH, *(size or _SIZE for size in rest))
        if "float" in dtype:
            return random.standard_normal(shape).astype("float32")
        return random.integers(0, 2, shape).astype(dtype)

    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(values, inputs)


def assert_agree(model: keras.Model, folded: keras.Model, example: object, dtypes: Iterable[str]) -> None:
    """Compare two models on an example at inference; neither changes.

    Args:
        model: the original.
        folded: what replaces it.
        example: an input batch as the model takes it; None = one is made.
        dtypes: those that its layers compute in.

    Raises:
        FoldError: an output of the two differs, or is NaN; says which and by how much.
        OptionError: the model cannot run on an example that was made for it; an output has no values.
    """
    tolerance = max(_TOLERANCE.get(dtype, 0.0) for dtype in (*dtypes, products_dtype()))
    given = example_for(model) if example is None else example
    try:
        expected = _outputs(model, given)
    except Exception as error:
        if example is not None:
            raise
        shapes = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in model.inputs)
        raise OptionError(
            f"fold compares on random inputs of the shapes that the model states ({shapes}); it fails there: "
            f"{error}. Pass example=, a batch of real inputs",
            model.name,
        ) from error
    for (name, old), (_, new) in zip(expected, _outputs(folded, given), strict=True):
        _assert_close(model.name, name, old, new, tolerance)


def _outputs(model: keras.Model, example: object) -> list[tuple[str, Array]]:
    """Return the outputs by name; `stateless_call`, so that a layer that keeps a state keeps the old one."""
    state = (
        [v.value for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    outputs, _ = model.stateless_call(
        *state, keras.tree.map_structure(ops.convert_to_tensor, example), training=False
    )
    flat = keras.tree.flatten_with_path(outputs)
    return [
        (
            "the output" if len(flat) == 1 else f"output {'.'.join(map(str, path))}",
            ops.convert_to_numpy(value),
        )
        for path, value in flat
    ]


def _assert_close(model: str, output: str, old: Array, new: Array, tolerance: float) -> None:
    if not old.size:
        raise OptionError(
            f"{output} has shape {old.shape}, so nothing can be compared: pass more of example=", model
        )
    remedy = "the original is unchanged. Where real inputs differ much from random ones, pass example="
    if old.shape != new.shape:
        raise FoldError(f"{output} has shape {new.shape} folded, {old.shape} before", model)
    if old.dtype.kind not in "fiubV":  # V: NumPy's view of bfloat16
        if not np.array_equal(old, new):
            raise FoldError(f"{output} differs between the folded model and the original", model)
        return
    old, new = old.astype(np.float64), new.astype(np.float64)
    if np.isnan(old).any():
        raise FoldError(
            f"{output} of the original has NaN, so nothing can be compared: calibrate it, or pass "
            "example=, a batch of real inputs",
            model,
        )
    finite = np.isfinite(old)
    scale = np.abs(old[finite]).max(initial=0.0)
    same = np.array_equal(old[~finite], new[~finite])
    difference = np.abs(new[finite] - old[finite]).max(initial=0.0) if same else np.inf
    if not difference <= tolerance * (scale or 1.0):  # a NaN is no agreement either
        raise FoldError(
            f"{output} of the folded model is off by {difference:.3g} where the original's largest value is "
            f"{scale:.3g}; at most {tolerance:g} of that is rounding. Nothing is returned, {remedy}",
            model,
        )


def products_dtype() -> str:
    """The dtype whose rounding a float32 product has here: GPUs and TPUs may shorten its factors.

    TensorFlow and JAX use TF32 on NVIDIA's GPUs unless told otherwise, torch does in convolutions: 10 bits,
    as float16. JAX uses bfloat16 on TPUs.
    """
    exact = 1 + np.random.default_rng(0).random((64, 64), dtype=np.float32)
    identity = np.eye(64, dtype=np.float32)
    products = (
        ops.matmul(exact, identity),
        ops.reshape(ops.conv(exact.reshape(1, 8, 8, 64), identity.reshape(1, 1, 64, 64)), (64, 64)),
    )
    lost = max(float(np.abs(ops.convert_to_numpy(product) - exact).max()) for product in products)
    return "float32" if lost < 1e-5 else "float16" if lost < 1.5e-3 else "bfloat16"
