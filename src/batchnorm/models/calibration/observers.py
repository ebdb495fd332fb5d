"""Makes norms normalize by their batch and hand over its moments, or normalize by the statistics found."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, DataError
from batchnorm.models.graph.module_hooks import is_forward_replaced
from batchnorm.models.norms.kinds import BatchNormBase, Layer, is_ours, kind_of
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.calibration import Accumulator
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import Policy
from batchnorm.torch.checks import is_single, too_few
from batchnorm.torch.contexts.domains import affine_of
from batchnorm.torch.functional import moments, normalize_batch

from .packing import on_host

_LARGER = "use larger batches, or drop the last batch of one (DataLoader(drop_last=True))"
_Receive = Callable[[str, PooledMoments], None]


class BatchObserver:
    """Observes what norms receive, while each of them normalizes by its batch.

    Args:
        norms: the norms with running statistics, by name.
    """

    def __init__(self, norms: Mapping[str, BatchNormBase]) -> None:
        self.norms = norms
        self._batch = Accumulator()

    @contextlib.contextmanager
    def one_batch(self) -> Iterator[None]:
        """Observe one forward within the block."""
        self._batch = Accumulator(batches=1)
        yield

    def observed(self, samples: int) -> Accumulator:
        """Return what the norms received in the latest batch, of so many samples."""
        found = self._batch
        found.samples = samples
        found.moments = on_host(found.moments)
        return found

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the norms within the block; after it, they are as before."""
        with contextlib.ExitStack() as stack:
            for name, norm in self.norms.items():
                stack.enter_context(by_batch(name, norm, self._receive, strict=True))
            yield

    def _receive(self, name: str, found: PooledMoments) -> None:
        if self._batch.moments:
            self._batch.dependent.add(name)
        self._batch.add(name, found)


@contextlib.contextmanager
def by_batch(name: str, norm: BatchNormBase, receive: _Receive, *, strict: bool) -> Iterator[None]:
    """Make a norm normalize by its batch and hand over the moments, within the block.

    torch's own layers and ours compute both by one kernel of ours. What another class computes, or a forward
    that was replaced, is unknown: the moments of its input are taken before it runs.

    Args:
        name: of the norm, for `receive` and for errors.
        norm: in evaluation mode.
        receive: called with the name and the moments.
        strict: refuse a batch with one value per channel, which normalizes to nothing but zeros. Otherwise
            norms of unknown classes use the statistics that they have: their output is not needed.
    """

    def normalized(input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        activation: Any = norm.activation if is_ours(norm) else None
        try:
            norm._check_input_dim(input)  # type: ignore[no-untyped-call]
            if strict and is_single(input):
                raise too_few(input, _LARGER)
            weight, bias = affine_of(norm).values()
            y, found = normalize_batch(
                input, weight, bias, norm.eps, residual=residual, activation=activation, mask=mask
            )
        except BatchNormError as error:
            raise error.at(f"{name} ({type(norm).__name__})" if name else type(norm).__name__) from None
        receive(name, found)
        return y

    kind = kind_of(norm)
    family = "other" if kind is None or is_forward_replaced(norm) else kind.family
    with contextlib.ExitStack() as stack:
        if family in ("stock", "synchronized"):
            stack.enter_context(holding(vars(norm), forward=normalized))
        elif family == "ours":
            stack.enter_context(holding(vars(norm), _normalize=normalized))
        else:
            if strict:  # a norm without running statistics takes the batch's, in evaluation too
                stack.enter_context(holding(norm._buffers, running_mean=None, running_var=None))
            handle = norm.register_forward_pre_hook(
                lambda _, args, kwargs: receive(name, moments(*received(norm, args, kwargs))),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def by_statistics(name: str, norm: BatchNormBase, found: PooledMoments) -> Iterator[None]:
    """Make a norm use the statistics found as its running ones, and nothing else, within the block.

    A policy that adapts them to each batch (`Adapted`) is left aside too.
    """
    mean, var = running_statistics(name, norm, found)
    policy = getattr(norm, "_statistics", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(holding(norm._buffers, running_mean=mean, running_var=var))
        if isinstance(policy, Policy) and policy.measures(training=False):
            stack.enter_context(holding(vars(norm), _statistics=Batch()))
        yield


def running_buffers(norm: BatchNormBase) -> tuple[Tensor, Tensor]:
    """Return running mean and variance of a norm that has them."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    return mean, var


def running_statistics(name: str, norm: BatchNormBase, found: PooledMoments) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance as the norm's buffers hold them.

    Raises:
        DataError: one value per channel in all, NaN, inf, or a variance beyond the buffer's dtype.
    """
    if found.count < 2:
        raise DataError(
            "received one value per channel in all of the data: no variance; the model is unchanged", name
        )
    wide: tuple[Tensor, Tensor] = (found.mean, found.m2 / (found.count - 1))
    mean, var = (value.to(buffer) for value, buffer in zip(wide, running_buffers(norm), strict=True))
    if not (mean.isfinite().all() and var.isfinite().all()):
        if not all(statistic.isfinite().all() for statistic in wide):
            raise DataError("received NaN or inf; the model is unchanged", name)
        raise DataError(
            f"its running statistics overflow {mean.dtype}; the model is unchanged: scale the input, or keep "
            "them in a wider dtype",
            name,
        )
    return mean, var


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a norm from the arguments that it is called with."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def received(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the input of a norm and the mask that it heeds, from the arguments that it is called with."""
    input = input_of(args, kwargs)
    if not isinstance(norm, Layer):
        return input, None
    given = dict(zip(("input", "residual", "mask", "lengths"), args, strict=False)) | kwargs
    return input, norm.mask_for(input, given.get("mask"), given.get("lengths"))


def values_per_channel(input: Tensor, mask: Tensor | None = None) -> int:
    """Return the number of values per channel of an input `[N, C, *S]` that count."""
    return input.shape[0] * math.prod(input.shape[2:]) if mask is None else int(mask.sum())


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and without gradients, with compiled parts run eagerly, for hooks."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    is_compiled = any(m._compiled_call_impl is not None or hasattr(m, "dynamo_ctx") for m in modules)
    eagerly = torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
    with torch.no_grad(), eagerly:
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, training in zip(modules, modes, strict=True):
                module.training = training


@contextlib.contextmanager
def holding(held: dict[str, Any], **values: Any) -> Iterator[None]:
    """Make a dict hold other values within the block; after it, it holds what it held, in the same order."""
    before = {name: held[name] for name in values if name in held}
    held.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del held[name]
        held.update(before)
