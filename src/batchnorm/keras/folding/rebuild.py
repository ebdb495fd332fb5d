"""A copy of a Keras model without the normalizations that fold; their maps are in the layers next to them."""

from __future__ import annotations

import tempfile

import keras

from batchnorm.errors import DataError, OptionError

from .arithmetic import FAMILIES, Weights, affine, kernel_names, read_weights, scale_inputs, scale_outputs
from .graph import activation_of, has_graph, input_layer, untrained
from .plan import Plan


def rebuild(model: keras.Model, plan: Plan) -> keras.Model:
    """Return the copy: new layers and new weights under the old names, not compiled.

    Raises:
        OptionError: a layer cannot be copied.
        DataError: a normalization that folds has weights that give NaN or inf.
    """
    weights = _folded_weights(plan)
    copier = _Copier(plan)
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

    def __init__(self, plan: Plan) -> None:
        self.gone = {id(step.norm) for step in plan.steps}
        self.takers = {id(step.into[0].layer) for step in plan.steps}
        self.activations = {
            id(step.into[0].layer): step.norm.get_config()["activation"]
            for step in plan.steps
            if activation_of(step.norm) is not None
        }
        self.copies: dict[int, tuple[keras.Operation, keras.Operation]] = {}  # id -> (original, copy)

    def copy(self, layer: keras.Operation) -> keras.Operation:
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

    def _sequential(self, model: keras.Sequential) -> keras.Sequential:
        layers = [self.copy(layer) for layer in model.layers if id(layer) not in self.gone]
        # Keras builds no Sequential without a layer.
        layers = layers or [keras.layers.Identity(name=model.layers[-1].name)]
        return keras.Sequential([_input_like(model.inputs[0]), *layers], name=model.name)

    def _functional(self, model: keras.Model) -> keras.Model:
        def call(layer: keras.Operation, *args: object, **kwargs: object) -> object:
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

    def _layer(self, layer: keras.Operation) -> keras.Operation:
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


def _input_like(tensor: keras.KerasTensor) -> keras.KerasTensor:
    layer = input_layer(tensor)
    return keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        name=layer.name,
        optional=layer.optional,
    )


def _folded_weights(plan: Plan) -> dict[int, Weights]:
    """Return the numbers of every layer that takes a normalization, by its id, in float64."""
    found: dict[int, Weights] = {}
    for step in plan.steps:
        norm, layer = step.norm, step.into[0].layer
        map_ = affine(norm)
        if not map_.is_finite:
            raise DataError(
                "its weights or moving statistics give NaN or inf at inference: calibrate or train the model "
                "anew before fold",
                f"{plan.norms[norm]} ({type(norm).__name__})",
            )
        scale = scale_outputs if step.direction == "before" else scale_inputs
        now = found.get(id(layer)) or read_weights(layer)
        found[id(layer)] = scale(FAMILIES[type(layer)], now, map_)
    return found


def _write(layer: keras.layers.Layer, weights: Weights) -> None:
    for name, kernel in zip(kernel_names(layer), weights.kernels, strict=True):
        getattr(layer, name).assign(kernel)
    layer.bias.assign(weights.bias)


def _copy_other_weights(original: keras.layers.Layer, copy: keras.layers.Layer) -> None:
    """Copy what a layer that takes a normalization has besides kernels and bias: an activation's weights."""
    old, new = (
        [weight for weight in layer.weights if id(weight) not in _taken(layer)] for layer in (original, copy)
    )
    for source, target in zip(old, new, strict=True):
        target.assign(_apart(source))


def _taken(layer: keras.layers.Layer) -> set[int]:
    return {id(getattr(layer, name)) for name in (*kernel_names(layer), "bias")}


def _copy_state(original: keras.layers.Layer, copy: keras.layers.Layer) -> None:
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
        store: dict[str, object] = {}
        original.save_own_variables(store)
        copy.load_own_variables({name: _apart(value) for name, value in store.items()})
    if hasattr(original, "save_assets"):  # a vocabulary
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            copy.load_assets(folder)


def _apart(value: object) -> object:
    """A tensor or variable's value in memory of its own.

    On JAX, `assign` takes an array as it is. Two models with one array between them lose it when either runs:
    `predict` and `fit` donate a model's arrays to the compiled step.
    """
    if isinstance(value, keras.Variable) or keras.ops.is_tensor(value):
        return keras.ops.copy(value)
    return value
