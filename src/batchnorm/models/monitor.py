"""`monitor`: logs how the batch normalizations of a model do while it is trained."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from batchnorm.doctor.measurements import distance_of_statistics
from batchnorm.doctor.state_checks import dead_channels
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.loggers import Log, Row, check_every, log_function
from batchnorm.statistics.calibration import Accumulator
from batchnorm.statistics.moments import PooledMoments
from batchnorm.torch.contexts.domains import AFFINE, names_of
from batchnorm.torch.functional import moments
from batchnorm.torch.tracing import is_exporting, is_recomputed, is_transforming

from .calibration.observers import received
from .calibration.packing import on_host
from .norms.find import inner_model
from .norms.kinds import BatchNormBase
from .preconditions import verb


@verb()
def monitor(model: nn.Module, log: Log, *, every: int = 100) -> Monitor:
    """Log how each batch normalization of `model` does, at every `every`-th training step.

    A step is a forward of `model` in training mode; a forward that activation checkpointing repeats is none.
    At steps 0, `every`, 2 · `every`, … each layer is observed, and a flat dict of numbers is logged at the
    beginning of the first step behind its backward, or by `remove`. Of `bn/<layer>/` it has

        mean_distance        sqrt(mean((batch mean − running mean)² / (batch var + eps))), over the channels
        std_ratio            exp(sqrt(mean(log(batch std / running std)²))), 1 or more
        values_per_channel   number of values of a channel that the statistics rest on, of this process
        dead_channels        share 0..1 of channels whose weight is 0, or next to 0 beside the others
        weight_grad_norm     Euclidean norm of the gradient of weight (γ) at the step's backward
        bias_grad_norm       the same of bias (β); of domain 1's own, `weight_1_grad_norm` and so on
        skipped              batches with inf or NaN until now, of a layer with nonfinite="skip"

    where the running statistics are those before the step, and var is unbiased. What a layer has not is left
    out: running statistics, a parameter, a backward. Gradients are those of this process, before
    DistributedDataParallel averages them, as they are in `.grad`: times the scale of a GradScaler, and summed
    over micro-batches. Nothing of the training changes, and other steps cost the increment of an integer.

    Under torch.distributed the process of rank 0 logs, and the others do nothing: no collective is called.
    Pass the model that is called: what `torch.compile` or DistributedDataParallel returned. A compiled model
    runs eagerly in the forwards that are observed.

    Args:
        model: with layers of torch, of this library or of subclasses of torch's.
        log: where rows go: a function of (dict, step); a SummaryWriter of TensorBoard, a run of W&B or a
            logger of Lightning; or the path of a CSV file (step, name, value), to which rows are added.
        every: number of steps from one row to the next.

    Returns:
        A handle, which is a context manager too: `remove()` logs what is left, and ends it. Its `step` counts
        from 0; set it to go on counting after a resumed training.

    Raises:
        OptionError: (a ValueError) no batch normalization, or `every` below 1.
        ArgumentTypeError: (a TypeError) `log` is none of these.
        FileError, DataError: (an OSError, a ValueError) the CSV file cannot be written, or has other columns.

    Warns:
        UserWarning: no layer was reached, or no step was seen until `remove`: another model is trained, or
            one that was compiled after this call.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> with batchnorm.monitor(model, lambda row, step: print(step, sorted(row)[-1]), every=2):
        ...     for _ in range(3):
        ...         model(torch.randn(16, 4)).square().mean().backward()
        0 bn/1/weight_grad_norm
        2 bn/1/weight_grad_norm
    """
    check_every(every)
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    observer = StepObserver(model, log, logs=is_alone or distributed.get_rank() == 0)
    return Monitor(model, observer, every)


class Monitor:
    """Logs every n-th forward of a model; `monitor` makes it.

    Attributes:
        step: number of forwards in training mode until now.
        every: number of steps from one row to the next.
    """

    def __init__(self, model: nn.Module, observer: StepObserver, every: int) -> None:
        self.step = 0
        self.every = every
        self._model = model
        self._inner = inner_model(model)
        self._observer: StepObserver | None = observer
        self._handles: list[RemovableHandle] = []
        self._compiled = model._compiled_call_impl
        if self._compiled is not None:  # by model.compile(), within which hooks would be compiled too
            model._compiled_call_impl = self._around(self._compiled)
            return
        self._handles = [
            model.register_forward_pre_hook(_Hook(self._before)),
            model.register_forward_hook(_Hook(self._after), always_call=True),
        ]

    def remove(self) -> None:
        """Log what was observed and not logged yet, and leave the model as it was before `monitor`."""
        if self._observer is None:
            return
        for handle in self._handles:
            handle.remove()
        if self._compiled is not None:
            self._model._compiled_call_impl = self._compiled
        observer, self._observer = self._observer, None
        observer.log()
        if self.step == 0 and sys.exc_info()[0] is None:
            name = type(self._inner).__name__
            warnings.warn(f"monitor saw no forward of {name} in training mode{_COMPILED}", stacklevel=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.remove()

    def _before(self, *_: object) -> None:
        """Count a forward, and observe it if it is its turn."""
        if not self._inner.training or is_recomputed() or self._observer is None:
            return
        step, self.step = self.step, self.step + 1
        if self._observer.is_complete:
            self._observer.log()
        if step % self.every == 0 and not is_exporting():
            self._observer.attach(step)

    def _after(self, *_: object) -> None:
        if self._observer is not None and not is_recomputed():
            self._observer.detach()

    def _around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Return the compiled call of the model with what hooks would do around it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a larger graph has this call
                _warn_compiled()
                return compiled(*args, **kwargs)
            self._before()
            try:
                return compiled(*args, **kwargs)
            finally:
                self._after()

        return call


class StepObserver:
    """Observes what the norms of a model receive in a step, and the gradients of their parameters; logs it.

    Args:
        model: not changed but between `attach` and `log`.
        log: as `monitor` takes it.
        logs: whether this process logs; if not, nothing is observed.

    Raises:
        OptionError: the model has no batch normalization.
        ArgumentTypeError, FileError, DataError: of `log`.
    """

    def __init__(self, model: nn.Module, log: Log, *, logs: bool = True) -> None:
        inner = inner_model(model)
        self.norms = {
            name or type(module).__name__: module
            for name, module in inner.named_modules()
            if isinstance(module, BatchNormBase)
        }
        if not self.norms:
            raise OptionError(f"{type(inner).__name__} has no batch normalization to monitor")
        self._log = log_function(log) if logs else None
        self._step: int | None = None  # which is observed and not logged
        self._clear()
        self._forward = contextlib.ExitStack()
        self._backward = contextlib.ExitStack()

    def attach(self, step: int) -> None:
        """Observe a step: forwards until `detach`, gradients until `log`; one that is not logged yet is."""
        self.log()
        if self._log is None:
            return
        self._clear()
        self._step = step
        if "torch._dynamo" in sys.modules:  # hooks of compiled parts are not called; else nothing is compiled
            with contextlib.suppress(RuntimeError):  # in the midst of a compiled function
                self._forward.enter_context(_compiled_code_left_out())
        for name, norm in self.norms.items():
            hook = functools.partial(self._receive, name)
            handle = norm.register_forward_pre_hook(_Hook(hook), with_kwargs=True)
            self._forward.callback(handle.remove)
            for what in names_of(AFFINE, getattr(norm, "domains", 1)):
                parameter = norm._parameters.get(what)
                if parameter is not None and parameter.requires_grad and not is_lazy(parameter):
                    self._may_learn = True
                    keep = functools.partial(self._keep_gradient, f"{name}/{what}_grad_norm")
                    handle = parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]
                    self._backward.callback(handle.remove)

    @property
    def is_complete(self) -> bool:
        """Whether a step was observed, and its backward has begun unless there is none to come."""
        return self._step is not None and (bool(self._gradients) or not self._may_learn)

    def detach(self) -> None:
        """Observe no more forwards."""
        self._forward.close()

    def log(self) -> None:
        """Log what was observed since `attach`, if anything, and observe no more."""
        self.detach()
        self._backward.close()
        step, self._step = self._step, None
        if step is not None and self._log is not None:
            row = self._row()
            self._clear()
            self._log(row, step)

    def _row(self) -> Row:
        """Return what was observed; this waits for a GPU."""
        if not self._calls and sys.exc_info()[0] is None:
            warnings.warn(f"monitor: no batch normalization was reached{_COMPILED}", stacklevel=4)
        received = Accumulator()
        for call in self._calls:
            for name, moments_of_call in on_host(dict([call])).items():
                received.add(name, moments_of_call)
        row: Row = {}
        for name, norm in self.norms.items():
            found = {**self._of_batch(name, norm, received), **_of_state(norm)}
            row |= {f"{name}/{what}": value for what, value in found.items()}
        row |= {name: float(norm) for name, norm in self._gradients.items()}
        return {f"bn/{name}": value for name, value in row.items()}

    def _clear(self) -> None:
        self._calls: list[tuple[str, PooledMoments]] = []
        self._running: dict[str, tuple[Tensor, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._may_learn = False

    def _receive(self, name: str, norm: BatchNormBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the moments of what a norm receives, and its running statistics before they move."""
        if is_recomputed() or is_transforming():
            return
        mean, var = norm.running_mean, norm.running_var
        with torch.no_grad(), contextlib.suppress(BatchNormError):  # which the norm itself is about to raise
            self._calls.append((name, moments(*received(norm, args, kwargs))))
            if mean is not None and var is not None:
                self._running.setdefault(name, (mean.detach().clone(), var.detach().clone()))

    def _keep_gradient(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and not hasattr(gradient, "full_tensor"):  # a part of one, of FSDP
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._gradients[name] = torch.linalg.vector_norm(gradient.detach(), dtype=wide)

    def _of_batch(self, name: str, norm: BatchNormBase, received: Accumulator) -> Row:
        """Return what the batch shows of a norm."""
        found = received.moments.get(name)
        if found is None:
            return {}
        row = {"values_per_channel": found.count}
        if found.count > 1 and name in self._running:
            mean, var = (statistic.cpu().double().numpy() for statistic in self._running[name])
            batch = found.mean.numpy(), (found.m2 / (found.count - 1)).numpy()
            row["mean_distance"], row["std_ratio"] = distance_of_statistics(*batch, (mean, var), norm.eps)
        return row


def _of_state(norm: BatchNormBase) -> Row:
    """Return what a norm's parameters and buffers show."""
    row: Row = {}
    shares = [
        dead_channels(weight.detach().cpu().double().numpy()).mean()
        for name in names_of(["weight"], getattr(norm, "domains", 1))
        if (weight := norm._parameters.get(name)) is not None
        and not (is_lazy(weight) or hasattr(weight, "full_tensor"))
    ]
    if shares:
        row["dead_channels"] = float(sum(shares) / len(shares))
    if (skipped := norm._buffers.get("skipped")) is not None:
        row["skipped"] = float(skipped)
    return row


class _LeftOut:
    """The monitors that leave compiled code out, and how to end that when the last of them is done."""

    monitors = 0
    stance = contextlib.ExitStack()


@contextlib.contextmanager
def _compiled_code_left_out() -> Iterator[None]:
    """Runs compiled code eagerly in this block; blocks may end in any order, as steps of two monitors do."""
    if _LeftOut.monitors == 0:
        _LeftOut.stance.enter_context(torch.compiler.set_stance("force_eager"))
    _LeftOut.monitors += 1
    try:
        yield
    finally:
        _LeftOut.monitors -= 1
        if _LeftOut.monitors == 0:
            _LeftOut.stance.close()


_COMPILED = ": pass the model that is trained, and compile it before (monitor(torch.compile(model), ...))"


def _warn_compiled() -> int:
    warnings.warn(f"monitor: the model was compiled after it{_COMPILED}", stacklevel=2)
    return 0


_warn_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while torch.compile traces it


class _Hook:
    """A hook of a module that no copy and no file of the module has, and that no compiled graph calls."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            _warn_compiled()
        else:
            self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (_nothing,)


def _nothing(*args: object, **kwargs: object) -> None:
    """Stand in the place of a hook in a copy of the module."""
