"""`freeze` and `unfreeze`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.errors import OptionError
from batchnorm.keras import BatchNormalization
from batchnorm.keras.freeze import freeze, unfreeze
from batchnorm.keras.norms import norms_within

from .foldable import dense, draw, randomized
from .test_fold_copy import Subclassed

Stock = layers.BatchNormalization


def network(kind: Any) -> Any:
    inner = keras.Sequential([keras.Input((6, 4)), dense(5), kind(name="norm")], name="inner")
    model = keras.Sequential(
        [
            keras.Input((6, 3)),
            dense(4),
            layers.TimeDistributed(kind(name="norm"), name="each"),
            inner,
            layers.GlobalAveragePooling1D(),
            kind(name="last"),
            dense(2),
        ]
    )
    return randomized(model)


def values(model: Any) -> dict[str, Any]:
    return {
        f"{name}/{weight.name}": keras.ops.convert_to_numpy(weight.value).copy()
        for name, norm in norms_within(model)
        for weight in norm.weights
    }


def trained(model: Any) -> Any:
    model.compile("sgd", "mse")
    model.fit(draw((16, 6, 3)) * 3 + 5, draw((16, 2)), batch_size=8, epochs=1, verbose=0)
    return model


def moved(model: Any) -> set[str]:
    """Names of the norms' weights that an epoch of training changes."""
    before = values(model)
    after = values(trained(model))
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("kind", [BatchNormalization, Stock], ids=["ours", "stock"])
def test_no_weight_of_a_frozen_norm_moves(kind: Any) -> None:
    model = network(kind)
    assert freeze(model) is model
    kernels = [keras.ops.convert_to_numpy(w.value).copy() for w in model.trainable_weights]
    assert not moved(model)
    for before, weight in zip(kernels, model.trainable_weights, strict=True):
        assert not np.array_equal(before, keras.ops.convert_to_numpy(weight.value))
    x = draw((8, 6, 3))
    for mode in (True, False):
        np.testing.assert_array_equal(
            *(keras.ops.convert_to_numpy(model(x, training=training)) for training in (mode, False))
        )


def test_row_4_frozen_layers_do_not_thaw() -> None:
    """Row 4 of the user pains: layers thaw at `model.trainable = True`, as every fine-tuning sets it."""
    model = freeze(network(BatchNormalization))
    model.trainable = False
    model.trainable = True
    assert not moved(model)
    assert all(not norm.trainable for _, norm in norms_within(model))


@pytest.mark.parametrize("kind", [BatchNormalization, Stock], ids=["ours", "stock"])
def test_unfreeze_undoes_it(kind: Any) -> None:
    model = freeze(network(kind))
    assert unfreeze(model) is model
    # gamma and beta in front of another normalization have gradients that are all but zero.
    assert moved(model) >= {name for name in values(model) if "moving" in name}


def test_unfreeze_leaves_our_layers_alone_that_freeze_did_not_freeze() -> None:
    model = network(BatchNormalization)
    model.layers[-2].trainable = False
    unfreeze(model)
    assert not model.layers[-2].trainable


def test_a_frozen_model_is_saved_frozen(tmp_path: Any) -> None:
    freeze(network(BatchNormalization)).save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    model.trainable = True
    assert not moved(model)


def test_a_subclassed_model() -> None:
    model = Subclassed()
    model(draw((4, 5)))
    freeze(model)
    assert not model.norm.trainable


def test_what_has_no_norm_is_an_error() -> None:
    model = keras.Sequential([keras.Input((3,)), dense(2)], name="net")
    for verb in (freeze, unfreeze):
        with pytest.raises(
            OptionError, match=rf"net \(Sequential\) has no batch normalization to {verb.__name__}"
        ):
            verb(model)
        with pytest.raises(OptionError, match=f"{verb.__name__} takes a Keras model or layer; got a list"):
            verb([model])
