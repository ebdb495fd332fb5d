"""Writes remedies as code to paste, in the words of each framework.

In that code `model`, `data` and `optimizer` are what `diagnose` was given; `batchnorm` and `torch` or `keras`
are imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from .records import Framework


class Remedies(Protocol):
    """The remedies of a framework; each method returns code."""

    def calibrate(self) -> str:
        """Set the running statistics to those of the data."""

    def reset_parameters(self, layer: str) -> str:
        """Set weight and bias to 1 and 0, and the statistics to those of the data."""

    def momentum(self, layer: str, value: float) -> str:
        """Set the momentum of a layer; `value` is in torch's convention, the batch's share."""

    def freeze(self, layer: str) -> str:
        """Freeze the norms of the part of the model that has this layer."""

    def evaluate(self) -> str:
        """Bring the whole model into evaluation."""

    def end_training(self, part: str) -> str:
        """Bring a graph that is fixed in training, or a norm that is called so, into evaluation."""

    def widen(self) -> str:
        """Make running statistics float32 and moments accurate."""

    def small_batch(self) -> str:
        """Let a batch of one value per channel take the running statistics."""

    def synchronize(self) -> str:
        """Share moments over processes, in all norms."""

    def renorm(self) -> str:
        """Normalize small and ordered batches nearly as evaluation does."""

    def adapt(self) -> str:
        """Adapt evaluation to each batch."""

    def mask(self) -> str:
        """Leave padding out of every norm."""

    def shuffle(self) -> str:
        """Draw batches at random."""

    def track(self, layer: str) -> str:
        """Give a norm running statistics."""

    def drop_bias(self, before: str, norm: str) -> str:
        """Remove the bias of the layer before a norm, with the same outputs."""

    def domains(self, calls: int) -> str:
        """Give each call of a norm running statistics of its own."""

    def parameter_groups(self) -> str:
        """Take the decay off weight and bias of the norms."""

    def fold(self) -> str:
        """Fold norms into the layers next to them."""

    def first_not_finite(self) -> str:
        """Leave batches with NaN or inf out of the statistics."""


class Torch:
    """Remedies for torch."""

    def calibrate(self) -> str:
        return "batchnorm.calibrate(model, data)"

    def reset_parameters(self, layer: str) -> str:
        return f"{_module(layer)}.reset_parameters()\n{self.calibrate()}"

    def momentum(self, layer: str, value: float) -> str:
        return f"{_module(layer)}.momentum = {value:g}"

    def freeze(self, layer: str) -> str:
        return f"batchnorm.freeze({_module(layer)})"

    def evaluate(self) -> str:
        return "model.eval()"

    def end_training(self, part: str) -> str:
        return (
            f"graph = {_module(part)}\n"
            "for node in graph.graph.nodes:\n"
            '    if "batch_norm" in str(node.target) and len(node.args) > 5 and node.args[5] is True:\n'
            "        node.update_arg(5, False)\n"
            "graph.recompile()"
        )

    def widen(self) -> str:
        return "batchnorm.convert(model)"

    def small_batch(self) -> str:
        return 'batchnorm.convert(model, small_batch="running")'

    def synchronize(self) -> str:
        return "batchnorm.convert(model, batchnorm.Synced())"

    def renorm(self) -> str:
        return "batchnorm.convert(model, batchnorm.Renorm())"

    def adapt(self) -> str:
        return "batchnorm.convert(model, batchnorm.Adapted())"

    def mask(self) -> str:
        return "batchnorm.convert(model)\nwith batchnorm.mask(model, lengths=lengths):\n    y = model(x)"

    def shuffle(self) -> str:
        return "data = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)"

    def track(self, layer: str) -> str:
        return (
            f"norm = {_module(layer)}\n"
            "norm.track_running_stats = True\n"
            'norm.register_buffer("running_mean", torch.zeros(norm.num_features))\n'
            'norm.register_buffer("running_var", torch.ones(norm.num_features))\n'
            'norm.register_buffer("num_batches_tracked", torch.tensor(0))\n'
            f"{self.calibrate()}"
        )

    def drop_bias(self, before: str, norm: str) -> str:
        return (
            f"layer, norm = {_module(before)}, {_module(norm)}\n"
            "norm.running_mean -= layer.bias.detach()\n"
            'layer.register_parameter("bias", None)'
        )

    def domains(self, calls: int) -> str:
        return f"batchnorm.convert(model, domains={calls})"

    def parameter_groups(self) -> str:
        return (
            "kinds = torch.nn.modules.batchnorm._BatchNorm\n"
            "norms = [m for m in model.modules() if isinstance(m, kinds)]\n"
            "free = {id(p) for m in norms for p in m.parameters(recurse=False)}\n"
            "for group in list(optimizer.param_groups):\n"
            '    chosen = [p for p in group["params"] if id(p) in free]\n'
            '    if chosen and group["weight_decay"]:\n'
            '        group["params"] = [p for p in group["params"] if id(p) not in free]\n'
            '        optimizer.add_param_group({**group, "params": chosen, "weight_decay": 0.0})'
        )

    def fold(self) -> str:
        return "folded = batchnorm.fold(model)"

    def first_not_finite(self) -> str:
        return 'batchnorm.convert(model, nonfinite="skip")'


class Keras:
    """Remedies for Keras.

    Args:
        expressions: code for a layer by its name, where `get_layer` does not reach it.
    """

    def __init__(self, expressions: Mapping[str, str] | None = None) -> None:
        self._expressions = expressions or {}

    def _layer(self, name: str) -> str:
        """Return an expression for a layer by its path, `backbone/block_1`."""
        by_name = "model" + "".join(f".get_layer({json.dumps(part)})" for part in name.split("/"))
        return self._expressions.get(name, by_name)

    def calibrate(self) -> str:
        return "batchnorm.keras.calibrate(model, data)"

    def reset_parameters(self, layer: str) -> str:
        return (
            f"norm = {self._layer(layer)}\n"
            "norm.gamma.assign(keras.ops.ones(norm.gamma.shape))\n"
            "norm.beta.assign(keras.ops.zeros(norm.beta.shape))\n"
            f"{self.calibrate()}"
        )

    def momentum(self, layer: str, value: float) -> str:
        return f"{self._layer(layer)}.momentum = {round(1 - value, 6):g}"

    def freeze(self, layer: str) -> str:
        return f"batchnorm.keras.freeze({self._layer(layer)})"

    def evaluate(self) -> str:
        return "y = model(x, training=False)"

    def end_training(self, part: str) -> str:
        return self.freeze(part)

    def widen(self) -> str:
        return "norm = batchnorm.keras.BatchNormalization()"

    def small_batch(self) -> str:
        return 'norm = batchnorm.keras.BatchNormalization(small_batch="running")'

    def synchronize(self) -> str:
        return "norm = batchnorm.keras.BatchNormalization(synchronized=True)"

    def renorm(self) -> str:
        return "norm = batchnorm.keras.BatchNormalization(statistics=batchnorm.Renorm())"

    def adapt(self) -> str:
        return "norm = batchnorm.keras.BatchNormalization(statistics=batchnorm.Adapted())"

    def mask(self) -> str:
        return "masking = keras.layers.Masking()"

    def shuffle(self) -> str:
        return "model.fit(x, y, shuffle=True)"

    def track(self, layer: str) -> str:
        raise AssertionError(f"{layer}: every norm of Keras has moving statistics")

    def drop_bias(self, before: str, norm: str) -> str:
        return (
            f"layer, norm = {self._layer(before)}, {self._layer(norm)}\n"
            "norm.moving_mean.assign(norm.moving_mean - layer.bias)\n"
            "layer.bias.assign(keras.ops.zeros(layer.bias.shape))"
        )

    def domains(self, calls: int) -> str:
        return f"norms = [batchnorm.keras.BatchNormalization() for _ in range({calls})]"

    def parameter_groups(self) -> str:
        return 'optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])'

    def fold(self) -> str:
        return "folded = batchnorm.keras.fold(model)"

    def first_not_finite(self) -> str:
        return 'norm = batchnorm.keras.BatchNormalization(nonfinite="skip")'


def remedies_of(framework: Framework, expressions: Mapping[str, str] | None = None) -> Remedies:
    """Return the remedies of a framework; `expressions`: code for layers of Keras by name."""
    return Torch() if framework == "torch" else Keras(expressions)


def _module(name: str) -> str:
    return f"model.get_submodule({json.dumps(name)})" if name else "model"  # a name may hold a quote
