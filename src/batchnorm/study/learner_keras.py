"""Trains a network of a study in Keras by `train_on_batch`, and evaluates and measures it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import keras
import numpy as np

from batchnorm.keras.calibrate import calibrate
from batchnorm.statistics.running import Running

from . import probes_keras as probes
from .arms import Arm
from .data import Dataset
from .networks_keras import build_network
from .optimizer_keras import make_optimizer
from .padding import Array, Examples, Padded
from .settings import Recipe, Setting
from .training import EVALUATION_BATCH


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
        setting.network, arm, data.input_shape, data.classes, seed, setting.depth, padded=padded
    )
    keras.utils.set_random_seed(seed)
    with probes.batch_statistics(model):
        model(
            _inputs(data.held_out[:2]), training=False
        )  # so that a network without an Input has its weights
    return KerasLearner(model, arm, recipe, learning_rate, is_watched)


class KerasLearner:
    """A `training.Learner`."""

    def __init__(
        self, model: keras.Model, arm: Arm, recipe: Recipe, learning_rate: float, is_watched: bool = False
    ) -> None:
        self.model = model
        layers = probes.weight_layers(model)
        self.layers = list(layers)
        self.parameters = sum(math.prod(variable.shape) for variable in model.trainable_variables)
        self.has_batch_norms = bool(probes.batch_norms(model))
        kernels = [probes.kernels(layer) for layer in layers.values()]
        self._optimizer = make_optimizer(recipe, learning_rate, arm, kernels, noting=is_watched)
        self._loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # The loss that Keras tells includes the penalties of a user's layers.
        cross_entropy = keras.metrics.SparseCategoricalCrossentropy("cross_entropy", from_logits=True)
        model.compile(self._optimizer, self._loss, metrics=[cross_entropy])

    def step(self, x: Examples, y: Array) -> float:
        return float(self.model.train_on_batch(_inputs(x), _classes(y), return_dict=True)["cross_entropy"])

    def gradient_norms(self) -> Sequence[float]:
        return list(map(float, keras.ops.convert_to_numpy(self._optimizer.gradient_norms)))

    def predict(self, x: Examples, *, by_batch: bool = False) -> Array | str:
        with probes.batch_statistics(self.model) if by_batch else contextlib.nullcontext():
            output = self.model(_inputs(x), training=False)
        is_tensor = keras.ops.is_tensor(output)
        return (
            np.asarray(keras.ops.convert_to_numpy(output), np.float64) if is_tensor else type(output).__name__
        )

    def input_spread(self, x: Examples) -> dict[str, tuple[float, float]]:
        return probes.input_spread(self.model, _inputs(x))

    def bytes_kept(self, x: Examples, y: Array) -> int | None:
        # TensorFlow and JAX compile forward and backward into one program, whose buffers have no owner.
        if keras.config.backend() != "torch":
            return None
        from .learner_torch import saved_bytes

        inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, _inputs(x))
        classes = keras.ops.convert_to_tensor(_classes(y))
        with probes.state_kept(self.model):
            return saved_bytes(
                lambda: self._loss(classes, self.model(inputs, training=True)),
                [variable.value for variable in self.model.variables],
            )

    def calibrate(self, x: Examples) -> None:
        calibrate(self.model, _inputs(x), batch_size=EVALUATION_BATCH, verbose=0)

    def freeze_statistics(self) -> None:
        for norm in probes.batch_norms(self.model):
            norm.statistics = Running()
        self.has_batch_norms = False  # that statistics at test time make a difference to
        self.model.make_train_function(force=True)

    def permutation(self, length: int, seed: int) -> Array:
        # RandomState, because NumPy promises its stream for good.
        return np.random.RandomState(seed).permutation(length)


def _inputs(x: Examples) -> Array | list[Array]:
    """Returns what a model takes: an array, or values and lengths."""
    return [x.values, x.lengths.astype(np.float32)] if isinstance(x, Padded) else x


def _classes(y: Array) -> Array:
    return y.astype(np.int32)  # the widest that JAX has
