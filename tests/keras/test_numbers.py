"""The layer's numbers on this backend: output, gradients and moving statistics, held to float64."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch

from batchnorm import reference
from batchnorm.keras import BatchNormalization
from tests.support.compare import assert_close

from .gradients import Array, results
from .oracle import Layer, oracle

MOMENTUM = 0.9
F32 = torch.float32
SHAPES = [
    pytest.param((33, 5), -1, id="dense"),
    pytest.param((7, 5, 4), -1, id="sequence"),
    pytest.param((7, 4, 5), 1, id="sequence-channels-first"),
    pytest.param((3, 6, 5, 4), -1, id="image"),
    pytest.param((3, 4, 6, 5), 1, id="image-channels-first"),
    pytest.param((2, 3, 4, 3, 3), -1, id="volume"),
    pytest.param((6, 4, 3, 1), -1, id="one-channel"),
    pytest.param((3, 20), 0, id="channels-on-axis-0"),
    pytest.param((1, 5), -1, id="one-value"),
    pytest.param((1, 6, 5, 4), -1, id="one-sample"),
]


def draw(shape: tuple[int, ...], seed: int, offset: float = 0.0) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) + offset).astype("float32")


def made(channels: int, axis: int, ndim: int, **options: Any) -> BatchNormalization:
    """A built layer with weights away from 1 and 0."""
    layer = BatchNormalization(axis=axis, momentum=MOMENTUM, **options)
    shape: list[int | None] = [None] * ndim
    shape[axis] = channels
    layer.build(tuple(shape))
    for number, weight in enumerate(weight for weight in layer.weights if weight.shape):  # no counts
        weight.assign(np.abs(draw((channels,), 10 + number)) + 0.5)
    if layer.scale:
        layer.gamma.assign(np.resize([1.7, -0.6, 0.4], channels))
    return layer


def numbers(layer: BatchNormalization, **more: Any) -> Layer:
    gamma, beta = (None if w is None else np.asarray(w.numpy()) for w in (layer.gamma, layer.beta))
    return Layer(gamma, beta, layer.epsilon, **more)


def moved(old: Array, batch: Array) -> Array:
    return old * MOMENTUM + batch * (1 - MOMENTUM)


@pytest.mark.one_in(3)
@pytest.mark.on_every_backend
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_training_step_is_the_references(
    shape: tuple[int, ...], axis: int, compiled: bool, request: pytest.FixtureRequest
) -> None:
    """Far from zero; compiled, in every second shape."""
    is_even = [case.values[0] for case in SHAPES].index(shape) % 2 == 0
    offset = 1e6 * (not compiled or is_even)
    if keras.backend.backend() == "jax" and not compiled and "image-channels-first" not in request.node.name:
        pytest.skip("JAX compiles every operation of an eager call: one shape is enough")
    layer = made(shape[axis], axis, len(shape))
    x, dy = draw(shape, 1, offset), draw(shape, 2)
    gamma, beta, old_mean, old_var = (weight.numpy() for weight in layer.weights)
    found = results(layer, x, dy, training=True, compiled=compiled)
    wide, wide_dy = (np.moveaxis(v, axis, 1 if axis else -1).astype(np.float64) for v in (x, dy))
    forward = reference.forward(wide, gamma, beta, eps=layer.epsilon)
    backward = reference.backward(wide, wide_dy, gamma, beta, eps=layer.epsilon)
    std = np.sqrt(forward.var + layer.epsilon).reshape(1, -1, *[1] * (len(shape) - 2))
    ours = [np.moveaxis(v, axis, 1 if axis else -1) for v in (found.y, found.dx)]
    assert_close(ours[0], forward.y, dtype=F32, what="y")
    assert_close(ours[1], backward.dx, dtype=F32, scale=std, what="dx")
    assert found.dgamma is not None
    assert found.dbeta is not None
    assert_close(found.dgamma, backward.dweight, dtype=F32, what="dgamma")
    assert_close(found.dbeta, backward.dbias, dtype=F32, what="dbeta")
    assert_close(layer.moving_mean.numpy(), moved(old_mean, forward.mean[0]), dtype=F32, what="moving_mean")
    assert_close(
        layer.moving_variance.numpy(), moved(old_var, forward.var[0]), dtype=F32, what="moving_variance"
    )


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_inference_is_the_references_and_moves_nothing(
    shape: tuple[int, ...], axis: int, offset: float
) -> None:
    layer = made(shape[axis], axis, len(shape))
    layer.moving_mean.assign(layer.moving_mean.numpy() + offset)
    before = [weight.numpy() for weight in layer.weights]
    x, dy = draw(shape, 1, offset), draw(shape, 2)
    found = results(layer, x, dy, training=False)
    gamma, beta, mean, var = (weight.astype(np.float64) for weight in before)
    wide, wide_dy = (np.moveaxis(v, axis, -1).astype(np.float64) for v in (x, dy))
    rstd = 1 / np.sqrt(var + layer.epsilon)
    assert_close(np.moveaxis(found.y, axis, -1), (wide - mean) * rstd * gamma + beta, dtype=F32, what="y")
    assert_close(np.moveaxis(found.dx, axis, -1), wide_dy * rstd * gamma, dtype=F32, what="dx")
    over = tuple(range(len(shape) - 1))
    assert found.dgamma is not None
    assert_close(found.dgamma, (wide_dy * (wide - mean) * rstd).sum(over), dtype=F32, what="dgamma")
    for old, weight in zip(before, layer.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), old)


@pytest.mark.on_every_backend
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "compiled"),
    [((4, 120, 120, 2), True), ((20_001, 2), True), ((2048, 2), False)],
    ids=["image", "dense", "dense-eager"],
)
def test_long_sums_are_accurate(shape: tuple[int, ...], compiled: bool, masked: bool) -> None:
    """As many values as float32 loses 1e-5 of when it adds them up one by one."""
    layer = made(2, -1, len(shape))
    x, dy = draw(shape, 1, 1e6), draw(shape, 2)
    mask = np.random.default_rng(3).random(shape[:-1]) < 0.7
    call = {"mask": mask} if masked else {}
    compiled = compiled and keras.backend.backend() != "torch"
    found = results(layer, x, dy, training=True, compiled=compiled, **call)
    counts = np.repeat(mask[..., None], 2, axis=-1) if masked else None
    expected, _, var = oracle(numbers(layer), x, dy, -1, counts)
    for what in ("y", "dgamma", "dbeta"):
        assert_close(getattr(found, what), getattr(expected, what), dtype=F32, what=what)
    assert_close(found.dx, expected.dx, scale=np.sqrt(var), dtype=F32, what="dx")


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_without_gamma_or_beta(center: bool, scale: bool, training: bool) -> None:
    layer = made(4, -1, 3, center=center, scale=scale)
    x, dy = draw((5, 6, 4), 1, 3.0), draw((5, 6, 4), 2)
    mean, var = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    layer_numbers = numbers(layer)
    found = results(layer, x, dy, training=training)
    if training:
        expected = oracle(layer_numbers, x, dy, -1)[0]
        assert_close(found.dx, expected.dx, dtype=F32, what="dx")
    else:
        y = (x - mean.astype(float)) / np.sqrt(var.astype(float) + layer.epsilon)
        y = y * (1 if layer_numbers.gamma is None else layer_numbers.gamma)
        expected = found._replace(y=y + (0 if layer_numbers.beta is None else layer_numbers.beta))
    assert_close(found.y, expected.y, dtype=F32, what="y")
    assert (found.dgamma is None, found.dbeta is None) == (not scale, not center)


ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "hard_silu": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": torch.nn.functional.elu,
    "softplus": torch.nn.functional.softplus,  # that no kernel of ours has
    "leaky_relu": lambda z: torch.nn.functional.leaky_relu(z, 0.2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_kerass(name: str) -> None:
    layer = made(3, -1, 3, activation=name)
    x, dy = draw((9, 5, 3), 1, 2.0), draw((9, 5, 3), 2)
    gamma, beta, mean, var = (weight.numpy().astype(float) for weight in layer.weights)
    found = results(layer, x, dy, training=True)
    expected, _, _ = oracle(numbers(layer, activation=ACTIVATIONS[name]), x, dy, -1)
    for what in ("y", "dx", "dgamma", "dbeta"):
        assert_close(getattr(found, what), getattr(expected, what), dtype=F32, what=what)
    layer.set_weights([gamma, beta, mean, var])
    z = (x - mean) / np.sqrt(var + layer.epsilon) * gamma + beta
    y = keras.ops.convert_to_numpy(layer(x, training=False))
    assert_close(y, ACTIVATIONS[name](torch.tensor(z)), dtype=F32, what="inference")


@pytest.mark.on_every_backend
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clipping", [None, {"rmax": 1.2, "rmin": 0.9, "dmax": 0.3}])
@pytest.mark.parametrize("affine", [True, False])
def test_renorm_has_kerass_equations(clipping: dict[str, float] | None, affine: bool, masked: bool) -> None:
    layer = made(
        4, -1, 3, renorm=True, renorm_clipping=clipping, renorm_momentum=0.7, center=affine, scale=affine
    )
    x, dy = draw((5, 6, 4), 1, 2.0), draw((5, 6, 4), 2)
    mask = np.random.default_rng(3).random((5, 6)) < 0.6
    call = {"mask": mask} if masked else {}
    counts = np.repeat(mask[..., None], 4, axis=-1) if masked else None
    old = {weight.name: weight.numpy().astype(float) for weight in layer.weights}
    _, mean, var = oracle(numbers(layer), x, dy, -1, counts)
    std = np.sqrt(var + layer.epsilon)
    r, d = std / old["renorm_stddev"], (mean - old["renorm_mean"]) / old["renorm_stddev"]
    if clipping:
        r, d = np.clip(r, 0.9, 1.2), np.clip(d, -0.3, 0.3)
    layer_numbers = numbers(layer, r=r, d=d)
    found = results(layer, x, dy, training=True, **call)
    expected, _, _ = oracle(layer_numbers, x, dy, -1, counts)
    for what in ("y", "dx", "dgamma", "dbeta"):
        if getattr(expected, what) is not None:
            assert_close(getattr(found, what), getattr(expected, what), dtype=F32, what=what)
    new = {weight.name: weight.numpy() for weight in layer.weights}
    for name, batch, momentum in (
        ("moving_mean", mean, MOMENTUM),
        ("moving_stddev", std, MOMENTUM),
        ("renorm_mean", mean, 0.7),
        ("renorm_stddev", std, 0.7),
    ):
        assert_close(new[name], old[name] * momentum + batch * (1 - momentum), dtype=F32, what=name)
    assert_close(
        new["moving_variance"],
        new["moving_stddev"].astype(float) ** 2 - layer.epsilon,
        dtype=F32,
        what="variance",
    )


@pytest.mark.on_every_backend
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_policies(policy: str, training: bool) -> None:
    wide = policy == "float64"
    if wide and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless jax_enable_x64 is set before it starts")
    layer = made(4, -1, 4, dtype=policy)
    x = keras.ops.cast(draw((5, 6, 3, 4), 1, 2.0), layer.compute_dtype)
    exact = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")).astype(float)
    gamma, beta, mean, var = (keras.ops.convert_to_numpy(keras.ops.cast(w, "float32")) for w in layer.weights)
    if training:
        axes = (0, 1, 2)
        mean, var = exact.mean(axes), exact.var(axes)
    y = layer(x, training=training)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    stored = "float64" if wide else "bfloat16" if policy == "bfloat16" else "float32"
    assert {weight.dtype for weight in layer.trainable_weights} == {stored}
    assert {weight.dtype for weight in layer.non_trainable_weights} == {"float64" if wide else "float32"}
    dtype = {"mixed_float16": torch.float16, "float64": F32}.get(policy, torch.bfloat16)
    expected = (exact - mean) / np.sqrt(var.astype(float) + layer.epsilon) * gamma + beta
    assert_close(keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")), expected, dtype=dtype, what="y")


@pytest.mark.on_every_backend
def test_second_derivatives() -> None:
    """A gradient penalty, as of WGAN-GP. (TensorFlow's own moments take the mean for a constant here.)"""
    layer = made(3, -1, 2)
    x, dy, v = draw((8, 3), 1, 2.0), draw((8, 3), 2), draw((8, 3), 3)
    inputs, cotangent, along = (torch.tensor(value, dtype=torch.float64) for value in (x, dy, v))
    inputs.requires_grad_()
    var, mean = torch.var_mean(inputs, dim=0, correction=0)
    y = (inputs - mean) / torch.sqrt(var + layer.epsilon) * torch.tensor(layer.gamma.numpy())
    (dx,) = torch.autograd.grad(y, inputs, cotangent, create_graph=True)
    (expected,) = torch.autograd.grad(dx, inputs, along)
    found = _second_derivative(layer, x, dy, v)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def _second_derivative(layer: Any, x: Array, dy: Array, v: Array) -> Array:
    """d/dx of v · (dx for the cotangent dy)."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        inputs = tf.constant(x)
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                loss = tf.reduce_sum(layer(inputs, training=True) * dy)
            along = tf.reduce_sum(inner.gradient(loss, inputs) * v)
        return np.asarray(outer.gradient(along, inputs))
    if backend == "jax":
        import jax

        weights = [w.value for w in layer.trainable_variables]
        state = [w.value for w in layer.non_trainable_variables]

        def loss_of(x: Any) -> Any:
            return (layer.stateless_call(weights, state, x, training=True)[0] * dy).sum()

        return np.asarray(jax.grad(lambda x: (jax.grad(loss_of)(x) * v).sum())(x))
    tensor = torch.tensor(x, requires_grad=True)
    loss = (layer(tensor, training=True) * torch.tensor(dy)).sum()
    (gradient,) = torch.autograd.grad(loss, tensor, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.tensor(v)).sum(), tensor)
    return second.numpy()
