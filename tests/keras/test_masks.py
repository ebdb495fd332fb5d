"""Values that a mask leaves out are in no statistic, in every layout; row 2 of the user pains."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch

from batchnorm.keras import BatchNormalization
from tests.support.compare import assert_close

from .gradients import results
from .oracle import oracle
from .test_numbers import MOMENTUM, draw, made, numbers

# Of torch.compile, at the breaks that Keras's own code makes in a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

F32 = torch.float32
GARBAGE = 1e4

# Shape, channel axis, shape of the mask, and where the mask gets its new axis to broadcast.
CASES = [
    pytest.param((9, 4), -1, (9,), 1, id="dense"),
    pytest.param((5, 6, 4), -1, (5, 6), 2, id="sequence"),
    pytest.param((5, 4, 6), 1, (5, 6), 1, id="sequence-channels-first"),
    pytest.param((5, 6, 1), -1, (5, 6), 2, id="one-channel"),
    pytest.param((5, 1, 6), 1, (5, 6), 1, id="one-channel-first"),
    pytest.param((3, 4, 5, 2), -1, (3, 4, 5), 3, id="image"),
    pytest.param((3, 2, 4, 5), 1, (3, 4, 5), 1, id="image-channels-first"),
    pytest.param((3, 2, 4, 5), 1, (3, 1, 5), 1, id="columns"),
    pytest.param((3, 4, 4, 5), 1, (3, 4, 5), 1, id="as-many-channels-as-rows"),
    pytest.param((5, 6, 6), 1, (5, 6), 1, id="positions-where-both-ways-fit"),
    pytest.param((5, 4, 6), 1, (5, 4), 2, id="masking-layers-own-over-channels"),
]


@pytest.mark.one_in(3)
@pytest.mark.on_every_backend
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("shape", "axis", "mask_shape", "new_axis"), CASES)
def test_row_2_masked_values_are_in_no_statistic(
    shape: tuple[int, ...],
    axis: int,
    mask_shape: tuple[int, ...],
    new_axis: int,
    compiled: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Far from zero; compiled, in every second shape."""
    is_even = [case.values[0] for case in CASES].index(shape) % 2 == 0
    offset = 1e5 * (not compiled or is_even)
    # torch.compile takes seconds a case, and so does JAX, which compiles every operation of an eager call.
    slow = {"torch": compiled, "jax": not compiled}.get(keras.backend.backend(), False)
    if slow and "image-channels-first" not in request.node.name:
        pytest.skip("compiling takes seconds a case here: one shape is enough")
    layer = made(shape[axis], axis, len(shape))
    mask = np.random.default_rng(5).random(mask_shape) < 0.6
    counts = np.broadcast_to(np.expand_dims(mask, new_axis), shape)
    x, dy = draw(shape, 1, offset), draw(shape, 2)
    x = np.where(counts, x, x + 50).astype("float32")
    _, _, old_mean, old_var = (weight.numpy() for weight in layer.weights)
    expected, mean, var = oracle(numbers(layer), x, dy, axis, counts)
    found = results(layer, x, dy, training=True, mask=mask, compiled=compiled)
    scale = np.sqrt(var + layer.epsilon).reshape(
        [-1 if dim == axis % len(shape) else 1 for dim in range(len(shape))]
    )
    assert_close(found.y, expected.y, dtype=F32, what="y")
    assert_close(found.dx, expected.dx, scale=scale, dtype=F32, what="dx")
    for what in ("dgamma", "dbeta"):
        assert_close(getattr(found, what), getattr(expected, what), dtype=F32, what=what)
    some = counts.any(tuple(dim for dim in range(len(shape)) if dim != axis % len(shape)))
    kept = np.where(some, MOMENTUM, 1.0)
    assert_close(
        layer.moving_mean.numpy(), kept * old_mean + (1 - kept) * mean, dtype=F32, what="moving_mean"
    )
    assert_close(
        layer.moving_variance.numpy(), kept * old_var + (1 - kept) * var, dtype=F32, what="moving_var"
    )


@pytest.mark.on_every_backend
def test_row_2_padded_equals_unpadded() -> None:
    lengths = (6, 2, 5)
    padded = np.full((3, 6, 4), GARBAGE, "float32")
    mask = np.arange(6) < np.array(lengths)[:, None]
    values = draw((sum(lengths), 4), 1, 2.0)
    padded[mask] = values
    one, other = (made(4, -1, ndim) for ndim in (3, 2))
    y = keras.ops.convert_to_numpy(one(padded, training=True, mask=mask))
    expected = keras.ops.convert_to_numpy(other(values, training=True))
    assert_close(y[mask], expected, dtype=F32, what="y")
    for ours, theirs in zip(one.weights, other.weights, strict=True):
        assert_close(ours.numpy(), theirs.numpy(), dtype=F32, what=ours.name)


