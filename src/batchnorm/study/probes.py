"""What is looked at inside a network while it trains; each probe leaves the network as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolution layers of a model by qualified name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | _ConvNd)}


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalizations of a model that keep running statistics."""
    return [
        layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]


def gradient_norms(layers: dict[str, nn.Module]) -> dict[str, float]:
    """The L2 norm of each layer's weight gradient; NaN for a layer that received none."""
    norms = {}
    for name, layer in layers.items():
        gradient = layer.weight.grad
        norms[name] = (
            float(torch.linalg.vector_norm(gradient)) if isinstance(gradient, Tensor) else float("nan")
        )
    return norms


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalize by batch statistics, without dropout; modes and running statistics come back on any exit."""
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    model.eval()
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def input_spread(model: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each linear and convolution layer's input over a batch.

    Per unit (or channel) over the batch and positions, then averaged over units. Batch normalizations use the
    statistics of this batch, as in training; nothing is dropped.

    Args:
        model: any.
        x: a batch of examples; the same one at every call makes values comparable over time.
    """
    spread: dict[str, tuple[float, float]] = {}

    def look(name: str, unit_dim: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0].movedim(unit_dim, -1).flatten(0, -2)
            std, mean = torch.std_mean(values, dim=0, correction=0)
            spread[name] = (float(mean.mean()), float(std.mean()))

        return hook

    with contextlib.ExitStack() as hooks:
        for name, layer in weight_layers(model).items():
            handle = layer.register_forward_pre_hook(look(name, -1 if isinstance(layer, nn.Linear) else 1))
            hooks.callback(handle.remove)
        with torch.no_grad(), batch_statistics(model):
            model(x)
    return spread


def bytes_kept_for_backward(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that autograd holds between the forward and the backward of one training step.

    The input batch is counted, parameters are not. The forward runs in training mode; running statistics are
    as before.
    """
    with batch_statistics(model):
        model.train()
        return saved_bytes(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that a forward saves, each counted once, and parameters not at all."""
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
