"""The copy that `fold` makes: faithful, apart from the original, and compared with it first."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from batchnorm.errors import DataError, OptionError
from batchnorm.keras import BatchNormalization
from batchnorm.keras.fold import fold, fold_table
from batchnorm.keras.folding.verify import FoldError, example_for, products_dtype
from batchnorm.keras.norms import norms_within

from .foldable import assert_same, dense, draw, folded, functional, made, randomized, sequential

Stock = layers.BatchNormalization


def state(model: Any) -> str:
    """All that can be seen of a model."""
    weights = [[v.path, v.trainable, ops.convert_to_numpy(v.value).tolist()] for v in model.variables]
    nodes = [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    return json.dumps([weights, nodes, model.get_config()], default=str)


def test_the_original_is_left_as_it_is() -> None:
    inner = keras.Sequential([keras.Input((6, 4)), made(layers.Conv1D, 4, 3), Stock()], name="inner")
    x = keras.Input((6, 4), name="x")
    model = functional(x, dense(3)(BatchNormalization()(layers.Flatten()(ops.relu(inner(x))))))
    model.compile("sgd", loss=lambda y, z: ops.mean((y - z) ** 2))
    optimizer, before = model.optimizer, state(model)
    copy = folded(model, draw((4, 6, 4)))
    assert state(model) == before
    assert model.compiled
    assert model.optimizer is optimizer
    assert not copy.compiled
    assert copy.name == model.name
    assert not {id(v) for v in model.variables} & {id(v) for v in copy.variables}
    assert not {id(layer) for layer in model._flatten_layers()} & {
        id(layer) for layer in copy._flatten_layers()
    }
    model.fit(draw((8, 6, 4)), draw((8, 3)), verbose=0)


def test_original_and_copy_run_apart() -> None:
    """JAX takes the arrays of the model that runs: a copy that had them too would lose them, or be lost."""
    x = keras.Input((6, 4))
    y = dense(5, activation=layers.PReLU())(BatchNormalization()(ops.relu(dense(4, lora_rank=2)(x))))
    model = functional(x, layers.GRU(2)(Stock()(layers.ReLU()(y))))
    model.compile("sgd", "mse")
    data = draw((4, 6, 4))
    copy = folded(model, data, left=1)
    expected = model.predict(data, verbose=0)
    for _ in range(2):
        for each in (copy, model):
            np.testing.assert_allclose(each.predict(data, verbose=0), expected, rtol=1e-4, atol=1e-5)
    before = state(copy)
    model.fit(data, draw((4, 2)), verbose=0)
    assert state(copy) == before


def test_a_stateful_layer_keeps_its_state() -> None:
    inputs = keras.Input(batch_shape=(4, 3, 5))
    model = functional(inputs, layers.GRU(2, stateful=True)(Stock()(dense(5)(inputs))))
    before = state(model)
    fold(model, verbose=0)
    assert state(model) == before


def test_what_does_not_fold_is_copied_with_all_its_state() -> None:
    normalization = layers.Normalization()
    normalization.adapt(draw((50, 5)) * 3 + 2)
    x, words = keras.Input((5,)), keras.Input((4,), dtype="int32")
    y = layers.Lambda(lambda v: ops.square(v), name="own")(normalization(x))
    y = layers.RandomRotation(0.2)(layers.Reshape((5, 1, 1))(y))
    y = dense(4, lora_rank=2)(layers.Flatten()(y))
    z = layers.LSTM(3)(layers.Embedding(9, 4, mask_zero=True)(words))
    model = keras.Model([x, words], layers.Concatenate()([Stock()(y), z]))
    for name, norm in norms_within(model):
        assert name
        randomized(norm)
    for layer in model.layers:
        if isinstance(layer, (layers.LSTM, layers.Embedding, layers.Dense)):
            randomized(layer)
    folded(model, [draw((4, 5)), np.array([[1, 8, 0, 0]] * 4, dtype="int32")], left=1)


def test_a_vocabulary_is_copied(backend: str) -> None:
    if backend != "tensorflow":
        pytest.skip("Keras's lookup layers are in the graph on the TensorFlow backend only")
    lookup = layers.StringLookup()
    lookup.adapt(np.array(["a", "b", "c"]))
    words = keras.Input((4,), dtype="string")
    model = functional(words, Stock()(dense(3)(layers.Embedding(9, 4)(lookup(words)))))
    with pytest.raises(OptionError, match="takes strings, of which fold makes no example: pass example="):
        fold(model, verbose=0)
    x = ops.convert_to_tensor([["a", "c", "x", "b"]] * 4)
    assert_same(model, fold(model, x, verbose=0), x)


def test_shared_layers_stay_shared() -> None:
    x = keras.Input((5,))
    shared = dense(5, name="shared")
    inner = keras.Model(inner_x := keras.Input((5,)), shared(layers.ReLU()(inner_x)), name="inner")
    model = functional(x, [Stock()(dense(5)(inner(shared(x)))), inner(x)])
    copy = folded(model, draw((4, 5)))
    assert copy.get_layer("inner").get_layer("shared") is copy.get_layer("shared")
    assert copy.count_params() == 60  # of two Dense


class Functional(keras.Model):
    """A model of a class of its own that is functional all the same."""

    def __init__(self, units: int) -> None:
        x = keras.Input((5,))
        super().__init__(x, BatchNormalization()(dense(units)(x)))


class Subclassed(keras.Model):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.dense, self.norm = dense(4, name="dense"), Stock(name="norm")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.norm(self.dense(inputs), training=training)


def test_a_functional_model_of_its_own_class() -> None:
    folded(randomized(Functional(4)), draw((4, 5)))


def test_a_model_without_a_graph_is_an_error() -> None:
    model = Subclassed(name="net")
    model(draw((4, 5)))
    for verb in (fold, fold_table):
        with pytest.raises(
            OptionError, match=r"net \(Subclassed\): .*Build it as keras.Model\(inputs, outputs\)"
        ):
            verb(model)


class Doubled(Functional):
    """Functional by its constructor, but not what it computes."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        return 2 * super().call(inputs, training=training, mask=mask)