@pytest.mark.on_every_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_whatever_is_masked_out_leaves_the_statistics_clean(bad: float) -> None:
    x, mask = draw((6, 5, 3), 1), np.random.default_rng(0).random((6, 5)) < 0.5
    spoiled = np.where(mask[..., None], x, np.float32(bad))
    clean, spoilt = made(3, -1, 3), made(3, -1, 3)
    y = keras.ops.convert_to_numpy(clean(x, training=True, mask=mask))
    found = keras.ops.convert_to_numpy(spoilt(spoiled, training=True, mask=mask))
    np.testing.assert_array_equal(found[mask], y[mask])
    for ours, theirs in zip(clean.weights, spoilt.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


@pytest.mark.on_every_backend
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("samples", [0, 4])
def test_a_batch_without_values_moves_nothing(samples: int, renorm: bool) -> None:
    layer = made(3, -1, 3, renorm=renorm)
    before = layer.get_weights()
    mask = np.zeros((samples, 5), bool)
    y = layer(np.ones((samples, 5, 3), "float32"), training=True, mask=mask)
    assert np.isfinite(keras.ops.convert_to_numpy(y)).all()
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.on_every_backend
def test_an_empty_batch_moves_nothing() -> None:
    layer = made(3, -1, 2)
    before = layer.get_weights()
    assert tuple(layer(np.ones((0, 3), "float32"), training=True).shape) == (0, 3)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.on_every_backend
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere a layer knows all shapes")
def test_a_mask_of_known_shape_fits_inputs_of_unknown_shape() -> None:
    import tensorflow as tf

    layer, other = made(4, -1, 3), made(4, -1, 3)
    x, mask = draw((8, 5, 4), 1), np.random.default_rng(0).random((8, 5)) < 0.5

    @tf.function(input_signature=[tf.TensorSpec([None, 5, 4])])
    def found(x: Any) -> Any:
        return layer(x, training=True, mask=mask)

    assert_close(found(x).numpy(), other(x, training=True, mask=mask).numpy(), dtype=F32, what="y")


def test_inference_ignores_the_mask() -> None:
    layer = made(3, -1, 3)
    x = draw((4, 5, 3), 1)
    masked, plain = (
        keras.ops.convert_to_numpy(layer(x, mask=mask)) for mask in (np.zeros((4, 5), bool), None)
    )
    np.testing.assert_array_equal(masked, plain)


@pytest.mark.parametrize("shape", [(5, 3, 4, 1), (5,), (5, 7), (6, 4)])
def test_a_mask_that_does_not_fit_is_refused_by_the_layers_name(shape: tuple[int, ...]) -> None:
    layer = BatchNormalization(axis=1, name="norm_of_words")
    layer.build((None, 3, 4))
    before = layer.get_weights()
    with pytest.raises(ValueError, match="norm_of_words") as raised:
        layer(draw((5, 3, 4), 1), training=True, mask=np.ones(shape, bool))
    assert str(shape).rstrip(")") in str(raised.value)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.on_every_backend
@pytest.mark.parametrize("run_eagerly", [True, False])
def test_masks_of_keras_layers_arrive_and_go_on(run_eagerly: bool) -> None:
    """An Embedding's mask through our layer: padding is in no statistic, and the next layer sees the mask."""
    words = np.array([[3, 1, 0, 0], [2, 0, 0, 0], [1, 2, 3, 1]])
    norm = BatchNormalization(momentum=0.0)
    seen: list[Any] = []

    class Look(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.supports_masking = True

        def call(self, x: Any, mask: Any = None) -> Any:
            seen.append(mask is not None)
            return x

    embedding = keras.layers.Embedding(4, 3, mask_zero=True)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), embedding, norm, Look()])
    model.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=run_eagerly)
    model.fit(words, np.zeros((3, 4, 3), "float32"), batch_size=3, verbose=0)
    table = embedding.get_weights()[0].astype(float)
    values = table[words[words > 0]]
    assert_close(norm.moving_mean.numpy(), values.mean(0), dtype=F32, what="moving_mean")
    assert_close(norm.moving_variance.numpy(), values.var(0), dtype=F32, what="moving_variance")
    assert seen
    assert all(seen)
