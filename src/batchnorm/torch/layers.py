"""Defines BatchNorm1d, BatchNorm2d and BatchNorm3d: drop-ins for the layers of `torch.nn`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, InputShapeError, OptionError
from batchnorm.kernels.interface import RunningState
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policy import Policy

from .autograd import normalize_plain
from .call import NO_RUNNING_STATE, Call
from .checks import (
    check_activation,
    check_nonfinite,
    check_small_batch,
    check_warm_start,
    mask_of_lengths,
    not_a_tensor,
)
from .contexts.checkpointing import Memory
from .contexts.domains import (
    add_affine,
    add_domains,
    affine_of,
    check_domain_affine,
    check_domains,
    fill,
    selected,
)
from .dispatch import batch_norm, may_repeat_plain, plain_call
from .quantization import refuse_to_fuse
from .running_stats import may_begin
from .scripted import stock_twin
from .stored_state import StoredState, qualified_name
from .symbolic import ITSELF, is_symbolic
from .tracing import may_be_recomputed, may_hide_addresses

if TYPE_CHECKING:
    from batchnorm.kernels.cpu.plain_call import PlainCall

_BATCH = Batch()


class _Layer(StoredState):
    """Base of the three layers; each also subclasses its stock namesake, so that `isinstance` holds."""

    _ranks: ClassVar[tuple[int, ...]]
    _memory: Memory | None = None
    _plain: PlainCall | None = None
    _learned: dict[str, bool]  # which parameters learned before `freeze`
    _activation_at: tuple[nn.Module, ...]  # the modules that applied the activation before `fuse`

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
        domain_affine: bool = False,
        warm_start: bool = False,
    ) -> None:
        check_activation(activation)
        try:
            check_small_batch(small_batch, track_running_stats)
            check_nonfinite(nonfinite, track_running_stats)
            check_domains(domains, track_running_stats)
            check_domain_affine(domain_affine, domains, affine)
            check_warm_start(warm_start, track_running_stats)
        except BatchNormError as error:
            raise error.at(type(self).__name__) from None
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation
        if affine and not bias:  # the stock constructor takes `bias` in newer releases only
            self.register_parameter("bias", None)
        self._widen_statistics()
        self.statistics = statistics
        self.nonfinite = nonfinite
        self.small_batch = small_batch
        self.warm_start = warm_start
        self._add_domains(domains, domain_affine)

    def _add_domains(self, domains: int, affine: bool) -> None:
        """Add domains up to a number, and weight and bias of each if asked for: copies of domain 0."""
        if self.domains == 1 < domains:
            add_domains(self, domains)
            self.domains = domains
        if affine and not self.domain_affine:
            add_affine(self)

    def reset_running_stats(self) -> None:
        """Set the running statistics in use to mean 0, variance 1, no batches; frozen ones stay as they are.

        In use are those of the domain of `batchnorm.domain`; outside of it, those of domain 0.
        """
        if self._statistics.moves(training=True):
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        """Set weight 1, bias 0, and running statistics of mean 0, variance 1, no batches, in all domains."""
        for k in range(self.domains):
            with selected(self, k):
                super().reset_running_stats()
                weight, bias = affine_of(self).values()
                if weight is not None:
                    nn.init.ones_(weight)
                if bias is not None:
                    nn.init.zeros_(bias)
        self._start_counting()

    if TYPE_CHECKING:  # a module's call is Any to type checkers

        def __call__(
            self,
            input: Tensor,
            residual: Tensor | None = None,
            mask: Tensor | None = None,
            lengths: Tensor | None = None,
        ) -> Tensor: ...

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
                raise  # torch then runs the call eagerly, and the eager call names the layer
            raise error.at(qualified_name(self)) from None
        except Exception as error:  # of torch, where no check looks: a damaged state, for one
            if not isinstance(input, Tensor):
                raise not_a_tensor(input).at(qualified_name(self)) from None
            if not torch.compiler.is_compiling():
                error.add_note(f"This was raised in the layer {qualified_name(self)}.")
            raise

    def mask_for(
        self, input: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor | None:
        """Return the mask that a call with these arguments uses, `[N, *S]`; `calibrate` asks for it."""
        if lengths is not None:
            return mask_of_lengths(lengths, input)
        masked = None if self._scope is None else self._scope.masked
        return masked.of(input) if mask is None and masked is not None else mask

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None = None) -> Tensor:
        parameters: Mapping[str, Tensor | None] = affine_of(self) if self.domain_affine else self._parameters
        if mask is None and may_repeat_plain():
            plain = self._plain
            if (
                plain is not None
                and plain.training is self.training
                and plain.momentum == self.momentum
                and plain.eps == self.eps
                and plain.activation == self.activation
                and type(self._statistics) is Batch
                and self._nonfinite == "propagate"
                and self._accumulator is None
                and self.track_running_stats
                and plain.takes(input, residual, parameters, self._buffers)
                and not (self._warm_start and self.training and may_begin(*plain.tensors[2:4]))
            ):
                try:
                    return normalize_plain(plain, input, residual)
                except RuntimeError:
                    if not may_hide_addresses(input):
                        raise
        self._check_input_dim(input)
        policy, training = self._statistics, self.training
        try:  # as torch's attributes, but in a tenth of the time
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # parametrized, or sharded by FSDP
            weight, bias = self.weight, self.bias
        running = self._running_state()
        if running.mean is None and running.var is None and not training:
            policy, training = _BATCH, True  # as torch.nn: without running statistics, always the batch's
            running = NO_RUNNING_STATE
        elif not self.track_running_stats and policy.measures(training):
            running = NO_RUNNING_STATE
        elif training and (type(policy) is not Batch or self._small_batch != "raise"):
            running = running._replace(memory=self._recall(policy))
        call = Call(
            input,
            weight,
            bias,
            residual,
            mask,
            self.activation,
            self.eps,
            None if type(policy) is Batch else policy.groups(training),
            running,
            policy,
            training,
            self._nonfinite if self.training else "propagate",
            self._small_batch,
            self._name,
        )
        plain = plain_call(call)
        if plain is None:
            return batch_norm(call)
        self._plain = plain
        return normalize_plain(plain, input, residual)

    def _running_state(self) -> RunningState:
        """Return the running statistics that are in use, with their counts and options."""
        buffers = self._buffers
        try:
            mean, var = buffers["running_mean"], buffers["running_var"]
            batches = buffers["num_batches_tracked"] if self.track_running_stats else None
        except KeyError:  # they are attributes, and no buffers
            mean, var = self.running_mean, self.running_var
            batches = self.num_batches_tracked if self.track_running_stats else None
        return RunningState(
            mean,
            var,
            batches,
            self.momentum,
            self.skipped if self._nonfinite == "skip" else None,
            self._statistics.is_sequential,
            None,
            self._accumulator,
            self._warm_start and may_begin(mean, var),
        )

    def _recall(self, policy: Policy) -> Memory | None:
        """Return the memory of the running statistics, if training normalizes by them while they move."""
        is_needed = policy.needs_running or self._small_batch == "running"
        if not is_needed or not policy.measures(training=True) or torch.compiler.is_compiling():
            return None
        if self._memory is None and may_be_recomputed(training=True):
            self._memory = Memory()
        return self._memory

    def _name(self) -> str:
        """Return the name by which other ranks know the layer: that of its first shared call."""
        if self._label is None:
            if torch.compiler.is_compiling():  # the compiler cannot trace a look at the stack
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
        """As the stock layer's, and the options that no stock layer has."""
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return shown + "".join(f", {name}={value}" for name, value in beyond_stock(self).items())

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As `torch.nn.Module._save_to_state_dict`: the same within a domain's context as outside."""
        with selected(self, 0):
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As `torch.nn.Module._load_from_state_dict`; domains that it lacks start from its domain 0."""
        fill(state_dict, prefix, self)
        with selected(self, 0):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the stock layer that `torch.jit.script` compiles in place of this one: the same tensors.

        torch puts what this returns into the model that is being scripted: script a copy to keep this layer.
        """
        return stock_twin(self, forward=_Layer.forward, own=OURS, options=OPTIONS, changed=beyond_stock(self))


