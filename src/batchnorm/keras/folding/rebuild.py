"""A copy of a Keras model without the normalizations that fold; their maps are in the layers next to them."""

from __future__ import annotations

import tempfile
from typing import Any

import keras
import numpy as np

from batchnorm.errors import DataError, OptionError

from .arithmetic import KINDS, Weights, affine, read_weights
from .graph import has_graph, input_layer, untrained
from .plan import Plan, Step


def rebuild(model: Any, plan: Plan) -> Any:
    """Return the copy: new layers and new weights under the old names, not compiled.

    Raises:
        OptionError: a layer cannot be copied.
        DataError: a normalization that folds has weights that give NaN or inf.
    """
    weights = _folded_weights(plan.steps)
    copier = _Copier(plan.steps)
    copy = copier.copy(model)
    for original, layer in copier.copies.values():
        if id(original) in weights:
            _write(layer, weights[id(original)])
            _copy_other_weights(original, layer)
        elif isinstance(layer, keras.layers.Layer) and not has_graph(layer):
            _copy_state(original, layer)
    return copy


class _Copier:
    """Copies layers and models, each once, so that what is shared stays shared."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.gone = {id(step.norm) for step in steps}
        self.takers = {id(step.layer) for step in steps}
        self.activations = {
            id(step.layer): step.norm.get_config()["activation"]
            for step in steps
            if getattr(step.norm, "activation", keras.activations.linear) is not keras.activations.linear
        }
        self.copies: dict[int, tuple[Any, Any]] = {}  # id -> (original, copy)

    def copy(self, layer: Any) -> Any:
        """Return the copy of a layer, a nested model or an operation; a normalization that goes, as it is."""
        if id(layer) in self.gone:
            return layer
        if id(layer) not in self.copies:
            if not has_graph(layer):
                made = self._layer(layer)
            elif isinstance(layer, keras.Sequential):
                made = self._sequential(layer)
            else:
                made = self._functional(layer)
            self.copies[id(layer)] = (layer, made)
        return self.copies[id(layer)][1]

    def _sequential(self, model: Any) -> Any:
        layers = [self.copy(layer) for layer in model.layers if id(layer) not in self.gone]
        # Keras builds no Sequential without a layer.
        layers = layers or [keras.layers.Identity(name=model.layers[-1].name)]
        return keras.Sequential([_input_like(model.inputs[0]), *layers], name=model.name)

    def _functional(self, model: Any) -> Any:
        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if id(layer) in self.gone:
                return args[0] if args else kwargs["inputs"]
            return layer(*args, **kwargs)

        # clone_model copies the compilation too, and fails where a loss cannot be serialized: `untrained`.
        # It also forgets an input's name, and that it is optional, and copies nested models without `call`.
        return keras.models.clone_model(
            untrained(model),
            input_tensors=keras.tree.map_structure(_input_like, model.input),
            clone_function=self.copy,
            call_function=call,
        )

    def _layer(self, layer: Any) -> Any:
        try:
            config = layer.get_config()
            if id(layer) in self.takers:
                config["use_bias"] = True
            if id(layer) in self.activations:
                config["activation"] = self.activations[id(layer)]
            if type(layer) is keras.layers.Lambda:
                # Its function is here, in this process: there is nothing to load that could not be trusted.
                config["function"] = keras.saving.serialize_keras_object(keras.activations.linear)
                copy = keras.layers.Lambda.from_config(config, safe_mode=False)
                copy.function = layer.function
                return copy
            return type(layer).from_config(config)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise OptionError(
                f"fold copies a layer by its config, which fails here ({error}): give the class get_config() "
                "and from_config() that rebuild it",
                f"{layer.name} ({type(layer).__name__})",
            ) from error


def _input_like(tensor: Any) -> Any:
    layer = input_layer(tensor)
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        name=layer.name,
        optional=layer.optional,
    )


def _folded_weights(steps: tuple[Step, ...]) -> dict[int, Weights]:
    """Return the numbers of every layer that takes a normalization, by its id, in float64."""
    found: dict[int, Weights] = {}
    for step in steps:
        scale, shift = affine(step.norm)
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            raise DataError(
                "its weights or moving statistics give NaN or inf at inference: calibrate or train the model "
                "anew before fold",
                f"{step.name} ({type(step.norm).__name__})",
            )
        kind = KINDS[type(step.layer)]
        take = kind.scale_outputs if step.direction == "before" else kind.scale_inputs
        assert take is not None
        weights = found[id(step.layer)] if id(step.layer) in found else read_weights(step.layer)
        found[id(step.layer)] = take(weights, scale, shift)
    return found


def _write(layer: Any, weights: Weights) -> None:
    for name, kernel in zip(KINDS[type(layer)].kernels, weights.kernels, strict=True):
        getattr(layer, name).assign(kernel)
    layer.bias.assign(weights.bias)


def _copy_other_weights(original: Any, copy: Any) -> None:
    """Copy what a layer that takes a normalization has besides kernels and bias: an activation's weights."""
    old, new = (
        [weight for weight in layer.weights if id(weight) not in _taken(layer)] for layer in (original, copy)
    )
    for source, target in zip(old, new, strict=True):
        target.assign(_apart(source))


def _taken(layer: Any) -> set[int]:
    return {id(getattr(layer, name)) for name in (*KINDS[type(layer)].kernels, "bias")}


def _copy_state(original: Any, copy: Any) -> None:
    """Copy all that a layer knows besides its config: weights, and what it keeps in ways of its own."""
    shapes = [[tuple(weight.shape) for weight in layer.weights] for layer in (original, copy)]
    if shapes[0] != shapes[1]:
        raise OptionError(
            f"its copy, made from its config, has other weights: {shapes[1]} instead of {shapes[0]}",
            f"{original.name} ({type(original).__name__})",
        )
    for source, target in zip(original.weights, copy.weights, strict=True):
        target.assign(_apart(source))
    # As in saving to a file: some preprocessing layers compute from their variables when these are loaded.
    # (With LoRA, saving would merge the weights: those are copied above, as they are.)
    if not getattr(original, "lora_enabled", False):
        store: dict[str, Any] = {}
        original.save_own_variables(store)
        copy.load_own_variables({name: _apart(value) for name, value in store.items()})
    if hasattr(original, "save_assets"):  # a vocabulary
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            copy.load_assets(folder)


def _apart(value: Any) -> Any:
    """A tensor or variable's value in memory of its own.

    On JAX, `assign` takes an array as it is. Two models with one array between them lose it when either runs:
    `predict` and `fit` donate a model's arrays to the compiled step.
    """
    if isinstance(value, keras.Variable) or keras.ops.is_tensor(value):
        return keras.ops.copy(value)
    return value
