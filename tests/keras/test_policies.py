"""`statistics=`: every policy of `batchnorm.statistics` on this backend, held to the reference."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch

from tests.support.compare import assert_close
from tests.support.covering import covering_array

from .gradients import Array, results
from .policy_cases import CASES, MOMENTUM, Case, expected, made_for, with_masked_positions

# Of torch.compile, at the breaks that Keras's own code makes in a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

BACKEND = keras.backend.backend()
F32 = torch.float32
DTYPES = {"float32": F32, "mixed_bfloat16": torch.bfloat16, "float64": torch.float64}
# JAX compiles every operation of an eager call by itself, which takes longer than all at once.
COMPILED = BACKEND == "jax"
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def draw(shape: tuple[int, ...], seed: int, dtype: str, offset: float = 0.0) -> Array:
    """Values that the dtype holds, in its variables' dtype."""
    values = np.random.default_rng(seed).standard_normal(shape) * 1.5 + 0.7 + offset
    exact = torch.tensor(values).to(DTYPES[dtype])
    return exact.to(torch.float64 if dtype == "float64" else F32).numpy()


def last(values: Array, axis: int) -> Array:
    """Channels-first `[N, C, *S]` of values with channels on `axis`, and back."""
    return np.moveaxis(values, axis, 1) if values.ndim > 2 else values


def check(
    case: Case,
    layer: Any,
    x: Array,
    dy: Array,
    axis: int,
    mask: Array | None = None,
    *,
    dtype: str = "float32",
    compiled: bool = COMPILED,
    activation: str | None = None,
) -> None:
    """Run a step of the layer, and compare all that it gives and leaves with the reference."""
    weights = [keras.ops.convert_to_numpy(w) for w in layer.weights[:4]]
    call = {} if mask is None else {"mask": mask}
    if mask is not None:  # what the reference does not say: see test_masked_positions_are_normalized_too
        dy = np.where(np.expand_dims(mask, axis), dy, 0).astype(dy.dtype)
    found = results(layer, x, dy, training=case.training, compiled=compiled, **call)
    counts = mask
    if mask is not None and not case.policy.measures(case.training):
        counts = None  # the statistics are given: every position is normalized by them
    wanted = expected(case, last(x, axis), last(dy, axis), weights, mask=counts, activation=activation)
    keep = True if mask is None else np.expand_dims(mask, 1)
    stored = DTYPES[dtype]
    parameters = torch.float64 if dtype == "float64" else F32
    y, dx = (last(np.asarray(v, dtype=np.float64), axis) for v in (found.y, found.dx))
    assert_close(y * keep, wanted.y * keep, dtype=stored, what="y")
    assert_close(dx, wanted.dx, dtype=stored, scale=wanted.std, what="dx")
    assert_close(found.dgamma, wanted.dgamma, dtype=parameters, what="dgamma")
    assert_close(found.dbeta, wanted.dbeta, dtype=parameters, what="dbeta")
    after = [keras.ops.convert_to_numpy(w) for w in (layer.moving_mean, layer.moving_variance)]
    assert_close(after[0], wanted.mean, dtype=parameters, what="moving_mean")
    assert_close(after[1], wanted.var, dtype=parameters, what="moving_variance")
    if layer.batches is not None:
        assert int(layer.batches.numpy()) == case.batches + case.policy.moves(case.training)