# Attributes of our layers that no stock layer has; and options, each with the value that is stock's way.
OURS = (*StoredState.__annotations__, *_Layer.__annotations__)
OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(_Layer.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "bias"  # a stock layer's bias can be None, too
}


def beyond_stock(layer: nn.Module) -> dict[str, Any]:
    """Return the options of a layer, or of its lazy form, that no stock layer has."""
    found = {name: getattr(layer, name, usual) for name, usual in OPTIONS.items()}
    return {name: value for name, value in found.items() if value != OPTIONS[name]}


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
        domains: how many running statistics there are (keyword only), one for each domain of the data.
            `batchnorm.domain` says whose are in use; outside of it, those of domain 0. They are further
            buffers, `running_mean_1` and so on. A state that does not have them, such as a stock layer's,
            loads (strict too): they then start from its domain 0.
        domain_affine: learn a weight and bias for each domain too (keyword only); False = all share one.
            They are further parameters, `weight_1` and so on, of which a step moves those of the domains
            that were used. States load as above.
        warm_start: let the first batch replace the initial running statistics (keyword only), where momentum
            would keep 1 - momentum of their 0 and 1: a channel whose running mean is 0 and variance 1 takes
            the batch's own. It can be set.

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

    Example:
        >>> norm = batchnorm.{name}(8, activation="relu")
        >>> y = norm(torch.randn({size}))

    Differs from torch: accurate for any |mean|/std, in every layout; running statistics stay float32 under
    `.half()` and `.bfloat16()`; an empty batch counts, but leaves them alone; an error counts nothing.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d", shapes="`[N, C]` or `[N, C, L]`", size="16, 8")
    _ranks = (2, 3)


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d", shapes="`[N, C, H, W]`", size="16, 8, 5, 5")
    _ranks = (4,)


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d", shapes="`[N, C, D, H, W]`", size="16, 8, 5, 5, 5")
    _ranks = (5,)


for _ours in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    refuse_to_fuse(getattr(nn, _ours.__name__), _ours)
