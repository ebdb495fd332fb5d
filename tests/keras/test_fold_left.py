"""What `fold` leaves as it is, and the reason that the table gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import BatchNormalization
from batchnorm.keras.fold import fold, fold_table
from batchnorm.keras.norms import norms_within

from .foldable import dense, draw, folded, functional, made, outputs, randomized, sequential

pytestmark = pytest.mark.one_backend  # which norms fold is read off a graph of layers

Stock = layers.BatchNormalization


class OwnNorm(BatchNormalization):
    """Computes something else."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return 2 * super().call(inputs, training=training, mask=mask)


class OwnDense(layers.Dense):
    """May compute something else."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return super().call(inputs, training=training) + 1


class Block(layers.Layer):
    """A layer that holds layers."""

    def build(self, shape: Any) -> None:
        self.dense, self.norm = layers.Dense(5, name="dense"), Stock(name="norm")
        self.dense.build(shape)
        self.norm.build((None, 5))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.norm(self.dense(inputs), training=training)


def norm(**options: Any) -> Any:
    return BatchNormalization(name="norm", **options)


def activation_on_both_sides() -> Any:
    return sequential(dense(4, activation="relu", name="d"), norm(), layers.Softmax(name="soft"))


def own_activation() -> Any:
    return sequential(layers.ReLU(name="r"), norm(activation="tanh"), dense(3))


def other_reader_of_the_layer() -> Any:
    x = keras.Input((5,))
    y = dense(4, name="d")(x)
    return functional(x, layers.Add(name="sum")([norm()(y), layers.ReLU(name="r")(y)]))


def layer_is_an_output() -> Any:
    x = keras.Input((5,))
    y = dense(4, name="d")(x)
    return functional(x, [y, norm()(y)])


def other_reader_of_the_norm() -> Any:
    x = keras.Input((5,))
    y = norm()(layers.ReLU(name="r")(x))
    return functional(x, [dense(3, name="one")(y), dense(3, name="two")(y)])


def norm_is_an_output() -> Any:
    x = keras.Input((5,))
    y = norm()(x)
    return functional(x, [dense(3, name="one")(y), y])


def read_twice_by_one_layer() -> Any:
    x = keras.Input((4, 5))
    y = norm()(layers.ReLU(name="r")(x))
    return functional(x, layers.Attention(name="attention")([y, y]))


def layer_called_twice() -> Any:
    x = keras.Input((5,))
    shared = dense(5, name="d")
    return functional(x, norm()(shared(shared(x))))


def layer_after_called_twice() -> Any:
    x = keras.Input((5,))
    shared = dense(5, name="d")
    return functional(x, [shared(norm()(layers.ReLU(name="r")(x))), shared(x)])


def norm_called_twice() -> Any:
    x = keras.Input((5,))
    shared = norm()
    return functional(x, layers.Add()([shared(dense(4)(x)), shared(dense(4)(x))]))


def nested_model_called_twice() -> Any:
    inner = keras.Sequential([keras.Input((5,)), dense(5, name="d"), norm()], name="inner")
    x = keras.Input((5,))
    return functional(x, inner(inner(x)))


def layer_held_by_a_wrapper_too() -> Any:
    x = keras.Input((4, 5))
    shared = dense(5, name="d")
    return functional(x, norm()(shared(layers.TimeDistributed(shared, name="each")(x))))


def called_in_training() -> Any:
    x = keras.Input((5,))
    return functional(x, norm()(dense(4)(x), training=True))


def model_called_in_training() -> Any:
    inner = keras.Sequential([keras.Input((5,)), dense(5, name="d"), norm()], name="inner")
    x = keras.Input((5,))
    return functional(x, inner(x, training=True))


def dropout_in_training_between() -> Any:
    x = keras.Input((5,))
    return functional(x, norm()(layers.Dropout(0.5, name="drop")(dense(4)(x), training=True)))


def other_reader_of_the_dropout_between() -> Any:
    x = keras.Input((5,))
    y = layers.Dropout(0.5, name="drop")(dense(4, name="d")(x))
    return functional(x, layers.Add(name="sum")([norm()(y), layers.ReLU(name="r")(y)]))


def norm_over_another_axis() -> Any:
    return sequential(dense(4, name="d"), norm(axis=1), dense(3, name="e"), shape=(6, 5))


def padding_after() -> Any:
    conv = made(layers.Conv1D, 3, 3, padding="same", name="conv")
    return sequential(layers.ReLU(name="r"), norm(), conv, shape=(6, 5))


def transposed_after() -> Any:
    conv = made(layers.Conv1DTranspose, 3, 3, name="conv")
    return sequential(layers.ReLU(name="r"), norm(), conv, shape=(6, 5))


def unsupported_kinds() -> Any:
    return sequential(layers.MaxPooling1D(name="pool"), norm(), layers.Flatten(name="flat"), shape=(6, 5))


def subclassed_layer() -> Any:
    return sequential(made(OwnDense, 4, name="own"), norm())


def subclassed_norm() -> Any:
    return sequential(dense(4), OwnNorm(name="norm"))


def lora() -> Any:
    return sequential(layers.Dense(4, lora_rank=2, name="d"), norm())


def quantized() -> Any:
    model = sequential(dense(4, name="d"), norm())
    model.get_layer("d").quantize("int8")
    return model


def inside_a_wrapper() -> Any:
    return sequential(dense(4, name="d"), layers.TimeDistributed(norm(), name="each"), shape=(6, 5))


def inside_a_layer() -> Any:
    return sequential(Block(name="block"))


def another_dtype() -> Any:
    return sequential(dense(4, name="d", dtype="mixed_float16"), norm(dtype="float32"), layers.ReLU())


def activation_with_weights() -> Any:
    return sequential(dense(4, name="d"), norm(activation=layers.PReLU(name="prelu")))


CASES: list[tuple[Callable[[], Any], str]] = [
    (activation_on_both_sides, "before it is the activation relu of d; after it is soft (Softmax)"),
    (own_activation, "before it is r (ReLU); after it is its own activation tanh"),
    (other_reader_of_the_layer, "the output of d is read by norm and r; after it is sum (Add)"),
    (layer_is_an_output, "the output of d is an output of the model; its output is an output of the model"),
    (other_reader_of_the_norm, "before it is r (ReLU); its output is read by one and two"),
    (norm_is_an_output, "before it is the model's input; its output is an output of the model"),
    (read_twice_by_one_layer, "before it is r (ReLU); after it is attention (Attention)"),
    (layer_called_twice, "d is shared: called 2 times; its output is an output of the model"),
    (layer_after_called_twice, "before it is r (ReLU); d is shared: called 2 times"),
    (norm_called_twice, "shared: called 2 times"),
    (nested_model_called_twice, "shared: called 2 times"),
    (layer_held_by_a_wrapper_too, "d is shared; its output is an output of the model"),
    (called_in_training, "called with training=True: it normalizes by the batch"),
    (model_called_in_training, "called with training=True: it normalizes by the batch"),
    (dropout_in_training_between, "before it is drop (Dropout); its output is an output of the model"),
    (other_reader_of_the_dropout_between, "the output of drop is read by norm and r; after it is sum (Add)"),
    (
        norm_over_another_axis,
        "its axis 1 is not the channel axis 2 of d; its axis 1 is not the channel axis 2 of e",
    ),
    (
        padding_after,
        "before it is r (ReLU); after it, conv pads (padding='same') with zeros that it would not shift",
    ),
    (transposed_after, "before it is r (ReLU); after it is conv (Conv1DTranspose)"),
    (unsupported_kinds, "before it is pool (MaxPooling1D); after it is flat (Flatten)"),
    (subclassed_layer, "before it is own (OwnDense); its output is an output of the model"),
    (subclassed_norm, "of a class of its own, OwnNorm"),
    (lora, "d has LoRA weights; its output is an output of the model"),
    (quantized, "d is quantized (int8); its output is an output of the model"),
    (inside_a_wrapper, "inside each, which has no graph"),
    (inside_a_layer, "inside block, which has no graph"),
    (another_dtype, "it turns float16 into float32"),
    (activation_with_weights, "its activation prelu has weights"),
]


@pytest.mark.parametrize(("build", "reason"), CASES, ids=[build.__name__ for build, _ in CASES])
def test_left_as_it_is_with_its_reason(build: Callable[[], Any], reason: str) -> None:
    model = build()
    (row,) = fold_table(model).rows
    assert (row.into, row.direction, row.reason) == (None, None, reason)
    copy = fold(model, verbose=0)
    (_, old), (_, new) = *norms_within(model), *norms_within(copy)
    assert old is not new
    for before, after in zip(old.weights, new.weights, strict=True):
        np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(v.value) for v in (before, after)))
    x = draw((4, *model.inputs[0].shape[1:]))
    for before, after in zip(outputs(model, x), outputs(copy, x), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)


def test_names_are_qualified_by_what_is_around() -> None:
    inner = keras.Sequential([keras.Input((4, 5)), layers.TimeDistributed(norm(), name="each")], name="inner")
    (row,) = fold_table(sequential(inner, shape=(4, 5))).rows
    assert (row.name, row.reason) == ("inner/each/norm", "inside inner/each, which has no graph")


def test_a_norm_that_the_model_holds_but_does_not_use() -> None:
    model = sequential(dense(4))
    functional_model = keras.Model(model.inputs[0], model.outputs[0])
    functional_model.spare = norm()
    functional_model.spare.build((None, 4))
    (row,) = fold_table(functional_model).rows
    assert row.reason == "not in the graph of the model"
    folded(functional_model, draw((4, 5)))


def test_a_mask_is_no_obstacle() -> None:
    """At inference a norm's output does not depend on the mask, and it hands it on as the layer before."""
    x = keras.Input((6, 5))
    y = layers.Masking()(x)
    y = norm()(dense(4, name="d")(y))
    y = layers.GlobalAveragePooling1D()(y)
    model = functional(x, y)
    data = draw((4, 6, 5))
    data[:, 3:] = 0
    copy = folded(model, data)
    assert fold_table(model).rows[0].into == "d"
    unmasked = functional(copy.inputs, [copy.get_layer("d").output])
    assert unmasked is not None