# Each of two options meets each, and with every policy, in six rows instead of 24.
@pytest.mark.parametrize(
    ("dtype", "axis", "activation", "masked"),
    [
        ("float32", -1, None, False),
        pytest.param("float32", 1, "silu", True, marks=pytest.mark.on_every_backend),
        ("mixed_bfloat16", 1, None, False),
        ("mixed_bfloat16", -1, "silu", True),
        ("float64", -1, "silu", False),
        ("float64", 1, None, True),
    ],
)
@every_case
def test_rows_2_21_and_35_every_policy_is_the_references(
    case: Case, masked: bool, activation: str | None, axis: int, dtype: str
) -> None:
    """Rows 2, 21 and 35: with a mask, in ghost batches with a ragged tail, on any axis."""
    if dtype == "float64" and BACKEND == "jax":
        dtype = "float32"  # JAX has no other unless jax_enable_x64 is set before it starts
    shape = (8, 5, 4) if axis == -1 else (8, 4, 5)
    layer = made_for(case, 4, axis, 3, activation=activation, dtype=dtype)
    x, dy = draw(shape, 1, dtype), draw(shape, 2, dtype)
    mask = np.random.default_rng(3).random((8, 5)) < 0.6 if masked else None
    check(case, layer, x, dy, axis, mask, dtype=dtype, activation=activation)


SHAPES = [
    pytest.param((8, 4), -1, id="dense"),
    pytest.param((3, 4), -1, id="one-group"),
    pytest.param((8, 3, 2, 4), -1, id="image", marks=pytest.mark.on_every_backend),
    pytest.param((8, 4, 3, 2), 1, id="image-channels-first"),
    pytest.param((8, 3, 4, 2), 2, id="channels-between"),
]


@pytest.mark.one_in(7)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@every_case
def test_rows_21_and_35_compiled_and_far_from_zero(
    case: Case, shape: tuple[int, ...], axis: int, request: pytest.FixtureRequest
) -> None:
    """|mean|/std of 1e5 in every second; by XLA on TensorFlow and JAX; torch.compile is slow: one a case."""
    at = list(CASES.values()).index(case) + [shape.values[0] for shape in SHAPES].index(shape)
    offset = 1e5 * (at % 2)
    compiled = BACKEND != "torch" or ("image" in request.node.name and not offset)
    layer = made_for(case, 4, axis, len(shape), offset)
    x, dy = draw(shape, 1, "float32", offset), draw(shape, 2, "float32")
    check(case, layer, x, dy, axis, compiled=compiled)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.policy.measures(case.training)]
)
def test_row_2_masked_positions_are_normalized_too(name: str) -> None:
    """Row 2: they are in no statistic, whatever a loss makes of their outputs, and get their own gradient."""
    case = CASES[name]
    layer = made_for(case, 4, -1, 3)
    x, dy = draw((8, 5, 4), 1, "float32"), draw((8, 5, 4), 2, "float32")
    mask = np.random.default_rng(4).random((8, 5)) < 0.6
    mask[3:6] = False  # all of a ghost batch
    weights = [keras.ops.convert_to_numpy(w) for w in layer.weights[:4]]
    found = results(layer, x, dy, training=case.training, mask=mask, compiled=COMPILED)
    wanted = with_masked_positions(case, *(np.moveaxis(v, -1, 1) for v in (x, dy)), weights, mask)
    # A group of no values has var 0: its dx is in units of 1/sqrt(epsilon), which is its scale.
    for what, ours, theirs in zip(("y", "dx", "dgamma", "dbeta"), found, wanted, strict=True):
        theirs = np.moveaxis(theirs, 1, -1) if theirs.ndim > 1 else theirs
        assert_close(ours, theirs, dtype=F32, what=what)


