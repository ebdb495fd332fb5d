"""`merge_statistics` for Keras: the moving statistics of the data of several models or clients together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from batchnorm.errors import ArgumentTypeError, DataError, OptionError
from batchnorm.statistics.calibration import Accumulator, Count, count_of
from batchnorm.statistics.moments import PooledMoments

from .calibrate import write_all
from .norms import Norm, norms_within

# What `model.get_weights()` returns, or a file of `model.save_weights`.
State = Sequence[NDArray[Any]] | str | Path


def merge_statistics(model: keras.Model, states: Iterable[State], counts: Iterable[Count]) -> keras.Model:
    """Set the moving statistics of `model` to those of the data of several models together.

        n = Σ n_k        moving_mean = Σ n_k mean_k / n
        moving_variance = Σ n_k (var_k + (mean_k - moving_mean)²) / n

    where state k has mean_k, and the biased var_k, of n_k values per channel. That is exact: where each state
    has the statistics of all of its data, as after `calibrate`, the result has those of the pooled data.

    Args:
        model: a built model of the same layers as those that the states are of.
        states: what `get_weights()` of each model returned, or files of its `save_weights`
            (`.weights.h5`).
        counts: n_k of each state, values per channel: a number for all layers, a dict by the layer's name, or
            the report of `calibrate`. 0 = without data: the state's statistics are not looked at.

    Returns:
        `model` itself. If it raises, nothing has changed.

    Raises:
        OptionError: (a ValueError) no built Keras model; a count that is missing, negative or not finite; not
            a count per state.
        DataError: (a ValueError) no batch normalization, no state, a state that is not of this model's
            weights, statistics that are not finite, or no value in all.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), batchnorm.keras.BatchNormalization()])
        >>> clients = [keras.models.clone_model(model).get_weights() for _ in range(2)]
        >>> model = batchnorm.keras.merge_statistics(model, clients, counts=[900, 100])

    Differs from torch: there the merged state is returned, as a state has names; the weights of Keras have
    an order, which is the model's.

    Source: Chan, Golub & LeVeque, The American Statistician 37 (1983), equation 2.1.
    """
    if not isinstance(model, keras.layers.Layer) or not model.built:
        raise OptionError(f"merge_statistics takes a built Keras model; got {model!r}")
    norms = list(norms_within(model))
    if not norms:
        raise DataError(f"{model.name} ({type(model).__name__}) has no batch normalization")
    if isinstance(states, str | Path | keras.layers.Layer):
        raise ArgumentTypeError(
            f"states must be a list of weights or files; got one {type(states).__name__}: put it in a list"
        )
    read = [(f"states[{k}]", _weights(model, state, f"states[{k}]")) for k, state in enumerate(states)]
    given = list(counts)
    if len(read) != len(given) or not read:
        raise OptionError(f"counts must have one entry per state: got {len(given)} for {len(read)} states")
    places = {id(variable): place for place, variable in enumerate(model.weights)}
    merged = Accumulator()
    for (label, weights), count in zip(read, given, strict=True):
        for number, (name, norm) in enumerate(norms):  # names may repeat
            if values := count_of(count, name, name, label):
                mean, var = (
                    np.asarray(weights[places[id(variable)]], dtype=np.float64)
                    for variable in (norm.moving_mean, norm.moving_variance)
                )
                merged.add(str(number), _moments(mean, var, values, f"{label}, {name}"))
    found = [merged.moments.get(str(number)) for number in range(len(norms))]
    changes = (_changes(name, norm, of) for (name, norm), of in zip(norms, found, strict=True))
    write_all([change for of_norm in changes for change in of_norm])
    return model


def _weights(model: keras.Model, state: State, label: str) -> Sequence[NDArray[Any]]:
    """Return a state as arrays in the order of the model's weights; a file's pass through the model."""
    if isinstance(state, str | Path):
        before = model.get_weights()
        try:
            model.load_weights(state)
            found: Sequence[NDArray[Any]] = model.get_weights()
        except Exception as error:
            raise DataError(f"{label}, {state}, does not load into {model.name}: {error}") from error
        finally:
            model.set_weights(before)
        return found
    if isinstance(state, keras.layers.Layer):
        raise ArgumentTypeError(f"{label} is a model: pass its get_weights()")
    wanted = [tuple(variable.shape) for variable in model.weights]
    got = [np.shape(value) for value in state]
    if got != wanted:
        raise DataError(
            f"{label} has {len(got)} arrays, which are not the {len(wanted)} weights of {model.name}: "
            "pass what get_weights() of such a model returned"
        )
    return state


def _moments(mean: NDArray[Any], var: NDArray[Any], count: float, label: str) -> PooledMoments:
    """Return the moments that a state's statistics of `count` values stand for."""
    if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
        raise DataError(
            f"{label} has NaN, inf or a negative variance in its moving statistics: leave the state out "
            "(count 0), or calibrate its model"
        )
    return PooledMoments(count, mean, var * count)


def _changes(
    name: str, norm: Norm, found: PooledMoments | None
) -> list[tuple[keras.Variable, NDArray[np.float64]]]:
    """Return the variables of a normalization, each with its new value."""
    if found is None:
        raise DataError("0 values per channel in all states", name)
    var = found.m2 / found.count
    changes = [(norm.moving_mean, found.mean), (norm.moving_variance, var)]
    return [*changes, (norm.moving_stddev, np.sqrt(var + norm.epsilon))] if norm.renorm else changes
