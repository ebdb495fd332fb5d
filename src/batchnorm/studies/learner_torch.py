"""Trains and evaluates a network of a study in PyTorch, and measures its inputs, gradients and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from batchnorm.models.calibrate import calibrate
from batchnorm.models.freeze import freeze
from batchnorm.models.mask import mask

from .arms import Arm
from .data import Dataset
from .loaders import Names
from .networks_torch import build_network
from .objectives import LOSSES, mean_loss
from .padding import Array, Examples, Padded
from .settings import Recipe, Setting
from .training import EVALUATION_BATCH
from .user_code import load_function, naming_the_line, source_of


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Keeps a run or a timing apart: the caller's random state is as before."""
    with torch.random.fork_rng(devices=[]):
        yield


def make_learner(
    setting: Setting,
    recipe: Recipe,
    arm: Arm,
    data: Dataset,
    seed: int,
    learning_rate: float,
    is_watched: bool,
) -> TorchLearner:
    """Builds a network and its optimizer; see `training.MakeLearner`."""
    model = build_network(setting.network, arm, data.input_shape, data.outputs, seed, setting.depth)
    torch.manual_seed(seed)
    return TorchLearner(model, arm, recipe, learning_rate, is_watched, data.names)


class TorchLearner:
    """A `training.Learner`."""

    def __init__(
        self,
        model: nn.Module,
        arm: Arm,
        recipe: Recipe,
        learning_rate: float,
        is_watched: bool = False,
        names: Names | None = None,
    ) -> None:
        self.model = model.train()
        self.layers: Sequence[str] = list(weight_layers(model))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.has_batch_norms = any(norm.running_mean is not None for norm in _batch_norms(model))
        self._arm, self._is_watched, self._names = arm, is_watched, names
        self._loss_name, self._loss = recipe.loss, _loss_named(recipe.loss)
        self._weights = [_weight(layer) for layer in weight_layers(model).values()]
        self._norms: list[Tensor | None] = []
        self._optimizer = _make_optimizer(recipe, learning_rate, self._weights, model.parameters())

    def step(self, x: Examples, y: Array) -> float:
        self._optimizer.zero_grad()
        loss = self._loss(self._output(x), torch.from_numpy(y))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [weight.grad for weight in self._weights]
        with torch.no_grad():
            if self._is_watched:
                self._norms = [g if g is None else torch.linalg.vector_norm(g) for g in gradients]
            for weight, gradient in zip(self._weights, gradients, strict=True):
                if gradient is not None and self._arm.l1:
                    gradient.add_(weight.sign(), alpha=self._arm.l1)
                if gradient is not None and self._arm.l2:
                    gradient.add_(weight, alpha=2 * self._arm.l2)
        self._optimizer.step()
        return loss.item()

    def gradient_norms(self) -> Sequence[float]:
        return [float("nan") if norm is None else float(norm) for norm in self._norms]

    def predict(self, x: Examples, *, by_batch: bool = False) -> Array | str:
        with evaluation(self.model, by_batch=by_batch):
            output = self._output(x)
        is_tensor = isinstance(output, Tensor)
        return output.numpy().astype(np.float64) if is_tensor else type(output).__name__

    def loss(self, outputs: Array, y: Array) -> float:
        if self._loss_name in LOSSES:
            return mean_loss(self._loss_name, outputs, y)
        with torch.no_grad():
            return self._loss(torch.from_numpy(outputs).float(), torch.from_numpy(y)).item()

    def input_spread(self, x: Examples) -> dict[str, tuple[float, float]]:
        return input_spread(self.model, lambda: self._output(x))

    def bytes_kept(self, x: Examples, y: Array) -> int:
        with statistics_kept(self.model):
            return saved_bytes(
                lambda: self._loss(self._output(x), torch.from_numpy(y)), self.model.parameters()
            )

    def calibrate(self, x: Examples) -> None:
        batches = [x[start : start + EVALUATION_BATCH] for start in range(0, len(x), EVALUATION_BATCH)]
        calibrate(self.model, batches, forward=lambda _, batch: self._output(batch))

    def freeze_statistics(self) -> None:
        if self.has_batch_norms:
            freeze(self.model)
            self.has_batch_norms = False  # that statistics at test time make a difference to

    def _output(self, x: Examples) -> Any:  # of a user's network; checked before training
        """Returns what the model makes of a batch, which is masked by its lengths if the arm says so."""
        if not isinstance(x, Padded):
            return _logits(self._call(torch.from_numpy(x), None))
        values, lengths = torch.from_numpy(x.values), torch.from_numpy(x.lengths)
        masked = _batch_norms(self.model) and self._arm.is_masked
        size = values.shape[1]
        with mask(self.model, lengths=lengths, size=size) if masked else contextlib.nullcontext():
            return _logits(self._call(values, lengths))

    def _call(self, values: Tensor, lengths: Tensor | None) -> Any:
        names = self._names
        if names is None:
            return self.model(values) if lengths is None else self.model(values, lengths)
        arguments = {names.inputs: values}
        if lengths is not None and names.padding is not None:
            valid = torch.arange(values.shape[1]) < lengths[:, None]
            arguments[names.padding] = valid.long() if names.takes_mask else lengths
        return self.model(**arguments)

    def permutation(self, length: int, seed: int) -> Array:
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).numpy()


