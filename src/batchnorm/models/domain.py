"""`domain`: a context that selects a domain in all layers of a model: its running statistics, its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from batchnorm.errors import InputShapeError, InputTypeError, OptionError
from batchnorm.torch.checks import check_module
from batchnorm.torch.contexts.domains import selected
from batchnorm.torch.contexts.samples import Samples

from .contexts import scoped
from .norms.find import find_norms
from .norms.kinds import Layer


@contextlib.contextmanager
def domain(model: nn.Module, k: int | Tensor) -> Iterator[None]:
    """Select, within the block, the running statistics of domain `k` in layers with several domains.

    Within the block, `running_mean`, `running_var` and `num_batches_tracked` of a layer are those of the
    domain, also for `calibrate`, `inspect`, `fold` and all other code. The domains share weight and bias;
    a layer with `domain_affine=True` uses its `weight_1` and `bias_1` in domain 1, and so do these verbs.
    Parameters keep their names within the block. States, copies and files are the same as outside. Layers
    with one domain are not affected. Of nested blocks, the inner one holds.

    With a tensor, sample n of every batch in the block is of domain `k[n]`. Each layer calls itself for the
    samples of each domain apart, so that output, gradients and statistics are those of a call per domain.
    Whatever else reads `running_mean` finds what it finds outside, and verbs are refused. A domain without a
    sample in the batch stays as it is.

    Args:
        model: with layers that were made with `domains=n`, or by `convert(model, domains=n)`; or one of them.
        k: 0 to n - 1; outside of any such block it is 0. Or a domain for each sample: `[N]` integers, read
            once.

    Raises:
        OptionError: (a ValueError) no layer with several domains; or one that has no domain `k`, by name.
        InputTypeError: (a TypeError and RuntimeError) a tensor that has no integers.
        InputShapeError: (a ValueError and RuntimeError) a tensor that is not `[N]`; in the forward, by name,
            a layer whose input has another number of samples.
        RecomputeError: (in the backward; a RuntimeError) activation checkpointing recomputes a forward, and
            several forwards may be meant.

    Example:
        >>> norm = batchnorm.BatchNorm2d(8, domains=2)
        >>> with batchnorm.domain(norm, 1):
        ...     y = norm(torch.randn(4, 8, 5, 5))  # moves the running statistics of domain 1
        >>> norm.running_mean.any()  # those of domain 0
        tensor(False)
        >>> with batchnorm.domain(norm, torch.tensor([0, 0, 1, 1])):
        ...     y = norm(torch.randn(4, 8, 5, 5))  # two samples of each domain

    Source: Chang et al. 2019, arXiv:1906.03950; https://github.com/pytorch/pytorch/issues/76613.
    """
    check_module(model, "domain")
    layers = {
        str(found): found.module
        for found in find_norms(model)
        if isinstance(found.module, Layer) and found.module.domains > 1
    }
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no batch normalization with several domains: make its layers with "
            "domains=n, or batchnorm.convert(model, domains=n)"
        )
    samples = _samples(k) if isinstance(k, Tensor) else None
    for name, layer in layers.items():
        for one in [k] if samples is None else samples.places:
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < layer.domains:
                count = layer.domains
                raise OptionError(f"domain must be 0 to {count - 1}, as it has {count}; got {one!r}", name)
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            scope = stack.enter_context(scoped(layer))
            stack.callback(setattr, scope, "samples", scope.samples)
            scope.samples = samples
            if not isinstance(k, Tensor):
                stack.enter_context(selected(layer, k))
        yield


def _samples(ids: Tensor) -> Samples:
    """Return the domains of samples, or raise an error for a tensor that does not say them."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputTypeError(f"domains of samples must be a tensor of integers, [N]; got {ids.dtype}")
    if ids.dim() != 1:
        raise InputShapeError(f"domains of samples must be one for each, [N]; got shape {list(ids.shape)}")
    return Samples(ids)
