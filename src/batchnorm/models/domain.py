"""`domain`: a context that selects one domain's running statistics in all layers of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.torch.checks import check_module
from batchnorm.torch.contexts.domains import selected

from .contexts import scoped
from .norms.find import find_norms
from .norms.kinds import Layer


@contextlib.contextmanager
def domain(model: nn.Module, k: int) -> Iterator[None]:
    """Select, within the block, the running statistics of domain `k` in layers with several domains.

    The domains share weight and bias. Within the block, `running_mean`, `running_var` and
    `num_batches_tracked` of a layer are those of the domain, also for `calibrate`, `inspect`, `fold` and all
    other code. States, copies and files are the same as outside. Layers with one domain are not affected. Of
    nested blocks, the inner one holds.

    Args:
        model: with layers that were made with `domains=n`, or by `convert(model, domains=n)`; or one of them.
        k: 0 to n - 1; outside of any such block it is 0.

    Raises:
        OptionError: (a ValueError) no layer with several domains; or one that has no domain `k`, by name.
        RecomputeError: (in the backward; a RuntimeError) activation checkpointing recomputes a forward, and
            several forwards may be meant.

    Example:
        >>> norm = batchnorm.BatchNorm2d(8, domains=2)
        >>> with batchnorm.domain(norm, 1):
        ...     y = norm(torch.randn(4, 8, 5, 5))  # moves the running statistics of domain 1
        >>> norm.running_mean.any()  # those of domain 0
        tensor(False)

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
    for name, layer in layers.items():
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k < layer.domains:
            count = layer.domains
            raise OptionError(f"domain must be 0 to {count - 1}, as it has {count}; got {k!r}", name)
    with contextlib.ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(scoped(layer))
            stack.enter_context(selected(layer, k))
        yield
