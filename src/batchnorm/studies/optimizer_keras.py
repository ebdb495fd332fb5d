"""Optimizers of Keras that add an arm's penalties and keep gradient norms, within the compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from .arms import Arm
from .settings import Recipe

Kernels = Sequence[keras.Variable]  # of a layer


def make_optimizer(
    recipe: Recipe, learning_rate: float, arm: Arm, kernels: Sequence[Kernels], *, noting: bool
) -> keras.optimizers.Optimizer:
    """Returns the optimizer of a recipe, with the settings of the torch study.

    The gradient of a penalty is added to the kernels' gradients before the update, which is the same step as
    adding the penalty to the loss; the losses that are recorded are the cross-entropy alone, so that arms
    compare. So is weight decay, but in AdamW.

    Args:
        recipe: of the study.
        learning_rate: above 0.
        arm: whose penalties are added.
        kernels: those of each layer.
        noting: whether the norm of each layer's gradient, without the penalty, is kept at every step in the
            variable `gradient_norms`, `[layers]`; NaN for a layer that received none.
    """
    betas = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
    if recipe.optimizer == "sgd":
        optimizer = _penalized("SGD")(learning_rate=learning_rate, momentum=recipe.momentum)
    elif recipe.optimizer == "adam":
        optimizer = _penalized("Adam")(learning_rate=learning_rate, **betas)
    else:
        decay = recipe.weight_decay
        optimizer = _penalized("AdamW")(learning_rate=learning_rate, weight_decay=decay, **betas)
    coupled = 0.0 if recipe.optimizer == "adamw" else recipe.weight_decay
    optimizer.watch(arm, coupled, lambda: kernels, noting)
    return optimizer


@functools.cache
def _penalized(name: str) -> Any:
    # The class that Keras makes, which on torch is one of the backend's own: it updates all variables in a
    # few calls. A subclass of keras.optimizers.Adam itself would update them one by one.
    kind: Any = type(getattr(keras.optimizers, name)())

    class Penalized(kind):
        # By a function, because an optimizer takes lists of variables for its state.
        def watch(
            self, arm: Arm, decay: float, kernels: Callable[[], Sequence[Kernels]], noting: bool
        ) -> None:
            self.arm, self.decay, self.kernels = arm, decay, kernels
            self.gradient_norms = self.add_variable((len(kernels()),), name="norms") if noting else None

        def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
            # JAX hands over gradients alone, in the order in which the optimizer was built.
            variables = self._trainable_variables if trainable_variables is None else trainable_variables
            positions = {id(variable): number for number, variable in enumerate(variables)}
            grads = list(grads)
            at = [[positions[id(kernel)] for kernel in kernels] for kernels in self.kernels()]
            if self.gradient_norms is not None:
                norms = [_norm([grads[i] for i in layer]) for layer in at]
                self.gradient_norms.assign(keras.ops.stack(norms))
            for layer, kernels in zip(at, self.kernels(), strict=True):
                for i, kernel in zip(layer, kernels, strict=True):
                    grads[i] = _with_penalty(grads[i], kernel, self.arm.l1, 2 * self.arm.l2 + self.decay)
            super().apply(grads, trainable_variables)

        def _use_weight_decay(self, variable: keras.Variable) -> bool:
            return any(variable is kernel for kernels in self.kernels() for kernel in kernels)

    return Penalized


def _norm(gradients: Sequence[Any]) -> Any:
    there = [gradient for gradient in gradients if gradient is not None]
    if not there:
        return keras.ops.convert_to_tensor(float("nan"), dtype="float32")
    flat = keras.ops.concatenate([keras.ops.reshape(gradient, (-1,)) for gradient in there])
    # In units of the largest: squares of vanished gradients would be 0 in float32.
    largest = keras.ops.max(keras.ops.abs(flat))
    scale = keras.ops.where(largest > 0, largest, 1.0)
    return scale * keras.ops.sqrt(keras.ops.sum(keras.ops.square(flat / scale)))


def _with_penalty(gradient: Any, kernel: keras.Variable, l1: float, decay: float) -> Any:
    if gradient is None:
        return None
    if l1:
        gradient = gradient + l1 * keras.ops.sign(kernel)
    if decay:
        gradient = gradient + decay * keras.ops.convert_to_tensor(kernel)
    return gradient
