"""A true drop-in: the stock layer's signature, weights, files, `trainable` and training; and what is new."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization

from .gradients import Array
from .test_numbers import draw, made

Stock = keras.layers.BatchNormalization
OURS_ONLY = {
    "activation": "linear",
    "frozen": False,
    "statistics": {"policy": "Batch"},
    "nonfinite": "propagate",
    "small_batch": "allow",
    "warm_start": False,
}


def test_signature_is_the_stock_one_and_then_keyword_only() -> None:
    stock, ours = (
        list(inspect.signature(kind.__init__).parameters.values()) for kind in (Stock, BatchNormalization)
    )
    shared = len(stock) - 1  # all but **kwargs
    assert [(p.name, p.default) for p in stock[:shared]] == [(p.name, p.default) for p in ours[:shared]]
    assert [p.name for p in ours[shared:]] == [*OURS_ONLY, "kwargs"]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[shared:-1])


@pytest.mark.parametrize("renorm", [False, True])
def test_config_and_weights_are_the_stock_ones(renorm: bool) -> None:
    options = {"axis": 1, "momentum": 0.8, "renorm": renorm, "gamma_regularizer": "l2", "name": "norm"}
    ours, stock = BatchNormalization(**options), Stock(**options)
    config = ours.get_config()
    assert {key: value for key, value in config.items() if key not in OURS_ONLY} == stock.get_config()
    assert {key: config[key] for key in OURS_ONLY} == OURS_ONLY
    for layer in (ours, stock):
        layer.build((None, 4, 5))
    assert [(w.name, tuple(w.shape), w.dtype) for w in ours.weights] == [
        (w.name, tuple(w.shape), w.dtype) for w in stock.weights
    ]
    assert [w.path for w in ours.weights] == [w.path for w in stock.weights]
    assert isinstance(ours, Stock)
    again = BatchNormalization.from_config(config)
    assert again.get_config() == config


def test_a_stock_config_makes_ours() -> None:
    config = Stock(axis=1, epsilon=1e-5).get_config()
    assert BatchNormalization.from_config(config).get_config() == {**config, **OURS_ONLY}


def network(norm: Any, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6, 5)),
            keras.layers.Conv1D(8, 3),
            norm(name="one", **options),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(7),
            norm(name="two", **options),
            keras.layers.Dense(3),
        ]
    )


def trained(norm: Any, run_eagerly: bool = False, jit_compile: bool | str = "auto", **options: Any) -> Any:
    model = network(norm, **options)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        run_eagerly=run_eagerly,
        jit_compile=jit_compile,
    )
    x, y = draw((40, 6, 5), 1, 1.0), np.random.default_rng(0).integers(0, 3, 40)
    history = model.fit(x, y, batch_size=20, epochs=4, shuffle=False, verbose=0)
    return model, history.history["loss"], model.predict(x, verbose=0)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("how", ["eager", pytest.param("compiled", marks=pytest.mark.on_every_backend)])
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"scale": False, "momentum": 0.7}])
def test_training_goes_as_with_the_stock_layer(how: str, options: dict[str, Any]) -> None:
    eager = how == "eager"
    if eager and keras.backend.backend() == "jax":
        pytest.skip("JAX compiles every operation of an eager step by itself, for ten seconds")
    # torch.compile of Keras's trainer takes a minute; the layer alone is compiled in test_numbers.py.
    jit = not eager and keras.backend.backend() != "torch"
    ours, our_loss, our_output = trained(BatchNormalization, eager, jit, **options)
    stock, stock_loss, stock_output = trained(Stock, eager, jit, **options)
    np.testing.assert_allclose(our_loss, stock_loss, rtol=1e-4)
    np.testing.assert_allclose(our_output, stock_output, rtol=1e-3, atol=1e-4)
    for one, other in zip(ours.weights, stock.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-3, atol=1e-4, err_msg=one.path)


@pytest.mark.slow
@pytest.mark.on_every_backend
def test_keras_files_of_ours_load_anywhere(tmp_path: Path) -> None:
    model = network(BatchNormalization, activation="silu")
    model.layers[1].frozen = True
    for weight in model.weights:
        weight.assign(np.abs(draw(tuple(weight.shape), 1)) + 0.5)
    x = draw((4, 6, 5), 2)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, keras, numpy as np, batchnorm.keras\n"
        "model = keras.models.load_model(sys.argv[1] + '/model.keras')\n"
        "assert type(model.layers[1]) is batchnorm.keras.BatchNormalization and model.layers[1].frozen\n"
        "np.save(sys.argv[1] + '/y.npy', model.predict(np.load(sys.argv[1] + '/x.npy'), verbose=0))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-5, atol=1e-6)


def test_weights_go_from_stock_to_ours_and_back(tmp_path: Path) -> None:
    ours, stock = network(BatchNormalization), network(Stock)
    for source, target in ((ours, stock), (stock, ours)):
        for weight in source.weights:
            weight.assign(np.random.default_rng(len(weight.shape)).random(tuple(weight.shape)) + 0.5)
        source.save_weights(tmp_path / "of.weights.h5")
        target.load_weights(tmp_path / "of.weights.h5")
        for one, other in zip(source.weights, target.weights, strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_stock_file_becomes_ours(tmp_path: Path) -> None:
    """As docs/keras.md says: Keras looks up its own layers by their module, past `custom_objects`."""
    stock = network(Stock)
    for weight in stock.weights:
        weight.assign(np.abs(draw(tuple(weight.shape), 1)) + 0.5)
    x = draw((4, 6, 5), 2)
    expected = stock.predict(x, verbose=0)
    stock.save(tmp_path / "stock.keras")
    custom = {"BatchNormalization": BatchNormalization}
    loaded = keras.models.load_model(tmp_path / "stock.keras", custom_objects=custom)
    assert type(loaded.layers[1]) is Stock

    def ours(layer: Any) -> Any:
        kind = BatchNormalization if type(layer) is Stock else type(layer)
        return kind.from_config(layer.get_config())

    model = keras.models.clone_model(loaded, clone_function=ours)
    model.set_weights(loaded.get_weights())
    assert [type(layer) for layer in (model.layers[1], model.layers[5])] == [BatchNormalization] * 2
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-5)


def moving(layer: Any) -> list[Array]:
    return [np.asarray(layer.moving_mean.numpy()), np.asarray(layer.moving_variance.numpy())]


def test_row_4_trainable_false_is_inference_mode() -> None:
    layer = made(4, -1, 2)
    before = layer.get_weights()
    x = draw((8, 4), 1, 3.0)
    layer.trainable = False
    frozen, inference = (keras.ops.convert_to_numpy(layer(x, training=mode)) for mode in (True, False))
    np.testing.assert_array_equal(frozen, inference)
    assert layer.trainable_variables == []
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    layer.trainable = True
    assert len(layer.trainable_variables) == 2
    assert np.abs(keras.ops.convert_to_numpy(layer(x, training=True)) - inference).max() > 0.1


def test_row_4_trainable_false_holds_from_the_constructor_and_through_files(tmp_path: Path) -> None:
    network(BatchNormalization, trainable=False).save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    layer = model.layers[1]
    again = BatchNormalization.from_config(BatchNormalization(trainable=False).get_config())
    assert not layer.trainable
    assert not again.trainable
    layer.frozen = False  # as it was: nothing changes
    assert not layer.trainable
    before = layer.get_weights()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(draw((16, 6, 5), 1, 2.0), np.zeros(16), batch_size=8, verbose=0)
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    layer.trainable = True
    assert len(layer.trainable_variables) == 2


def test_row_4_frozen_layers_stay_frozen() -> None:
    """`model.trainable = True`, as every fine-tuning does, thaws stock layers, and not one that is frozen."""
    model = network(BatchNormalization)
    model.layers[1].frozen = True
    model.trainable = False
    model.trainable = True
    assert [layer.trainable for layer in model.layers if isinstance(layer, Stock)] == [False, True]
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [layer.get_weights() for layer in (model.layers[1], model.layers[5])]
    model.fit(draw((16, 6, 5), 1, 2.0), np.zeros(16), batch_size=8, verbose=0)
    for old, new in zip(before[0], model.layers[1].get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert any((old != new).any() for old, new in zip(before[1], model.layers[5].get_weights(), strict=True))
    copy = BatchNormalization.from_config(model.layers[1].get_config())
    copy.build((None, 8))
    copy.trainable = True
    assert copy.frozen
    assert copy.trainable_variables == []
    copy.frozen = False
    assert len(copy.trainable_variables) == 2


def test_row_35_any_axis() -> None:
    x = draw((5, 3, 4, 6), 1, 2.0)
    for axis in (0, 1, 2, 3, -1, -2):
        layer = made(x.shape[axis], axis, 4)
        y = keras.ops.convert_to_numpy(layer(x, training=True))
        other = made(x.shape[axis], -1, 4)
        expected = keras.ops.convert_to_numpy(other(np.moveaxis(x, axis, -1), training=True))
        np.testing.assert_allclose(np.moveaxis(y, axis, -1), expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(moving(layer), moving(other), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_an_activation_with_weights_learns() -> None:
    norm = BatchNormalization(activation=keras.layers.PReLU())
    model = keras.Sequential([keras.Input((5,)), norm, keras.layers.Dense(2)])
    assert [weight.name for weight in norm.trainable_weights] == ["gamma", "beta", "alpha"]
    model.compile("sgd", "mse")
    model.fit(draw((16, 5), 1), draw((16, 2), 2), verbose=0)
    assert (norm.activation.alpha.numpy() != 0).any()
    again = keras.Sequential.from_config(model.get_config())
    again.set_weights(model.get_weights())
    x = draw((3, 5), 3)
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
def test_an_activation_over_an_axis_sees_the_inputs_layout(axis: int, training: bool) -> None:
    """As a layer after the normalization would: softmax is over the last axis, not over batchnorm's."""
    x = draw((2, 4, 5), 1, 2.0)
    plain, ours = BatchNormalization(axis=axis), BatchNormalization(axis=axis, activation="softmax")
    y = keras.ops.convert_to_numpy(plain(x, training=training))
    expected = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(ours(x, training=training)), expected, rtol=1e-5, atol=1e-6
    )
    learns = BatchNormalization(axis=axis, activation=keras.layers.PReLU(alpha_initializer="ones"))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(learns(x, training=training)), y, rtol=1e-6)


def test_symbolic_calls_have_the_stock_shapes() -> None:
    x = keras.Input((None, 5), dtype="float16")
    for dtype in (None, "mixed_float16"):
        ours, stock = (kind(dtype=dtype)(x) for kind in (BatchNormalization, Stock))
        assert ours.shape == stock.shape
        assert ours.dtype == stock.dtype


@pytest.mark.parametrize(
    "options",
    [
        {"renorm": True, "renorm_clipping": {"rmaxx": 1.0}},
        {"axis": "last"},
        {"activation": "reluu"},
        {"momentum": 0.9, "epsilons": 1},
    ],
)
def test_wrong_options_raise_as_in_keras(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        BatchNormalization(**options)


def test_a_missing_keras_names_the_extra() -> None:
    script = (
        "import sys\n"
        "sys.modules['keras'] = None\n"  # what Python does where it is not installed, as near as can be
        "try:\n    import batchnorm.keras\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'batchnorm[keras]'" in done.stdout
