"""Trains a network of a study in Keras by `train_on_batch`, and evaluates and measures it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from batchnorm.keras.calibrate import calibrate
from batchnorm.statistics.running import Running

from . import probes_keras as probes
from .arms import Arm
from .data import Dataset
from .loaders import Names
from .networks_keras import build_network
from .objectives import LOSSES, mean_loss
from .optimizer_keras import make_optimizer
from .padding import Array, Examples, Padded
from .settings import Recipe, Setting
from .training import EVALUATION_BATCH
from .user_code import load_function, naming_the_line, source_of


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Begins a run or a timing: names of layers count from the beginning, and the last one's graphs go."""
    keras.utils.clear_session()
    yield


def make_learner(
    setting: Setting,
    recipe: Recipe,
    arm: Arm,
    data: Dataset,
    seed: int,
    learning_rate: float,
    is_watched: bool,
) -> KerasLearner:
    """Builds a network and its optimizer; see `training.MakeLearner`. Keras's random state is left seeded."""
    padded = data.lengths_train is not None
    model = build_network(
        setting.network, arm, data.input_shape, data.outputs, seed, setting.depth, padded=padded
    )
    keras.utils.set_random_seed(seed)
    with probes.batch_statistics(model):
        model(
            _inputs(data.held_out[:2], data.names), training=False
        )  # so that a network without an Input has its weights
    return KerasLearner(model, arm, recipe, learning_rate, is_watched, data.names)


class KerasLearner:
    """A `training.Learner`."""

    def __init__(
        self,
        model: keras.Model,
        arm: Arm,
        recipe: Recipe,
        learning_rate: float,
        is_watched: bool = False,
        names: Names | None = None,
    ) -> None:
        self.model, self._names = model, names
        layers = probes.weight_layers(model)
        self.layers = list(layers)
        self.parameters = sum(math.prod(variable.shape) for variable in model.trainable_variables)
        self.has_batch_norms = bool(probes.batch_norms(model))
        kernels = [probes.kernels(layer) for layer in layers.values()]
        self._optimizer = make_optimizer(recipe, learning_rate, arm, kernels, noting=is_watched)
        self._loss_name, self._loss = recipe.loss, _loss_named(recipe.loss)
        # The loss that Keras tells includes the penalties of a user's layers.
        model.compile(self._optimizer, self._loss, metrics=[_LossAlone(self._loss)])

    def step(self, x: Examples, y: Array) -> float:
        inputs = _inputs(x, self._names)
        return float(self.model.train_on_batch(inputs, _narrowed(y), return_dict=True)["loss_alone"])

    def gradient_norms(self) -> Sequence[float]:
        return list(map(float, keras.ops.convert_to_numpy(self._optimizer.gradient_norms)))

    def predict(self, x: Examples, *, by_batch: bool = False) -> Array | str:
        with probes.batch_statistics(self.model) if by_batch else contextlib.nullcontext():
            output = self.model(_inputs(x, self._names), training=False)
        is_tensor = keras.ops.is_tensor(output)
        return (
            np.asarray(keras.ops.convert_to_numpy(output), np.float64) if is_tensor else type(output).__name__
        )

    def loss(self, outputs: Array, y: Array) -> float:
        if self._loss_name in LOSSES:
            return mean_loss(self._loss_name, outputs, y)
        as_tensor = keras.ops.convert_to_tensor
        value = self._loss(as_tensor(_narrowed(y)), as_tensor(outputs.astype(np.float32)))
        return float(keras.ops.convert_to_numpy(value))

    def input_spread(self, x: Examples) -> dict[str, tuple[float, float]]:
        return probes.input_spread(self.model, _inputs(x, self._names))

    def bytes_kept(self, x: Examples, y: Array) -> int | None:
        # TensorFlow and JAX compile forward and backward into one program, whose buffers have no owner.
        if keras.config.backend() != "torch":
            return None
        from .learner_torch import saved_bytes

        inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, _inputs(x, self._names))
        targets = keras.ops.convert_to_tensor(_narrowed(y))
        with probes.state_kept(self.model):
            return saved_bytes(
                lambda: self._loss(targets, self.model(inputs, training=True)),
                [variable.value for variable in self.model.variables],
            )

    def calibrate(self, x: Examples) -> None:
        calibrate(self.model, _inputs(x, self._names), batch_size=EVALUATION_BATCH, verbose=0)

    def freeze_statistics(self) -> None:
        for norm in probes.batch_norms(self.model):
            norm.statistics = Running()
        self.has_batch_norms = False  # that statistics at test time make a difference to
        self.model.make_train_function(force=True)

    def permutation(self, length: int, seed: int) -> Array:
        # RandomState, because NumPy promises its stream for good.
        return np.random.RandomState(seed).permutation(length)


class _OwnLoss(keras.losses.Loss):
    """A function of the user's, of outputs and targets; a subclass, as Keras would make targets float32."""

    def __init__(self, name: str) -> None:
        super().__init__(name="own")
        self._spec, self._function = name, load_function(name)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        del sample_weight
        with naming_the_line(f"loss {self._spec}", source_of(self._spec)):
            value = self._function(y_pred, keras.ops.convert_to_tensor(y_true))
            if not keras.ops.is_tensor(value) or len(value.shape):
                what = f"a tensor of shape {list(value.shape)}" if keras.ops.is_tensor(value) else repr(value)
                raise TypeError(f"it returned {what}, not a tensor with one number: return its mean")
            return value


def _loss_named(name: str) -> keras.losses.Loss:
    if name == "cross_entropy":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return keras.losses.MeanSquaredError() if name == "mse" else _OwnLoss(name)


class _LossAlone(keras.metrics.Mean):
    """The loss without penalties of layers; `train_on_batch` resets it before each batch."""

    def __init__(self, loss: keras.losses.Loss) -> None:
        super().__init__(name="loss_alone")
        self._loss = loss

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(self._loss(y_true, y_pred), sample_weight)


def _inputs(x: Examples, names: Names | None) -> Array | list[Array] | dict[str, Array]:
    """Returns what a model takes: an array, values and lengths, or a dict by the names of its inputs."""
    if names is not None:
        values = x.values if isinstance(x, Padded) else x
        inputs = {names.inputs: _narrowed(values)}
        if isinstance(x, Padded) and names.padding is not None:
            valid = np.arange(values.shape[1]) < x.lengths[:, None]
            inputs[names.padding] = _narrowed(valid.astype(np.int32) if names.takes_mask else x.lengths)
        return inputs
    return [x.values, x.lengths.astype(np.float32)] if isinstance(x, Padded) else x


def _narrowed(values: Array) -> Array:
    """Returns whole numbers as int32, the widest that JAX has."""
    return values.astype(np.int32) if values.dtype.kind == "i" else values