def test_a_functional_model_with_a_call_of_its_own_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"\(Doubled\): .*call\(\) of its own"):
        fold(Doubled(4))


def test_a_model_without_a_graph_inside_one_with_is_left() -> None:
    model = sequential(Subclassed(name="net"), Stock(name="last"), dense(3))
    folded(model, draw((4, 5)), left=1)
    assert [(row.name, row.into is None) for row in fold_table(model).rows] == [
        ("net/norm", True),
        ("last", False),
    ]


def test_a_model_that_was_never_built_is_an_error() -> None:
    model = keras.Sequential([layers.Dense(4), Stock()], name="net")
    with pytest.raises(OptionError, match=r"never built: call model.build\(input_shape\)"):
        fold(model)
    model.build((None, 5))
    folded(randomized(model), draw((4, 5)))


@pytest.mark.parametrize("thing", [layers.Dense(3), "model"], ids=["layer", "string"])
def test_what_is_no_model_is_an_error(thing: Any) -> None:
    with pytest.raises(
        OptionError, match=f"takes a Sequential or functional keras.Model; got a {type(thing).__name__}"
    ):
        fold(thing)


def test_verbose_out_of_range_is_an_error() -> None:
    with pytest.raises(OptionError, match='verbose is "auto", 0 or 1; got 2'):
        fold(sequential(dense(3)), verbose=2)  # type: ignore[arg-type]


class NoConfig(layers.Layer):
    def __init__(self, factor: Any) -> None:
        super().__init__(name="no_config")
        self.factor = factor

    def call(self, inputs: Any) -> Any:
        return inputs * self.factor["value"]

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("no config")


class Forgetful(layers.Layer):
    """Its config is not all of it."""

    def __init__(self, factor: float = 1.0, size: int = 1, **options: Any) -> None:
        super().__init__(**options)
        self.factor, self.size = factor, size

    def build(self, _: Any) -> None:
        self.weight = self.add_weight(shape=(self.size,), initializer="ones")

    def call(self, inputs: Any) -> Any:
        return inputs * self.factor * ops.mean(self.weight)

    def get_config(self) -> dict[str, Any]:
        return layers.Layer.get_config(self)


def test_a_layer_that_cannot_be_copied_is_an_error() -> None:
    model = sequential(dense(4), Stock(), NoConfig({"value": 2.0}))
    with pytest.raises(
        OptionError, match=r"no_config \(NoConfig\): fold copies a layer by its config.*get_config"
    ):
        fold(model)
    model = sequential(dense(4), Stock(), Forgetful(size=3, name="forgetful"))
    with pytest.raises(
        OptionError, match=r"forgetful \(Forgetful\): .*other weights: \[\(1,\)\] instead of \[\(3,\)\]"
    ):
        fold(model)


@pytest.mark.parametrize("factor", [1.001, -1.0, float("nan"), float("inf")])
def test_a_copy_that_differs_is_not_returned(factor: float, capsys: pytest.CaptureFixture[str]) -> None:
    x = keras.Input((5,))
    y = Stock()(dense(4)(x))
    model = functional(x, {"right": y, "wrong": Forgetful(factor)(y)})
    with pytest.raises(FoldError, match="output wrong") as error:
        fold(model)
    assert isinstance(error.value, ArithmeticError)
    assert capsys.readouterr().out == ""
    if factor == 1.001:
        assert "off by" in str(error.value)


class Unset(Forgetful):
    """Its copy computes NaN."""

    def __init__(self, factor: float = float("nan"), **options: Any) -> None:
        super().__init__(factor, **options)


def test_a_copy_that_gives_nan_is_not_returned() -> None:
    with pytest.raises(FoldError, match="off by nan"):
        fold(sequential(dense(4), Stock(), Unset(2.0)))


