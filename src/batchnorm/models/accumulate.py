"""`accumulate`: a context that moves running statistics once per optimizer step, by all micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.contexts.accumulation import Accumulator
from batchnorm.torch.tracing import is_recomputed

from .contexts import layers_of
from .norms.kinds import Layer


@contextlib.contextmanager
def accumulate(model: nn.Module, steps: int) -> Iterator[None]:
    """Move the running statistics once per `steps` forwards of `model` within the block, by all of them.

    With n_k, mean_k, m2_k of all values that a layer receives in micro-batch k,

        mean = Σ n_k mean_k / n,    var = (Σ m2_k + Σ n_k (mean_k - mean)²) / (n - 1),    n = Σ n_k
        running = (1 - momentum) * running + momentum * (mean, var)

    which is one update by their concatenation, and counts one batch. Each micro-batch is still normalized by
    its own mean and var: those of all of them are known only after the last forward. `Synced` over ranks, or
    `Renorm`, come closer to normalizing by a large batch.

    Forwards in training count, but not those that activation checkpointing recomputes, nor one that raises.
    At the end of the block, the remaining forwards, fewer than `steps`, move the statistics too, unless the
    block ends by an exception. With nonfinite="skip" a micro-batch with inf or NaN is left out and counted in
    `skipped`.

    Args:
        model: with layers of this library, or one of them; the module that is called, such as the
            DistributedDataParallel around a model.
        steps: micro-batches per optimizer step, 1 or more. 1 changes nothing.

    Raises:
        OptionError: (a ValueError) no batch normalization; and by name: one of another library, one in
            another such block, one with `Ghost(sequential=True)`, which moves them for each ghost batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), batchnorm.BatchNorm1d(8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with batchnorm.accumulate(model, 4):
        ...     for number, x in enumerate(torch.randn(64, 4).split(8), start=1):
        ...         model(x).square().mean().backward()
        ...         if number % 4 == 0:
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        >>> model[1].num_batches_tracked
        tensor(2)

    Differs from torch: stock layers move their statistics in every forward, so that momentum acts as if it
    were 1 - (1 - momentum)^steps, and the variance leaves out how the means of micro-batches differ.

    Source: https://github.com/pytorch/pytorch/issues/46516.
    """
    layers = _layers(model, steps)
    if steps == 1:
        yield
        return
    accumulators = [Accumulator(layer) for layer in layers]
    count = _Count(accumulators, steps)
    with contextlib.ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(_Hook(count.begin)).remove)
        stack.callback(model.register_forward_hook(_Hook(count.end)).remove)
        for layer, accumulator in zip(layers, accumulators, strict=True):
            stack.callback(vars(layer).pop, "_accumulator", None)
            layer._accumulator = accumulator
        yield
        for accumulator in accumulators:
            accumulator.flush()


class _Hook:
    """Calls a method in a hook that no compiler traces; in a copy of the model it does nothing."""

    def __init__(self, work: Callable[[nn.Module], None] = lambda _: None) -> None:
        self.work: Callable[[nn.Module], None] = torch.compiler.disable(work)  # type: ignore[no-untyped-call]

    def __call__(self, model: nn.Module, *_: Any) -> None:
        self.work(model)

    def __deepcopy__(self, _: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class _Count:
    """Counts forwards, and moves the running statistics at the end of every `steps` of them."""

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


def _layers(model: nn.Module, steps: object) -> list[Layer]:
    """Return the layers of the model, or raise OptionError for one that the context is not for."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise OptionError(f"steps must be a whole number of 1 or more, of micro-batches; got {steps!r}")
    layers = layers_of(model, "accumulate")
    for name, layer in layers.items():
        if layer._accumulator is not None:
            raise OptionError("it is in another block of accumulate already", name)
        if layer.statistics.is_sequential:
            raise OptionError(
                f"statistics={layer.statistics} move for each ghost batch, and accumulate moves them once: "
                "use one of the two",
                name,
            )
    return list(layers.values())
