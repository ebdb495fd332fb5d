"""BatchNorm1d, BatchNorm2d and BatchNorm3d: the layers of `torch.nn`, with more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, InputShapeError, OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy

from . import paths
from .checks import HALVES, check_activation, check_choice, check_policy, mask_of_lengths
from .contexts.domains import add_domains, check_domains, fill, running_names, select, selected
from .contexts.pool import Pool
from .contexts.recomputed import Memory, may_be_recomputed
from .contexts.scope import Scope
from .moving import NONFINITE
from .naming import qualified_name
from .quantization import refuse_to_fuse
from .settings import Settings, Tracked
from .symbolic import ITSELF, OneNode, is_symbolic

_BATCH = Batch()
# What a layer has for as long as it is in a context, or has a backward before it.
PASSING = ("_memory", "_pool", "_scope", "_domain")


class _Layer(OneNode, nn.modules.batchnorm._BatchNorm):
    """What the three layers share; each also subclasses its stock namesake, so `isinstance` holds."""

    _ranks: ClassVar[tuple[int, ...]]
    activation: str | None = None
    small_batch: str = "raise"
    domains: int = 1
    _statistics: Policy = Batch()
    _nonfinite: str = "propagate"
    _label: str | None = None
    _memory: Memory | None = None
    _pool: Pool | None = None
    _scope: Scope | None = None
    _domain: int | None = None  # whose statistics are in use; None = of 0, in no context

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        statistics: Policy = Batch(),  # noqa: B008 -- frozen
        activation: str | None = None,
        nonfinite: str = "propagate",
        small_batch: str = "raise",
        domains: int = 1,
    ) -> None:
        check_activation(activation)
        check_choice("small_batch", small_batch, ("raise", "running"))
        try:
            check_domains(domains, track_running_stats)
        except BatchNormError as error:
            raise error.at(type(self).__name__) from None
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation
        if affine and not bias:  # the stock constructor takes `bias` in newer releases only
            self.register_parameter("bias", None)
        self._widen_statistics()
        self.statistics = statistics
        self.nonfinite = nonfinite
        if small_batch != "raise":
            self.small_batch = small_batch
        self._add_domains(domains)

    @property
    def statistics(self) -> Policy:
        """Which statistics the layer normalizes by; set it to change that."""
        return self._statistics

    @statistics.setter
    def statistics(self, policy: Policy) -> None:
        try:
            check_policy(policy, self.running_mean is not None and self.running_var is not None)
        except BatchNormError as error:
            raise error.at(qualified_name(self)) from None
        self._statistics = policy
        vars(self).pop("_label", None)
        vars(self).pop("_thawed", None)  # what `unfreeze` would give back

    @property
    def nonfinite(self) -> str:
        """What a batch with inf or NaN does to the running statistics: "propagate", "skip" or "raise"."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        try:
            check_choice("nonfinite", value, NONFINITE)
        except BatchNormError as error:
            raise error.at(qualified_name(self)) from None
        if value != self._nonfinite:
            self._nonfinite = value
        if value == "skip" and self.skipped is None:
            place = next(iter(self.parameters()), self.running_mean)
            device = None if place is None else place.device
            # Not by `register_buffer`, for which the property is in the way; not part of the state.
            self._buffers["skipped"] = torch.zeros((), dtype=torch.long, device=device)
            self._non_persistent_buffers_set.add("skipped")

    @property
    def skipped(self) -> Tensor | None:
        """How many batches with inf or NaN were skipped, an integer tensor; None where none are."""
        return self._buffers.get("skipped")

    def _add_domains(self, domains: int) -> None:
        """Have several running statistics; each starts as those that are there."""
        if domains > 1:
            add_domains(self, domains)
            self.domains = domains

    def reset_running_stats(self) -> None:
        """Set running statistics to mean 0, variance 1, no batches; within `batchnorm.domain` that one's."""
        super().reset_running_stats()
        if self._domain is None:
            for k in range(1, self.domains):
                with selected(self, k):
                    super().reset_running_stats()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the running statistics to mean 0, variance 1, no batches."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return activation(norm(input) + residual), `[N, C, *S]`; see the class."""
        try:
            if lengths is not None:
                if is_symbolic(lengths):
                    raise OptionError(ITSELF)
                if mask is not None:
                    raise OptionError("mask and lengths say the same thing twice: pass one of them")
                mask = mask_of_lengths(lengths, input)
            if self._scope is not None:
                return self._scope.call(self, input, residual, mask)
            return self._normalize(input, residual, mask)
        except BatchNormError as error:
            if torch.compiler.is_compiling():
                raise  # torch then runs the call eagerly, and it comes here again
            raise error.at(qualified_name(self)) from None
        except Exception as error:  # of torch, for what no check looks at: a state that somebody broke
            if not torch.compiler.is_compiling():
                error.add_note(f"This was raised in the layer {qualified_name(self)}.")
            raise

    def mask_for(
        self, input: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return the mask that a call with these arguments would heed, `[N, *S]`: for those who listen."""
        if lengths is not None:
            return mask_of_lengths(lengths, input)
        masked = None if self._scope is None else self._scope.masked
        return masked.of(input) if mask is None and masked is not None else mask

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        policy, training = self._statistics, self.training
        mean, var = self.running_mean, self.running_var
        tracked = Tracked()
        if not training and mean is None and var is None:
            policy, training = _BATCH, True  # as torch.nn: without running statistics, always the batch's
        elif self.track_running_stats or not policy.measures(training):
            tracked = self._tracked()
            if training and (type(policy) is not Batch or self.small_batch != "raise"):
                tracked = tracked._replace(memory=self._recall(policy))
        settings = Settings(
            training, self.eps, self.activation, policy, self._nonfinite, self.small_batch, self._name
        )
        return paths.tracked_batch_norm(input, tracked, self.weight, self.bias, residual, mask, settings)

    def _tracked(self) -> Tracked:
        """Return the running statistics that are in use, and what goes with them."""
        return Tracked(
            self.running_mean,
            self.running_var,
            self.num_batches_tracked if self.track_running_stats else None,
            self.momentum,
            self.skipped,
            None,
            self._pool,
        )

    def _recall(self, policy: Policy) -> Memory | None:
        """Return what remembers the running statistics, if training normalizes by them while they move."""
        is_needed = policy.needs_running or self.small_batch == "running"
        if not is_needed or not policy.measures(training=True) or torch.compiler.is_compiling():
            return None
        if self._memory is None and may_be_recomputed(training=True):
            self._memory = Memory()
        return self._memory

    def _name(self) -> str:
        """Return the name by which other ranks know the layer: that of its first shared call."""
        if self._label is None:
            if torch.compiler.is_compiling():  # nobody may look at the stack
                return f"{type(self).__name__} of {self.num_features} channels"
            self._label = qualified_name(self)
        return self._label

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            remedy = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}.get(input.dim())
            raise InputShapeError(
                f"expected {expected} input (got {input.dim()}D input of shape {list(input.shape)})"
                + (f": {remedy} takes that" if remedy else "")
            )

    def extra_repr(self) -> str:
        """As the stock layer's, and statistics and activation where they are not the stock layer's."""
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self._statistics != Batch():
            shown += f", statistics={self._statistics}"
        if self.domains > 1:
            shown += f", domains={self.domains}"
        return shown if self.activation is None else f"{shown}, activation={self.activation}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `torch.nn.Module._apply`, but running statistics never become 16-bit: they stay float32."""
        before = {name: self._buffers[name] for name in running_names(self.domains)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in HALVES and old.dtype not in HALVES:
                self._buffers[name] = old.to(device=new.device, dtype=torch.float32)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As `torch.nn.Module._save_to_state_dict`: the same within a domain's context as outside."""
        with selected(self, 0):
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As `torch.nn.Module._load_from_state_dict`; 16-bit statistics that it assigned become float32.

        Domains that the state does not have start from its domain 0.
        """
        fill(state_dict, prefix, self)
        with selected(self, 0):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            self._widen_statistics()

    def _widen_statistics(self) -> None:
        for name in running_names(self.domains):
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype in HALVES:
                self._buffers[name] = buffer.float()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a file has of the layer: contexts that it is in are this one's alone."""
        state = {name: value for name, value in vars(self).items() if name not in PASSING}
        if self._domain:
            state["_buffers"] = dict(self._buffers)
            select(state["_buffers"], self._domain, 0)
        return state

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the stock layer that `torch.jit.script` compiles in place of this one: the same tensors.

        torch puts what this returns into the model that is being scripted: script a copy to keep this layer.
        """
        if self.activation is not None:
            raise OptionError(
                f"torch.jit.script cannot compile a layer with activation={self.activation!r}: use "
                "torch.jit.trace or torch.export, or make the activation a module of its own",
                type(self).__name__,
            )
        if self._statistics != Batch():
            raise OptionError(
                f"torch.jit.script cannot compile a layer with statistics={self._statistics}: use "
                "torch.jit.trace or torch.export, or batchnorm.unfreeze a copy in evaluation",
                type(self).__name__,
            )
        if self.domains > 1:
            raise OptionError(
                f"torch.jit.script cannot compile a layer with domains={self.domains}: use torch.jit.trace "
                "or torch.export within batchnorm.domain",
                type(self).__name__,
            )
        stock = next(
            kind for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(self, kind)
        )
        twin = stock.__new__(stock)
        ours = ("activation", "_statistics", *PASSING)
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name not in ours})
        return twin


_DOC = """Batch normalization over {shapes}; drop-in for `torch.nn.{name}`.

        y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)

    In training, mean and var (biased, ÷ n) are the batch's, over all axes but C, and the running statistics
    move: running = (1 - momentum) * running + momentum * batch, with the unbiased variance, ÷ (n - 1). In
    evaluation, mean and var are the running ones. `statistics` names another choice.

    Args:
        num_features: C, the number of channels.
        eps: added to var; positive.
        momentum: fraction 0..1 of a batch in the running statistics; None = their plain average over batches.
        affine: learn weight and bias.
        track_running_stats: keep running statistics; without them, evaluation uses the batch's too.
        device: where parameters and buffers live.
        dtype: of weight and bias; running statistics are float32 at least.
        bias: learn bias too (keyword only).
        statistics: which mean and var (keyword only): `batchnorm.Batch()`, as above, or another policy:
            `Ghost`, `Synced`, `Renorm`, `Running`, `Adapted`. An attribute of the layer; it can be set.
        activation: applied in the same pass (keyword only): relu, relu6, leaky_relu (slope 0.01), silu,
            gelu (erf), hardswish, sigmoid, tanh, elu (α = 1), or None.

        nonfinite: what a batch with inf or NaN does (keyword only): "propagate", as in torch; "skip": the
            running statistics stay, and `skipped` counts it; "raise": NonFiniteError. It can be set.
        small_batch: what one value per channel, or per ghost batch, does in training (keyword only):
            "raise", or "running": it is normalized by the running statistics. It can be set.
        domains: how many running statistics there are (keyword only), one for each domain of the data;
            weight and bias are shared. `batchnorm.domain` says whose are in use; outside of it, those of
            domain 0. They are further buffers, `running_mean_1` and so on. A state that does not have them,
            such as a stock layer's, loads (strict too): they then start from its domain 0.

    Shapes:
        input {shapes}, output the same; `layer(x, residual)` adds a residual of the same shape before the
        activation. `layer(x, mask=)`, without the channels, bool, True = the value counts: the others are in
        no statistic, and come out as 0 with gradient 0, whatever is there. `layer(x, lengths=)`, `[N]`, says
        the same of sequences `[N, C, L]`.

    Raises:
        InputShapeError: (a ValueError and RuntimeError) wrong rank or channels; one value per channel.
        InputTypeError: (a TypeError and RuntimeError) integer input, mixed dtypes or devices.
        OptionError: (a ValueError) eps <= 0 in training, an unknown activation or option, or a policy or
            several domains for a layer without running statistics.
        NonFiniteError: (a FloatingPointError) inf or NaN in training with nonfinite="raise".

    Differs from torch: accurate for any |mean|/std, in every layout; running statistics stay float32 under
    `.half()` and `.bfloat16()`; an empty batch counts, but leaves them alone; an error counts nothing.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shapes="`[N, C]` or `[N, C, L]`")
    _ranks = (2, 3)


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shapes="`[N, C, H, W]`")
    _ranks = (4,)


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shapes="`[N, C, D, H, W]`")
    _ranks = (5,)


for _ours in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    refuse_to_fuse(getattr(nn, _ours.__name__), _ours)
