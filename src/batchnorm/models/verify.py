"""Whether a changed model still does what it did: it runs on an example before and after, in both modes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from batchnorm.errors import BatchNormError, OptionError

from .rollback import Snapshot, untouched_on_error

# Largest |difference| of an output over its largest |value|, by the coarsest dtype in play. What rounds
# differently in one layer is amplified by those behind it, in training above all: tens of layers with the
# statistics of a few samples multiply an ulp by thousands. A wrong change moves outputs by tenths.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class AgreementError(BatchNormError, ArithmeticError):
    """A changed model does not give the outputs of the original; the change was taken back."""


@dataclass(frozen=True)
class Behaviour:
    """The outputs of a model on an example.

    Attributes:
        values: outputs in evaluation, outputs in training, and after training what modules keep and do not
            learn, floating; by name.
        unchecked: why training could not be run; "" where it could.
        names: of the modules, by which what they keep is named.
    """

    values: dict[str, Tensor]
    unchecked: str
    names: dict[nn.Module, str]


@contextlib.contextmanager
def checked_change(model: nn.Module, example: object, verb: str) -> Iterator[None]:
    """Let the block change a model: taken back if it raises, or if an example then gives other outputs.

    Args:
        model: what the block changes.
        example: as of `call`; None = nothing is compared.
        verb: who changes it, for messages.

    Raises:
        AgreementError: the outputs on the example differ.

    Warns:
        UserWarning: the model cannot run in training on the example; only evaluation was compared.
    """
    before = None if example is None else observe(model, example)
    if before is not None and before.unchecked:  # told before anything changes: a warning may be an error
        warnings.warn(
            f"{verb}: {before.unchecked}", UserWarning, stacklevel=5
        )  # contextlib, the verb and what checks for it, its user
    with untouched_on_error(model):
        yield
        if before is not None:
            assert_agree(before, model, example, verb)


def observe(
    model: nn.Module, example: object, names: dict[nn.Module, str] | None = None, *, training: bool = True
) -> Behaviour:
    """Run a model on an example in evaluation and, with `training`, in training; leave it as it was.

    Args:
        model: what runs.
        example: as of `call`.
        names: of its modules; None = as they are now. A verb may move a module, which is still the same one.

    Raises:
        OptionError: a layer is not initialized yet, or the output has no floating tensor.
        Exception: what the model itself raises in evaluation.
    """
    names = names or {module: name for name, module in model.named_modules()}
    values: dict[str, Tensor] = {}
    unchecked = ""
    for is_training in (False, True) if training else (False,):
        mode = "training" if is_training else "evaluation"
        with restored(model), torch.no_grad():
            set_mode(model, is_training)
            try:
                outputs = call(model, example)
            except Exception as error:
                if not is_training:
                    raise
                unchecked = (
                    f"not compared in training, where the model raises {type(error).__name__}: {error}"
                )
                break
            values |= {f"output {path} in {mode}": value for path, value in _tensors(outputs)}
            if any(value.is_meta for value in values.values()):
                raise OptionError(
                    "the model is on the meta device, so that there are no values to compare: pass no example"
                )
            if is_training:
                values |= {f"{name} after training": kept for name, kept in _kept(model, names)}
    if not values:
        raise OptionError("the model's output on the example has no floating tensor: nothing can be compared")
    return Behaviour(values, unchecked, names)


def assert_agree(
    before: Behaviour, model: nn.Module, example: object, verb: str, *, training: bool = True
) -> None:
    """Raise AgreementError unless `model` still gives on the example what it gave before."""
    try:
        after = observe(model, example, before.names, training=training)
    except Exception as error:
        raise AgreementError(
            f"{verb} was taken back: on the example the changed model raises {type(error).__name__}: {error}"
        ) from error
    tolerance = max(_TOLERANCE.get(value.dtype, 0.0) for value in before.values.values())
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        tolerance = max(tolerance, _TOLERANCE[torch.bfloat16])
    for name, old in before.values.items():
        new = after.values.get(name)
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise AgreementError(f"{verb} was taken back: {name} has another form than before")
        scale = _scale(name, before.values)
        allowed = max(tolerance * (scale or 1.0), torch.finfo(old.dtype).tiny)
        is_same = torch.allclose(new, old, rtol=0.0, atol=allowed, equal_nan=True)
        if not is_same:
            off = (new.double() - old.double()).abs().max().item()
            raise AgreementError(
                f"{verb} was taken back: {name} is off by {off:.3g}, where the largest value is {scale:.3g}; "
                f"at most {tolerance:g} of that is rounding"
            )


def _scale(name: str, values: dict[str, Tensor]) -> float:
    """Return the largest magnitude of a value; of a running mean, at least the deviation beside it."""
    value = values[name]
    scale = value[value.isfinite()].abs().max().item() if value.isfinite().any() else 0.0
    var = values.get(name.replace("running_mean", "running_var")) if "running_mean" in name else None
    return scale if var is None or not var.numel() else max(scale, var.max().clamp(min=0).sqrt().item())


def call(model: nn.Module, example: object) -> object:
    """Call a model on an example: a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def set_mode(model: nn.Module, training: bool) -> None:
    """Set training mode or evaluation of every module, whatever `train` does in a subclass."""
    for module in model.modules():
        module.training = training


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put back after the block what running the model changes in it, and the state of random numbers.

    Raises:
        OptionError: a layer is not initialized yet.
        BatchNormError: something cannot be put back; all else is.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise OptionError("the model has layers that are not initialized: run it once, or pass no example")
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
    snapshot = Snapshot(model)
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        snapshot.put_back()


def _kept(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[tuple[str, Tensor]]:
    for module in model.modules():
        constants = {n: p for n, p in module._parameters.items() if p is not None and not p.requires_grad}
        for name, tensor in {**module._buffers, **constants}.items():
            if module in names and tensor is not None and tensor.is_floating_point():
                yield f"{names[module]}.{name}".lstrip("."), _values(tensor)


def _tensors(outputs: object) -> list[tuple[str, Tensor]]:
    found = []
    for path, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            found.append((pytree.keystr(path), _values(leaf)))
    return found


def _values(tensor: Tensor) -> Tensor:
    values = tensor.detach()
    return values.clone() if values.layout is torch.strided else values.to_dense()