def test_channels_on_the_first_axis_have_their_samples_on_the_second() -> None:
    """Row 35: as everywhere, samples are on the first axis that is not the channels'."""
    x, dy = draw((4, 8), 1, "float32"), draw((4, 8), 2, "float32")
    for name in ("ghost", "ghost-in-turn", "adapted-in-inference"):
        found, theirs = [], []
        for axis, turned in ((0, False), (-1, True)):
            layer = made_for(CASES[name], 4, axis, 2)
            values = (x.T.copy(), dy.T.copy()) if turned else (x, dy)
            y, dx, *rest = results(layer, *values, training=CASES[name].training, compiled=COMPILED)
            found.append([y.T, dx.T, *rest] if turned else [y, dx, *rest])
            theirs.append(layer.get_weights())
        for one, other in zip([*found[0], *theirs[0]], [*found[1], *theirs[1]], strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.on_every_backend
@pytest.mark.parametrize(
    ("name", "masked", "jit_compile"),
    covering_array(
        ["ghost", "ghost-even", "ghost-in-turn", "adapted-in-inference"], [False, True], [False, True]
    ),
)
def test_row_21_a_number_of_samples_that_is_not_known_when_a_step_is_traced(
    name: str, masked: bool, jit_compile: bool
) -> None:
    """Row 21: TensorFlow traces a step once for batches of any size: full ones, ragged ones, small ones."""
    if BACKEND != "tensorflow":
        pytest.skip("only TensorFlow traces without a size")
    import tensorflow as tf

    case = CASES[name]
    layer = made_for(case, 4, -1, 3)
    specs = [
        tf.TensorSpec((None, None, 4)),
        tf.TensorSpec((None, None, 4)),
        tf.TensorSpec((None, None), tf.bool),
    ]

    @tf.function(input_signature=specs, jit_compile=jit_compile)
    def step(x: Any, dy: Any, mask: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=case.training, mask=mask if masked else None)
        return y, tape.gradient(y, x, dy)

    for samples in (8, 7, 2, 12, 1, 0):
        x, dy = draw((samples, 5, 4), samples, "float32"), draw((samples, 5, 4), 2, "float32")
        mask = np.random.default_rng(5).random((samples, 5)) < (0.7 if masked else 2.0)
        dy = np.where(mask[..., None], dy, 0).astype("float32")
        weights = layer.get_weights()
        y, dx = (value.numpy() for value in step(x, dy, mask))
        first, second = (np.moveaxis(v, -1, 1) for v in (x, dy))
        wanted = expected(case, first, second, weights, mask=mask)
        assert_close(np.moveaxis(y, -1, 1) * mask[:, None], wanted.y, dtype=F32, what="y")
        assert_close(np.moveaxis(dx, -1, 1), wanted.dx, dtype=F32, scale=wanted.std, what="dx")
        assert_close(layer.moving_mean.numpy(), wanted.mean, dtype=F32, what="moving_mean")
        assert_close(layer.moving_variance.numpy(), wanted.var, dtype=F32, what="moving_variance")
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.on_every_backend
@pytest.mark.parametrize("name", ["ghost", "renorm-half-open", "running", "adapted", "synced-ghost"])
def test_fit_trains_by_the_policy_with_a_ragged_last_batch(name: str) -> None:
    """Two steps of `fit`, 8 samples and then 3, leave the moving statistics of the reference."""
    case = CASES[name]
    norm = made_for(case, 4, -1, 2)
    model = keras.Sequential([keras.Input((4,)), norm])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=BACKEND != "torch")
    x = draw((11, 4), 1, "float32")
    weights = norm.get_weights()[:4]
    for step, part in enumerate((x[:8], x[8:])):
        wanted = expected(case._replace(batches=case.batches + step), part, part, weights)
        weights = [*weights[:2], wanted.mean, wanted.var]
    model.fit(x, x, batch_size=8, shuffle=False, verbose=0)
    assert_close(norm.moving_mean.numpy(), weights[2], dtype=F32, what="moving_mean")
    assert_close(norm.moving_variance.numpy(), weights[3], dtype=F32, what="moving_variance")
    if norm.batches is not None:
        assert int(norm.batches.numpy()) == case.batches + 2


@pytest.mark.on_every_backend
def test_momentum_is_kerass() -> None:
    """In turn too: with momentum 0.9, a tenth of each ghost batch comes in."""
    layer = made_for(CASES["ghost-in-turn"], 4, -1, 2)
    layer.moving_mean.assign(np.zeros(4))
    layer(np.repeat([[1.0], [1.0], [1.0], [3.0]], 4, axis=1).astype("float32"), training=True)
    np.testing.assert_allclose(layer.moving_mean.numpy(), 0.1 * MOMENTUM + 0.3, rtol=1e-6)
