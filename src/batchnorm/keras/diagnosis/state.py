"""Reads the state of a Keras model and of its batch normalizations, as the checks of the doctor take it."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from batchnorm.conventions import opposite_momentum
from batchnorm.doctor.records import DecayedGroup, ModelState, NormState, Place
from batchnorm.keras.folding.graph import Call, graph, has_graph
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.norms import Norm, Norms, is_frozen, measures, norms_within

_DROPOUTS = (
    keras.layers.Dropout,
    keras.layers.AlphaDropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
)


def model_state(
    model: keras.Model, optimizer: keras.optimizers.Optimizer | None
) -> tuple[ModelState, tuple[str, ...]]:
    """Return what the checks without data look at, and what could not be looked at."""
    norms = list(norms_within(model))
    places: dict[str, Place] = {}
    unchecked: tuple[str, ...] = ()
    if has_graph(model):
        places = _places(model, norms)
    elif norms:
        unchecked = ("what surrounds the norms: the model is a subclass, whose graph cannot be read",)
    return ModelState(
        name=type(model).__name__,
        framework="keras",
        norms=tuple(_norm_state(name, norm) for name, norm in norms),
        learns=bool(model.trainable_variables),
        places=places,
        decayed=() if optimizer is None else _decayed(norms, optimizer),
    ), unchecked


def _norm_state(name: str, norm: Norm) -> NormState:
    if not norm.built:
        return NormState(name, type(norm).__name__, unreadable="not built: it has seen no input")
    momentum, batches = float(norm.momentum), getattr(norm, "batches", None)
    return NormState(
        name=name,
        kind=type(norm).__name__,
        is_stock=not isinstance(norm, BatchNormalization),
        moves=not is_frozen(norm) and momentum < 1,
        momentum=opposite_momentum(momentum),
        warm_start=getattr(norm, "warm_start", False) is True,
        eps=float(norm.epsilon),
        mean=array(norm.moving_mean),
        var=array(norm.moving_variance),
        batches=None if batches is None else int(array(batches)[0]),
        dtype=keras.backend.standardize_dtype(norm.moving_variance.dtype),
        weight=array(norm.gamma) if norm.scale else None,
        bias=array(norm.beta) if norm.center else None,
        learns=bool(norm.trainable_variables),
        is_synchronized=bool(getattr(norm, "synchronized", False)),
        places=(name,),
        adapts=measures(norm, training=False),
    )


def array(variable: keras.Variable) -> NDArray[np.float64]:
    """Return a copy of a variable's values as one row."""
    found: NDArray[np.float64] = ops.convert_to_numpy(variable.value).astype(np.float64).reshape(-1)
    return found


def _places(model: keras.Model, norms: Norms) -> dict[str, Place]:
    calls = graph(model).by_module()
    return {name: _place(calls[norm], calls) for name, norm in norms if calls[norm]}


def _place(calls: list[Call], by_module: dict[keras.Operation, list[Call]]) -> Place:
    value = calls[0].reads[0] if calls[0].reads else None
    maker = None if value is None else value.maker
    if maker is None or value is None:
        return Place(len(calls))
    layer = maker.module
    if isinstance(layer, _DROPOUTS):
        return Place(len(calls), dropout=f"{maker.what} ({type(layer).__name__})", rate=float(layer.rate))
    is_alone = len(calls) == 1 and len(value.readers) == 1 and len(by_module[layer]) == 1
    # An activation of its own stands between the bias and the norm.
    is_linear = getattr(layer, "activation", None) in (None, keras.activations.linear)
    has_bias = getattr(layer, "use_bias", False) and getattr(layer, "bias", None) is not None
    return Place(len(calls), (maker.what,) if is_alone and is_linear and has_bias else ())


def _decayed(norms: Norms, optimizer: keras.optimizers.Optimizer) -> tuple[DecayedGroup, ...]:
    decay = float(getattr(optimizer, "weight_decay", 0.0) or 0.0)
    if not decay:
        return ()
    decays = optimizer._use_weight_decay  # private, and the only place that knows what was excluded
    held = [name for name, norm in norms if any(map(decays, norm.trainable_variables))]
    return (DecayedGroup(decay, 0.0, tuple(held)),) if held else ()
