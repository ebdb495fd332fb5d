"""`accumulate`: running statistics move once per optimizer step, by all of its micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.contexts.accumulation import Accumulator
from batchnorm.torch.layers import _Layer
from batchnorm.torch.tracing import is_recomputed

from .contexts import layers_of, shown


@contextlib.contextmanager
def accumulate(model: nn.Module, steps: int) -> Iterator[None]:
    """Within the block, running statistics move once per `steps` forwards of `model`, by all of these.

        with batchnorm.accumulate(model, 4):
            for number, (x, target) in enumerate(data, start=1):
                loss(model(x), target).backward()
                if number % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()

    With n_k, mean_k, m2_k of micro-batch k, of all calls of a layer in its forward,

        mean = Σ n_k mean_k / n,    var = (Σ m2_k + Σ n_k (mean_k - mean)²) / (n - 1),    n = Σ n_k
        running = (1 - momentum) * running + momentum * (mean, var)

    which is the update by their concatenation, once, and counts one batch. Without this they move `steps`
    times: momentum acts as if it were 1 - (1 - momentum)^steps, and the variance leaves out how the means of
    micro-batches differ.

    Each micro-batch is still normalized by its own mean and var. Those of all of them are known only after
    the last, and depend on each other from layer to layer: to normalize by them takes all activations at
    once, which is the large batch that did not fit, or a second forward for each. `Synced` over ranks, or
    `Renorm`, come closer to a large batch.

    A forward counts where the model is in training, and one that activation checkpointing computes again does
    not. One that raises leaves nothing behind. At the end of the block, forwards that are left over, fewer
    than `steps`, move the statistics too; if it ends by an exception, they do not. Kept meanwhile are three
    numbers per channel. Masks count as always; with nonfinite="skip" a micro-batch with inf or NaN is left
    out and counted in `skipped`, and a step of nothing else is no batch.

    Args:
        model: with layers of this library, or one of them; what is called, such as the
            DistributedDataParallel around a model.
        steps: micro-batches per optimizer step, 1 or more. With 1, all is as without.

    Raises:
        OptionError: (a ValueError) no batch normalization; and by name: one that is not of this library, one
            in another such block, one with `Ghost(sequential=True)`, which moves them for each ghost batch.

    Differs from torch: stock layers move their statistics in every forward.

    Source: https://github.com/pytorch/pytorch/issues/46516.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise OptionError(f"steps must be a whole number of 1 or more, of micro-batches; got {steps!r}")
    layers = layers_of(model, "accumulate")
    _check(model, layers)
    if steps == 1:
        yield
        return
    accumulators = [Accumulator(layer) for layer in layers]
    count = _Count(accumulators, steps)
    begin, end = _Hook(count.begin), _Hook(count.end)
    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        for layer, accumulator in zip(layers, accumulators, strict=True):
            layer._accumulator = accumulator
        yield
        for accumulator in accumulators:
            accumulator.flush()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            vars(layer).pop("_accumulator", None)


class _Hook:
    """A hook that no compiler traces, as it counts in Python; in a copy of the model it does nothing."""

    def __init__(self, work: Callable[[nn.Module], None]) -> None:
        self.work: Callable[[nn.Module], None] = torch.compiler.disable(work)  # type: ignore[no-untyped-call]

    def __call__(self, model: nn.Module, *_: Any) -> None:
        self.work(model)

    def __deepcopy__(self, _: dict[int, Any]) -> _Hook:
        return _Hook(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(_: nn.Module) -> None:
    """Do nothing."""


class _Count:
    """Counts forwards, and moves the statistics at the end of every so many."""

    def __init__(self, accumulators: list[Accumulator], steps: int) -> None:
        self.accumulators, self.steps = accumulators, steps
        self.done = 0

    def begin(self, model: nn.Module) -> None:
        """Begin a forward."""
        if model.training and not is_recomputed():
            for accumulator in self.accumulators:
                accumulator.begin()

    def end(self, model: nn.Module) -> None:
        """End a forward."""
        if not model.training or is_recomputed():
            return
        for accumulator in self.accumulators:
            accumulator.end()
        self.done += 1
        if self.done % self.steps == 0:
            for accumulator in self.accumulators:
                accumulator.flush()


def _check(model: nn.Module, layers: list[_Layer]) -> None:
    for layer in layers:
        if layer._accumulator is not None:
            raise OptionError("it is in another block of accumulate already", shown(model, layer))
        if layer.statistics.is_sequential:
            raise OptionError(
                f"statistics={layer.statistics} move for each ghost batch, and accumulate moves them once: "
                "use one of the two",
                shown(model, layer),
            )
