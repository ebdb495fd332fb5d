"""Time of one layer on a device, ours and its rivals interleaved."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from batchnorm.kernels.choose import choose
from benchmarks.layer_rivals import MODULES, Tensors, is_available, tensors
from benchmarks.layer_time import row
from benchmarks.tables import Row

from .clocks import clock
from .layer_cases import DeviceCase
from .turns import built, take_turns

MOST_ROUNDS = 51
# Largest |ours - stock's| / |stock's|, norms of vectors. In bfloat16 stock rounds norm and sum one after the
# other: of sums near 0 some get another sign, and another gradient behind the ReLU.
AGREEMENT = {"bfloat16": 0.1, "float32": 1e-3}


class LayerStep:
    """Forward and backward of a module on the tensors of a case; weights and biases are not 1 and 0."""

    def __init__(
        self,
        model: nn.Module,
        given: Tensors,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model.to(given.x.device).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():  # float32, as under autocast
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        self.dy, self.around = given.dy, around
        inputs = [tensor for tensor in (given.x, given.residual) if tensor is not None]
        self.leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        self.with_gradient = [*self.leaves, *self.model.parameters()]

    def __call__(self) -> None:
        """Take a step; what it allocates is freed within its time."""
        with self.around():
            torch.autograd.backward(self.model(*self.leaves), self.dy)
        for tensor in self.with_gradient:
            tensor.grad = None

    def results(self) -> list[Tensor]:
        """Return y and every gradient."""
        with self.around():
            y = self.model(*self.leaves)
            found = [y.detach(), *torch.autograd.grad(y, self.with_gradient, self.dy)]
        if y.is_cuda:
            torch.cuda.synchronize()  # else its errors would be those of who comes next
        return found


def _without_cudnn() -> AbstractContextManager[None]:
    found: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False)
    return found


def _compiled(case: DeviceCase, given: Tensors) -> LayerStep:
    if given.x.is_cpu and not is_available("compiled"):
        raise RuntimeError("torch.compile finds no C++ compiler")
    torch.compiler.reset()  # else the ninth layer would be one too many for the compiler's cache
    step = LayerStep(MODULES["stock"](case), given)
    step.model = torch.compile(step.model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    return step


def _plain(name: str) -> Callable[[DeviceCase, Tensors], LayerStep]:
    return lambda case, given: LayerStep(MODULES[name](case), given)


BUILD: dict[str, Callable[[DeviceCase, Tensors], LayerStep]] = {
    **{name: _plain(name) for name in MODULES},
    "stock-native": lambda case, given: LayerStep(MODULES["stock"](case), given, _without_cudnn),
    "compiled": _compiled,
}


def measured(case: DeviceCase) -> Row:
    """Return a case's row; a rival that fails has its reason there in place of its time."""
    failed: dict[str, str] = {}
    given = tensors(case, case.device)
    steps = built({name: functools.partial(BUILD[name], case, given) for name in case.rivals}, failed)
    facts = {
        "engine": choose(given.x).name,
        "stock_runs": _stock_runs(steps),
        "differs": _check_agreement(case, steps, failed),
    }
    times, host = _times(case, steps, given, failed)
    if "copy" not in times:
        first, why = next(iter(failed.items()))
        return case.fields() | {"missing": f"after {first} failed, nothing ran: {why}"}
    found = row(case, times)
    for name, taken in host.items():
        if name in found["rivals"]:
            found["rivals"][name]["host_seconds"] = statistics.median(taken[-len(times[name]) :])
    return found | {"regime": case.regime, "rounds": len(times["copy"]), **facts, "failed": failed}


def _times(
    case: DeviceCase, steps: dict[str, LayerStep], given: Tensors, failed: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    watch, target = clock(case.device), torch.empty_like(given.dy)
    taking = {**steps, "copy": lambda: target.copy_(given.dy)}
    host: dict[str, list[float]] = {name: [] for name in taking}
    rivals = {name: watch.of_layer(step, host[name]) for name, step in taking.items()}
    return take_turns(rivals, case.seconds, MOST_ROUNDS, failed), host


def _stock_runs(steps: dict[str, LayerStep]) -> dict[str, str]:
    """Return what torch ran as a norm: where it takes cuDNN, and where not, it decides itself."""
    found: dict[str, str] = {}
    for name in ("stock", "stock-native"):
        if name in steps:
            step = steps[name]
            with step.around():
                node = step.model.norm(step.leaves[0]).grad_fn  # type: ignore[operator]
            found[name] = node.name().removesuffix("Backward0")
    return found


def _check_agreement(case: DeviceCase, steps: dict[str, LayerStep], failed: dict[str, str]) -> float | None:
    """Return by how much ours differs from stock, the largest over y and gradients; too much is a failure."""
    if not {"stock", "ours"} <= steps.keys():
        return None
    found = built({name: steps[name].results for name in ("stock", "ours")}, failed)
    if len(found) < len(("stock", "ours")):
        return None
    differs = max(
        ((ours.float() - stock.float()).norm() / stock.float().norm()).item()
        for ours, stock in zip(found["ours"], found["stock"], strict=True)
    )
    if not differs <= AGREEMENT[case.dtype]:  # NaN too
        failed["ours"] = f"it differs from stock by {differs:.2g}, and may by {AGREEMENT[case.dtype]:g}"
    return differs
