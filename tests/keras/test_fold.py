"""`fold`: every kind of layer, in both directions, gives the original's outputs without the normalization."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import BatchNormalization
from batchnorm.keras.fold import fold_table
from batchnorm.keras.norms import norms_within

from .foldable import assert_same, dense, draw, folded, functional, made, randomized, sequential

Stock = layers.BatchNormalization
FIRST = "channels_first"

LAYERS = {
    "dense": (layers.Dense, {"units": 4}, (5,)),
    "dense-sequence": (layers.Dense, {"units": 4}, (3, 5)),
    "conv1d": (layers.Conv1D, {"filters": 4, "kernel_size": 3, "strides": 2}, (9, 6)),
    "conv2d-dilated": (layers.Conv2D, {"filters": 4, "kernel_size": (3, 2), "dilation_rate": 2}, (7, 8, 6)),
    "conv2d-groups": (layers.Conv2D, {"filters": 6, "kernel_size": 3, "groups": 2}, (7, 8, 4)),
    "conv2d-1x1": (
        layers.Conv2D,
        {"filters": 4, "kernel_size": 1, "padding": "same", "strides": 2},
        (7, 8, 6),
    ),
    "conv3d": (layers.Conv3D, {"filters": 3, "kernel_size": 2}, (4, 5, 4, 2)),
    "depthwise1d": (layers.DepthwiseConv1D, {"kernel_size": 3, "depth_multiplier": 2}, (9, 3)),
    "depthwise2d": (layers.DepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 3}, (7, 8, 3)),
    "separable1d": (layers.SeparableConv1D, {"filters": 5, "kernel_size": 3, "depth_multiplier": 2}, (9, 3)),
    "separable2d": (layers.SeparableConv2D, {"filters": 5, "kernel_size": 3, "dilation_rate": 2}, (8, 8, 3)),
}
# With padding, and transposed: into the layer before only.
PADDED = {
    "conv1d-causal": (layers.Conv1D, {"filters": 4, "kernel_size": 3, "padding": "causal"}, (9, 6)),
    "conv2d-same": (layers.Conv2D, {"filters": 4, "kernel_size": 3, "padding": "same"}, (7, 8, 6)),
    "depthwise2d-same": (
        layers.DepthwiseConv2D,
        {"kernel_size": 3, "depth_multiplier": 2, "padding": "same", "strides": 2},
        (7, 8, 3),
    ),
    "conv1d-transposed": (layers.Conv1DTranspose, {"filters": 4, "kernel_size": 3, "strides": 2}, (6, 5)),
    "conv2d-transposed": (
        layers.Conv2DTranspose,
        {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"},
        (4, 5, 6),
    ),
    "conv3d-transposed": (layers.Conv3DTranspose, {"filters": 3, "kernel_size": 2}, (3, 3, 3, 2)),
}

# A bias is added by NumPy, whatever the backend; how kernels are laid out, is said by the other half.
EITHER = pytest.mark.parametrize(
    "use_bias", [pytest.param(True, marks=pytest.mark.one_backend), False], ids=["bias", "no-bias"]
)


@EITHER
@pytest.mark.parametrize("case", [*LAYERS, *PADDED])
def test_into_the_layer_before(case: str, use_bias: bool) -> None:
    kind, options, shape = {**LAYERS, **PADDED}[case]
    norm = Stock(name="norm") if use_bias else BatchNormalization(activation="silu", name="norm")
    model = sequential(made(kind, **options, use_bias=use_bias, name="layer"), norm, shape=shape)
    copy = folded(model, draw((4, *shape)))
    assert [layer.name for layer in copy.layers] == ["layer"]
    assert copy.layers[0].activation is (keras.activations.linear if use_bias else keras.activations.silu)
    (row,) = fold_table(model).rows
    assert (row.name, row.into, row.direction, row.reason) == ("norm", "layer", "before", "")


@EITHER
@pytest.mark.parametrize("case", LAYERS)
def test_into_the_layer_after(case: str, use_bias: bool) -> None:
    kind, options, shape = LAYERS[case]
    norm = (BatchNormalization if use_bias else Stock)(name="norm")
    last = made(kind, **options, use_bias=use_bias, activation="tanh", name="layer")
    model = sequential(layers.ReLU(), norm, last, shape=shape)
    copy = folded(model, draw((4, *shape)))
    assert copy.layers[-1].activation is keras.activations.tanh
    (row,) = fold_table(model).rows
    assert (row.name, row.into, row.direction, row.reason) == ("norm", "layer", "after", "")


@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [
        pytest.param(layers.Conv1D, {"filters": 4, "kernel_size": 3, "groups": 2}, (6, 9), id="conv1d"),
        pytest.param(layers.Conv2D, {"filters": 4, "kernel_size": 3}, (6, 7, 8), id="conv2d"),
        pytest.param(
            layers.DepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 2}, (3, 7, 8), id="depthwise"
        ),
    ],
)
def test_channels_first_in_both_directions(
    kind: Any, options: dict[str, Any], shape: tuple[int, ...], backend: str
) -> None:
    if backend == "tensorflow":
        pytest.skip("TensorFlow's convolutions take channels-first data on a GPU only")
    model = sequential(
        made(kind, **options, data_format=FIRST, activation="relu"),
        BatchNormalization(axis=1),
        made(kind, **options, data_format=FIRST),
        Stock(axis=1),
        shape=shape,
    )
    folded(model, draw((4, *shape)))
    assert [row.direction for row in fold_table(model).rows] == ["after", "before"]


@pytest.mark.parametrize("norm", [Stock, BatchNormalization], ids=["stock", "ours"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": False},
        {"center": False},
        {"scale": False, "center": False},
        {"epsilon": 0.3},
        {"renorm": True},
    ],
    ids=str,
)
def test_norms_without_scale_or_center_and_with_renorm(norm: Any, options: dict[str, Any]) -> None:
    model = sequential(dense(4), norm(**options), layers.ReLU(), norm(**options), dense(3))
    folded(model, draw((4, 5)))


def test_the_textbook_model_with_a_norm_after_the_activation() -> None:
    model = sequential(
        dense(64, activation="relu"),
        BatchNormalization(),
        layers.Dropout(0.3),
        dense(10, activation="softmax"),
        shape=(784,),
    )
    copy = folded(model, draw((4, 784)))
    assert [type(layer) for layer in copy.layers] == [layers.Dense, layers.Dropout, layers.Dense]
    assert copy.count_params() == 784 * 64 + 64 + 64 * 10 + 10


def test_several_norms_fold_into_one_layer() -> None:
    """Two in a row before it, two in a row after it; the activation of the last one moves into it."""
    model = sequential(
        layers.ReLU(),
        Stock(name="a"),
        BatchNormalization(name="b"),
        dense(4, name="dense"),
        BatchNormalization(name="c"),
        BatchNormalization(activation="tanh", name="d"),
    )
    folded(model, draw((4, 5)))
    assert [(row.name, row.into, row.direction) for row in fold_table(model).rows] == [
        ("a", "dense", "after"),
        ("b", "dense", "after"),
        ("c", "dense", "before"),
        ("d", "dense", "before"),
    ]


def test_a_second_activation_does_not_fold() -> None:
    model = sequential(dense(4), BatchNormalization(activation="tanh"), BatchNormalization(activation="relu"))
    folded(model, draw((4, 5)), left=1)


@pytest.mark.parametrize("direction", ["before", "after"])
def test_through_layers_that_do_nothing_at_inference(direction: str) -> None:
    between = [layers.SpatialDropout1D(0.5), layers.GaussianNoise(1.0), layers.Activation("linear")]
    last, norm = dense(4), BatchNormalization()
    stack = [last, *between, norm] if direction == "before" else [layers.ReLU(), norm, *between, last]
    model = sequential(*stack, shape=(3, 5))
    folded(model, draw((4, 3, 5)))
    assert fold_table(model).rows[0].direction == direction


def test_inputs_and_outputs_branches_and_residual_sums() -> None:
    left, right = keras.Input((5,), name="left"), keras.Input((3,), name="right")
    a = BatchNormalization(activation="relu", name="norm_a")(dense(4, name="dense_a")(left))
    b = Stock(name="norm_b")(dense(4, use_bias=False, name="dense_b")(right))
    total = layers.Add()([a, b]) * 0.5 + keras.ops.relu(a)
    c = Stock(name="norm_c")(total)
    model = functional(
        {"left": left, "right": right}, {"sum": total, "head": dense(2, name="head")(c), "aside": b}
    )
    copy = folded(model, {"left": draw((4, 5)), "right": draw((4, 3))})
    assert sorted(copy.output) == ["aside", "head", "sum"]
    assert [x.name for x in copy.inputs] == [x.name for x in model.inputs]
    assert [x.shape for x in copy.outputs] == [x.shape for x in model.outputs]
    into = {row.name: row.into for row in fold_table(model).rows}
    assert into == {"norm_a": "dense_a", "norm_b": "dense_b", "norm_c": "head"}


def block(name: str) -> Any:
    return keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            made(layers.Conv2D, 4, 3, padding="same", use_bias=False),
            BatchNormalization(activation="relu", name="norm"),
        ],
        name=name,
    )


def test_models_inside_models() -> None:
    inner_input = keras.Input((6, 6, 4))
    inner = keras.Model(inner_input, layers.Add()([block("c")(inner_input), inner_input]), name="inner")
    inputs = keras.Input((6, 6, 4))
    x = inner(block("b")(inputs))
    model = functional(inputs, layers.GlobalAveragePooling2D()(x))
    copy = folded(model, draw((4, 6, 6, 4)))
    assert [row.name for row in fold_table(model).rows] == ["b/norm", "inner/c/norm"]
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    outer = sequential(model, Stock(name="last"), dense(2, name="head"), shape=(6, 6, 4))
    folded(outer, draw((4, 6, 6, 4)))


def test_from_one_nested_model_into_another() -> None:
    """A norm alone in its model leaves a model that hands on its input."""
    inputs = keras.Input((4,), name="nested_input")
    alone = keras.Model(inputs, Stock(name="norm")(inputs), name="alone")
    model = sequential(
        keras.Sequential([keras.Input((5,)), dense(4)], name="before"),
        alone,
        keras.Sequential([keras.Input((4,)), Stock(name="norm")], name="alone_too"),
        layers.ReLU(),
        keras.Sequential([keras.Input((4,)), Stock(name="norm")], name="alone_three"),
        keras.Sequential([keras.Input((4,)), dense(4, name="dense")], name="after"),
    )
    copy = folded(model, draw((4, 5)))
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    assert [row.into for row in fold_table(model).rows][-1] == "after/dense"


def test_nested_models_with_inputs_by_name_and_in_lists() -> None:
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    by_name = keras.Model({"a": a, "b": b}, [Stock()(dense(3)(a)), dense(3)(b)], name="by_name")
    c, d = keras.Input((3,), name="c"), keras.Input((3,), name="d")
    listed = keras.Model([d, c], layers.Subtract()([Stock(name="of_d")(d), c]), name="listed")
    x, y = keras.Input((3,), name="x"), keras.Input((4,), name="y")
    first, second = by_name({"b": y, "a": x})
    model = functional([x, y], [listed([second, first]), keras.ops.relu(first)])
    folded(model, [draw((4, 3)), draw((4, 4))])
    by_dict = functional([x, y], listed({"c": first, "d": second}))
    folded(by_dict, [draw((4, 3)), draw((4, 4))])


def test_mixed_precision() -> None:
    """Weights stay float32, outputs are of the 16-bit dtype, so they differ by its rounding: eps is 1e-3."""
    model = randomized(
        keras.Sequential(
            [
                keras.Input((8, 3)),
                dense(6, dtype="mixed_float16"),
                BatchNormalization(activation="relu", dtype="mixed_float16"),
                dense(5, activation="relu", dtype="mixed_float16"),
                Stock(dtype="mixed_float16"),
                dense(4, dtype="mixed_float16"),
                layers.GlobalAveragePooling1D(dtype="float32"),
            ]
        )
    )
    copy = folded(model, draw((4, 8, 3)), tolerance=2e-2)
    assert {weight.dtype for weight in copy.weights} == {"float32"}
    assert copy.layers[0].compute_dtype == "float16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits(dtype: str) -> None:
    model = randomized(
        keras.Sequential([keras.Input((5,)), dense(4, dtype=dtype), BatchNormalization(dtype=dtype)])
    )
    copy = folded(model, draw((4, 5)), tolerance=2e-2 if dtype == "float16" else 1e-1)
    assert {weight.dtype for weight in copy.weights} == {dtype}


def test_the_copy_saves_and_loads(tmp_path: Any) -> None:
    x = keras.Input((None, None, 4))
    y = BatchNormalization(activation="silu")(made(layers.Conv2D, 4, 3, use_bias=False)(x))
    y = keras.Sequential(
        [keras.Input((None, None, 4)), Stock(name="n"), made(layers.Conv2D, 3, 1)], name="nested"
    )(y)
    model = functional(x, [y, layers.GlobalMaxPooling2D()(y)])
    copy = folded(model, draw((4, 6, 6, 4)))
    copy.save(tmp_path / "copy.keras")
    loaded = keras.models.load_model(tmp_path / "copy.keras")
    assert not list(norms_within(loaded))
    for old, new in zip(copy.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(v.value) for v in (old, new)))
    assert_same(model, loaded, draw((4, 6, 6, 4)))
