"""SyncBatchNorm: the drop-in for `torch.nn.SyncBatchNorm`, on CPUs too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import InputShapeError, OptionError
from batchnorm.statistics.synced import Synced

from .checks import check_module
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, _Layer
from .quantization import refuse_to_fuse

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class SyncBatchNorm(_Layer):
    """Batch normalization by the statistics of all ranks; drop-in for `torch.nn.SyncBatchNorm`.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var (biased) are those of the batches of all ranks together, as if one process had
    them. The running statistics move by these, with the unbiased variance, and are the same on all ranks bit
    for bit. In evaluation mean and var are the running ones, and no rank waits for another. It is a
    layer with `statistics=Synced(...)`, for inputs of any number of dimensions; `Synced` has the details.

    Args:
        num_features: C, the number of channels.
        eps: added to var; positive.
        momentum: fraction 0..1 of a batch in the running statistics; None = their plain average over batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics; without them, evaluation uses the rank's own batch.
        process_group: the ranks that share statistics: a group of torch.distributed, or global ranks; None =
            all ranks. The layer stores the ranks only, so it can be copied and saved.
        device, dtype, bias, activation, nonfinite, small_batch, domains, domain_affine, warm_start: as of
            `batchnorm.BatchNorm2d`.

    Shapes:
        input `[N, C, *S]`, output the same; ranks may have different N and S, and empty batches.

    Raises:
        InputShapeError: (a ValueError and RuntimeError) less than two dimensions, or wrong channels.
        RankError: (a RuntimeError) another rank did not come to this layer in time, or came to another one.

    Example:
        >>> norm = batchnorm.SyncBatchNorm(8)
        >>> y = norm(torch.randn(16, 8, 5, 5))  # without torch.distributed, this process is the only rank

    Differs from torch: it runs on CPUs (Gloo) and on GPUs (NCCL); it takes one collective each way; counts
    are exact for masks and uneven batches; ranks exchange float64; it does not subclass torch's
    SyncBatchNorm, which DDP refuses on a CPU.

    Source: Peng et al. 2018, arXiv:1711.07240; https://github.com/pytorch/pytorch/issues/36530.
    """

    _ranks = ()
    _statistics = Synced()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        nonfinite: str = "propagate",
        small_batch: str = "raise",
        domains: int = 1,
        domain_affine: bool = False,
        warm_start: bool = False,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            statistics=Synced(ranks_of(process_group)),
            activation=activation,
            nonfinite=nonfinite,
            small_batch=small_batch,
            domains=domains,
            domain_affine=domain_affine,
            warm_start=warm_start,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise InputShapeError(f"expected at least 2D input (got {input.dim()}D input)")

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any | None = None) -> nn.Module:
        """Turn the batch normalizations of a model into layers of this class, in place.

        Each layer stays the same module object with its parameters, buffers, hooks and modes, as with
        `batchnorm.convert`; `convert(model, batchnorm.Synced())` also keeps its class, which checks the
        number of dimensions of its input.

        Args:
            module: a model, or a batch normalization itself.
            process_group: as of the class.

        Returns:
            `module`.

        Raises:
            OptionError: (a ValueError) a layer is of a subclass of a stock layer, which may compute something
                else; the error names it, and nothing has changed.

        Differs from torch: torch replaces such layers silently, and makes new modules.

        Source: https://github.com/pytorch/pytorch/issues/187298 (subclasses dropped silently).
        """
        check_module(module, "convert_sync_batchnorm")
        policy = Synced(ranks_of(process_group))
        norms = {
            m: name for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }
        for norm, name in norms.items():
            if type(norm) not in (*_PLAIN, *_OURS, nn.SyncBatchNorm, SyncBatchNorm):
                raise OptionError(
                    "a subclass whose forward may compute something else, so the model is left as it is",
                    f"{name} ({type(norm).__qualname__})" if name else type(norm).__qualname__,
                )
        for norm in norms:
            become_synced(norm, policy)
        return module


for _stock in _PLAIN:
    refuse_to_fuse(_stock, SyncBatchNorm)


def become_synced(norm: nn.Module, policy: Synced) -> None:
    """Turn a stock layer or one of ours into a SyncBatchNorm; the module stays the same object."""
    norm.__class__ = SyncBatchNorm
    assert isinstance(norm, SyncBatchNorm)
    vars(norm).pop("process_group", None)
    norm._widen_statistics()
    norm.statistics = policy


def ranks_of(process_group: Any) -> tuple[int, ...] | None:
    """Return the global ranks of a process group, or of a list of ranks; None = all."""
    if process_group is None or isinstance(process_group, list | tuple | range):
        return None if process_group is None else tuple(process_group)
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise OptionError(
            "a process group, and torch.distributed is not initialized: init_process_group first"
        )
    if process_group is torch.distributed.group.WORLD:
        return None
    try:
        return tuple(torch.distributed.get_process_group_ranks(process_group))
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError):
        raise OptionError(
            f"process_group must be a group of torch.distributed or a list of ranks; got {process_group!r}"
        ) from None