def _logits(output: Any) -> Any:
    """Returns the logits of an output that has some under that name, as those of Hugging Face do."""
    return output["logits"] if isinstance(output, Mapping) and "logits" in output else output


def _loss_named(name: str) -> Callable[[Any, Tensor], Tensor]:
    """Returns the function of a loss: of outputs and targets, to a scalar."""
    if name in LOSSES:
        return cross_entropy if name == "cross_entropy" else mse_loss
    function = load_function(name)

    def own(outputs: Any, targets: Tensor) -> Tensor:
        with naming_the_line(f"loss {name}", source_of(name)):
            value = function(outputs, targets)
            if not isinstance(value, Tensor) or value.ndim:
                shape = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise TypeError(f"it returned {shape}, not a tensor with one number: return its mean()")
            return value

    return own


def _make_optimizer(
    recipe: Recipe, learning_rate: float, weights: Sequence[Tensor], parameters: Iterable[Tensor]
) -> torch.optim.Optimizer:
    """Returns the optimizer of a recipe, which decays weights alone."""
    decayed = {id(weight) for weight in weights}
    rest = [parameter for parameter in parameters if id(parameter) not in decayed]
    groups: list[dict[str, Any]] = [
        {"params": list(weights), "weight_decay": recipe.weight_decay},
        {"params": rest},
    ]
    # Fused: a third less time per step of these small networks on a CPU.
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, learning_rate, recipe.momentum, fused=True)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, learning_rate, weight_decay=0.0, fused=True)


def _weight(layer: nn.Linear | _ConvNd) -> Tensor:
    """Returns the trained weight of a layer, behind a parametrization too."""
    trained = dict(layer.named_parameters()).get("parametrizations.weight.original")
    return layer.weight if trained is None else trained


def weight_layers(model: nn.Module) -> dict[str, nn.Linear | _ConvNd]:
    """Returns the linear and convolution layers of a model by qualified name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | _ConvNd)}


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextlib.contextmanager
def evaluation(model: nn.Module, *, by_batch: bool = False) -> Iterator[None]:
    """Computes without dropout and without gradients; modes and running statistics come back on any exit.

    Args:
        model: any.
        by_batch: whether batch normalizations use the statistics of each batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), statistics_kept(model) if by_batch else contextlib.nullcontext():
        try:
            model.eval()
            for norm in _batch_norms(model) if by_batch else ():
                norm.train()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Puts the running statistics of a model back on any exit."""
    kept = [
        (buffer, buffer.clone()) for norm in _batch_norms(model) for buffer in norm.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def input_spread(model: nn.Module, forward: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Returns the moments of each layer's input; see `training.Learner.input_spread`."""
    spread: dict[str, tuple[float, float]] = {}

    def look(name: str, unit_dim: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not inputs:  # it came under a name
                return
            values = inputs[0].movedim(unit_dim, -1).flatten(0, -2)
            std, mean = torch.std_mean(values, dim=0, correction=0)
            spread[name] = (float(mean.mean()), float(std.mean()))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in weight_layers(model).items():
            handle = layer.register_forward_pre_hook(look(name, -1 if isinstance(layer, nn.Linear) else 1))
            hooks.callback(handle.remove)
        with evaluation(model, by_batch=True):
            forward()
    return spread


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Returns the bytes of the distinct storages that a forward saves, those of parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held until the count is done: a storage freed meanwhile could come back at the same address.
        loss = forward()
    kept = sum(storages.values())
    del loss
    return kept