def test_the_error_says_by_how_much() -> None:
    model = sequential(Stock(), dense(1, activation="tanh"), Forgetful(3.0), Forgetful(1e3))
    model.layers[1].kernel.assign(100 * np.ones((5, 1)))
    wanted = r"the output of the folded model is off by [\d.]+e\+03 where .* is [\d.]+e\+03; at most"
    with pytest.raises(FoldError, match=wanted):
        fold(model)


@pytest.mark.parametrize("weight", ["moving_variance", "gamma", "moving_mean", "beta"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_that_gives_no_numbers_is_an_error(weight: str, value: float) -> None:
    if (weight, value) == ("moving_variance", np.inf):
        value = -1.0
    model = sequential(dense(4), Stock(name="norm"))
    getattr(model.layers[1], weight).assign([1.0, value, 1.0, 1.0])
    with pytest.raises(
        DataError, match=r"norm \(BatchNormalization\): its weights or moving statistics give NaN or inf"
    ):
        fold(model)


def test_an_empty_example_proves_nothing() -> None:
    with pytest.raises(OptionError, match=r"the output has shape \(0, 4\), so nothing can be compared"):
        fold(sequential(dense(4), Stock()), draw((0, 5)))


def test_nan_is_no_agreement() -> None:
    """In a norm that is left, NaN comes out of both models."""
    model = sequential(dense(4), Stock(), layers.ReLU(), Stock())
    model.layers[3].moving_variance.assign([1.0, np.nan, 1.0, 1.0])
    with pytest.raises(FoldError, match="the output of the original has NaN"):
        fold(model)


def test_infinity_in_the_same_places_agrees() -> None:
    """A mask of -inf on logits, for one."""
    x = keras.Input((5,))
    y = Stock()(dense(4)(x))
    mask = np.array([[0.0, -np.inf, 0.0, 0.0]], dtype="float32")
    model = functional(x, layers.Lambda(lambda v: v + ops.convert_to_tensor(mask), output_shape=(4,))(y))
    assert not list(norms_within(fold(model, verbose=0)))


def test_the_example_that_is_made() -> None:
    a, b = keras.Input((None, 3), name="a"), keras.Input((2,), dtype="int64", name="b")
    c = keras.Input(batch_shape=(7, 4), dtype="bool", name="c")
    example = example_for(keras.Model({"a": a, "b": b, "c": c}, [a, b, c]))
    assert {name: (value.shape, value.dtype.name) for name, value in example.items()} == {
        "a": ((4, 32, 3), "float32"),
        "b": ((4, 2), "int64"),
        "c": ((7, 4), "bool"),
    }
    assert set(example["b"].flat) == {0, 1}
    assert abs(example["a"].std() - 1) < 0.1
    assert example_for(sequential(dense(3), shape=(8,))).shape == (4, 8)


def test_a_model_that_fails_on_the_made_example() -> None:
    def picky(value: Any) -> Any:
        if value.shape[1] is not None and value.shape[1] != 8:
            raise ValueError("only 8")
        return value

    inputs = keras.Input((None, 3))
    model = functional(inputs, Stock()(dense(4)(layers.Lambda(picky, output_shape=(None, 3))(inputs))))
    wanted = r"(?s)\(None, None, 3\)\); it fails there: .*only 8.*Pass example="
    with pytest.raises(OptionError, match=wanted):
        fold(model, verbose=0)
    assert_same(model, fold(model, draw((2, 8, 3)), verbose=0), draw((2, 8, 3)))
    with pytest.raises(ValueError, match="only 8") as error:
        fold(model, draw((2, 9, 3)), verbose=0)
    assert not isinstance(error.value, OptionError)  # the example is the caller's: so is its error


def test_the_comparison_runs_on_the_given_example() -> None:
    """ReLU hides an error on inputs that it turns to 0."""
    inputs = keras.Input((2,))
    y = Stock()(dense(2)(inputs))
    model = functional(inputs, ops.relu(inputs - 10.0) + 0.0 * y[:, :2])
    wrong = functional(inputs, Forgetful(1.5)(ops.relu(inputs - 10.0)) + 0.0 * y[:, :2] + 1.0)
    fold(model, draw((4, 2)) + 20, verbose=0)
    fold(wrong, verbose=0)
    with pytest.raises(FoldError, match="off by"):
        fold(wrong, draw((4, 2)) + 20, verbose=0)


def test_optional_and_named_inputs_stay() -> None:
    first, second = keras.Input((5,), name="first"), keras.Input((5,), optional=True)
    total = layers.Lambda(lambda pair: pair[0] if pair[1] is None else pair[0] + pair[1])([first, second])
    model = functional([first, second], Stock()(dense(4)(total)))
    copy = fold(model, verbose=0)
    kept = [layer for layer in copy.layers if isinstance(layer, layers.InputLayer)]
    assert [(layer.name, layer.optional) for layer in kept] == [
        (layer.name, layer.optional) for layer in model.layers if isinstance(layer, layers.InputLayer)
    ]


def test_products_are_of_full_precision_on_this_cpu() -> None:
    assert products_dtype() == "float32"
