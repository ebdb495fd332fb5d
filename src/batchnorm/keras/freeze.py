"""Freezes the batch normalizations of a model: they keep their statistics in training."""

from __future__ import annotations

from typing import TypeVar

import keras

from batchnorm.errors import OptionError

from .layers import BatchNormalization
from .norms import Norm, norms_within

Model = TypeVar("Model", bound=keras.layers.Layer)


def freeze(model: Model) -> Model:
    """Freeze every batch normalization of `model`: in training too, it uses and keeps its moving statistics.

        y = gamma * (x - moving_mean) / sqrt(moving_variance + epsilon) + beta,    gamma and beta constant

    In place, at any nesting, subclassed models and wrapped layers included; all other layers learn as before.
    A layer of this library is `frozen` until `unfreeze`, whatever `trainable` is set to, and is saved so. A
    stock layer gets Keras's own `trainable = False`, which a later `model.trainable = True` silently undoes:
    freeze again after it, or use `batchnorm.keras.BatchNormalization`.

    A frozen layer does in training what it does in inference: with `statistics=Adapted(...)` it goes on
    mixing its moving statistics with the batch's.

    Call `compile()` again after it: Keras fixes what is trained when a model is compiled.

    Args:
        model: a Keras model or layer whose layers exist: a subclassed one may have to be called once before.

    Returns:
        `model` itself.

    Raises:
        OptionError: (a ValueError) `model` is not of Keras, or has no batch normalization.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), batchnorm.keras.BatchNormalization()])
        >>> model = batchnorm.keras.freeze(model)
        >>> model.trainable = True
        >>> model.layers[0].trainable
        False

    Differs from Keras: `layer.trainable = False` on each normalization is lost at `model.trainable = True`.
    """
    for layer in _norms(model, "freeze"):
        if isinstance(layer, BatchNormalization):
            layer.frozen = True
        else:
            layer.trainable = False
    return model


def unfreeze(model: Model) -> Model:
    """Undo `freeze`: every batch normalization learns, and moves its statistics in training, again.

    In place. `trainable` becomes True on every stock layer, because Keras does not record why it was False,
    and on those of this library that were frozen; a layer with `statistics=Running()` keeps its moving
    statistics, as it did before. Call `compile()` again after it.

    Args:
        model: a Keras model or layer.

    Returns:
        `model` itself.

    Raises:
        OptionError: (a ValueError) `model` is not of Keras, or has no batch normalization.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> batchnorm.keras.unfreeze(batchnorm.keras.freeze(model)).layers[0].trainable
        True
    """
    for layer in _norms(model, "unfreeze"):
        if not isinstance(layer, BatchNormalization):
            layer.trainable = True
        elif layer.frozen:
            layer.frozen = False
    return model


def _norms(model: object, verb: str) -> list[Norm]:
    if not isinstance(model, keras.layers.Layer):
        raise OptionError(f"{verb} takes a Keras model or layer; got a {type(model).__name__}")
    found = [norm for _, norm in norms_within(model)]
    if not found:
        raise OptionError(
            f"{model.name} ({type(model).__name__}) has no batch normalization to {verb}; a model that makes "
            "its layers when it is first called must be called once before"
        )
    return found