def test_a_mask_that_is_given_by_hand() -> None:
    x, mask = keras.Input((6, 5)), keras.Input((6,), dtype="bool")
    y = norm()(dense(4, name="d")(x), mask=mask)
    model = functional([x, mask], layers.GlobalAveragePooling1D()(y))
    folded(model, [draw((4, 6, 5)), draw((4, 6)) > 0])


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = randomized(
        keras.Sequential(
            [
                keras.Input((5,)),
                dense(4, name="first"),
                Stock(name="norm_1"),
                layers.ReLU(name="relu"),
                Stock(name="norm_2"),
            ],
            name="net",
        )
    )
    text = (
        "net: 1 of 2 batch normalizations folded\n"
        "normalization  folded into       left because\n"
        "norm_1         first, before it\n"
        "norm_2         -                 before it is relu (ReLU); its output is an output of the model"
    )
    assert str(fold_table(model)) == text
    fold(model)
    assert capsys.readouterr().out == text + "\n"
    fold(model, verbose=0)
    assert capsys.readouterr().out == ""


def test_a_model_without_norms(capsys: pytest.CaptureFixture[str]) -> None:
    model = randomized(keras.Sequential([keras.Input((5,)), dense(4)], name="net"))
    fold(model)
    assert capsys.readouterr().out == "net has no batch normalization to fold.\n"
