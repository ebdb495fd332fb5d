"""A copy of a Keras model for inference, its batch normalizations folded into the layers next to them."""

from __future__ import annotations

from typing import Literal

import keras

from batchnorm.errors import OptionError
from batchnorm.folding.table import FoldTable

from .folding.graph import check_model
from .folding.plan import plan
from .folding.rebuild import rebuild
from .folding.verify import assert_agree

Verbose = Literal["auto", 0, 1]


def fold(model: keras.Model, example: object = None, *, verbose: Verbose = "auto") -> keras.Model:
    """Return a copy of `model` for inference, its batch normalizations folded into the layers next to them.

    A normalization at inference is y = s x + t per channel, s = gamma / sqrt(moving_variance + epsilon) and
    t = beta - s moving_mean. It goes into the layer before it, or else into the one after it:

        before:  s (W x + b) + t = (s W) x + (s b + t)
        after:   W (s x + t) + b = (W s) x + (b + W t)

    The layer before may be Dense, Conv1D to 3D with groups, Conv1DTranspose to 3D, DepthwiseConv1D and 2D,
    SeparableConv1D and 2D, without an activation of its own; the `activation` of our layer moves into it. The
    layer after may be one of these but the transposed ones, if it does not pad. Dropout and other layers that
    do nothing at inference may stand between. Nothing else may read what changes. A normalization
    that does not fold is left in the copy as it is, and the table says why: `fold_table(model)` gives it
    without folding.

    The arithmetic is float64, rounded once to each weight's dtype. Before it returns, `fold` compares the
    outputs of the two models.

    Args:
        model: Sequential or functional, with any number of inputs and outputs, and models inside. It is left
            as it is: weights, layers, names, compilation.
        example: an input batch to compare on, as the model takes it; None = random values of the shapes that
            the model states, 32 where it leaves a size open. A real batch is the better proof.
        verbose: "auto" or 1 = print the table, 0 = nothing.

    Returns:
        The copy: layers keep their names, and inputs and outputs their structure; a layer that takes a
        normalization has a bias. It is not compiled; it saves and loads as any Keras model.

    Raises:
        OptionError: (a ValueError) a subclassed model, which has no graph; one that was never built; a layer
            that cannot be copied by its config; no example can be made, or the model fails on it.
        DataError: (a ValueError) a normalization whose weights give NaN or inf.
        FoldError: (an ArithmeticError) the outputs of the two models differ by more than rounding.

    Differs from Keras: it has no such function.

    Source: Jacob et al. 2018, arXiv:1712.05877, sec. 3.2.
    """
    if verbose not in ("auto", 0, 1):
        raise OptionError(f'verbose is "auto", 0 or 1; got {verbose!r}')
    check_model(model, "fold")
    decided = plan(model)
    copy = rebuild(model, decided)
    layers = [call.module for call in decided.graph.calls if isinstance(call.module, keras.layers.Layer)]
    # A quantized layer rounds its inputs to 8 bits or fewer, which is bfloat16's coarseness.
    dtypes = {"bfloat16" if layer.quantization_mode else layer.compute_dtype for layer in layers}
    assert_agree(model, copy, example, dtypes)
    if verbose:
        print(decided.table)
    return copy


def fold_table(model: keras.Model) -> FoldTable:
    """Return what `fold` would do with each batch normalization of `model`, and why not; nothing is copied.

    Args:
        model: Sequential or functional, as for `fold`.

    Returns:
        A table with `rows`, one per normalization: name, the layer it goes into, whether that is the one
        before or after it, or the reason why it is left. `print` shows it.

    Raises:
        OptionError: (a ValueError) as `fold`, for a model without a graph.
    """
    check_model(model, "fold_table")
    return plan(model).table
