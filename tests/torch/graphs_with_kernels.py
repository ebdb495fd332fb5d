"""Write what `torch.compile` sees of layers on a GPU, as JSON, without one: the launches in its graphs.

Tensors are on the device `meta`, which autograd knows without a driver, and which stands for a GPU's here.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from triton.runtime import driver

import batchnorm
from batchnorm.kernels import choose, use
from batchnorm.kernels.gpu import engine as gpu
from batchnorm.kernels.gpu import launches
from tests.kernels.compile_for_gpu import Hopper
from tests.support.primitives import Primitives

engine = Primitives(gpu)

Launches = list[dict[str, Any]]


def launches_in(graph: torch.fx.GraphModule) -> Launches:
    return [_launch(node) for node in graph.graph.nodes if "triton_kernel" in str(node.target)]


def _launch(node: torch.fx.Node) -> dict[str, Any]:
    tuned: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
    arguments = {**node.kwargs["kwargs"], **constants}
    numbers = {name: value for name, value in arguments.items() if not isinstance(value, torch.fx.Node)}
    return {
        **told(tuned.fn, node.kwargs["grid"][0][0], tuned.configs[0].num_warps, numbers),
        "writes": sorted(node.kwargs["tensors_to_clone"]),
        "rounded": sorted(rounded(tuned.fn, numbers)),
        "source": user_defined_triton_kernel_transitive_closure_source_code(tuned.fn),
    }


def told(kernel: Any, programs: int, warps: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a launch but its tensors."""
    numbers = {name: str(value) for name, value in arguments.items() if not isinstance(value, Tensor)}
    return {"kernel": kernel.__name__, "programs": programs, "warps": warps, "numbers": numbers}


def rounded(kernel: Any, numbers: dict[str, Any]) -> list[str]:
    """Arguments that are no constants of a kernel and no float32: Inductor passes every float as one."""
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    floats = {n: v for n, v in numbers.items() if isinstance(v, float) and n not in constant}
    return [
        name for name, value in floats.items() if torch.tensor(value, dtype=torch.float32).item() != value
    ]


def seen(layer: nn.Module, x: Tensor, *more: Tensor, dynamic: bool = False, **options: Any) -> dict[str, Any]:
    """Return the launches in the graphs of a step, the operators of ours in them, and what eager launches."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    y = compiled(x.requires_grad_(), *more, **options)
    y.backward(torch.empty_like(y))
    operators = [str(n.target) for graph in graphs for n in graph.graph.nodes if n.op == "call_function"]
    return {
        "launches": [launch for graph in graphs for launch in launches_in(graph)],
        "opaque": [name for name in operators if name.startswith("batchnorm.")],
        "copies": [name for name in operators if "clone" in name or "copy_" in name],
        "stored": operators.count("aten.as_strided.default"),
        "eager": eager_launches(layer, x, *more, **options),
    }


def eager_launches(layer: nn.Module, x: Tensor, residual: Tensor | None = None, **options: Any) -> Launches:
    """Return the launches of the engine for the same step, without a compiler."""
    found: Launches = []

    def keep(kernel: Any, programs: int, warps: int, on: Tensor, arguments: dict[str, Any]) -> None:
        del on
        found.append(told(kernel, programs, warps, arguments))

    launch, parameters = gpu.launch, (layer.weight, layer.bias)
    gpu.launch = launches.launch = keep  # type: ignore[assignment]
    options |= {"residual": residual, "activation": layer.activation}
    if layer.training:
        _, (_, mean, _), rstd = engine.forward(x, layer.eps, *parameters, **options)
    else:
        mean, rstd = (torch.empty(1, x.shape[1], dtype=torch.float64, device="meta") for _ in range(2))
        engine.normalize(x, mean, rstd, *parameters, **options)
    engine.backward(x, torch.empty_like(x), mean, rstd, not layer.training, *parameters, **options)
    gpu.launch = launches.launch = launch
    return found


def image(**options: Any) -> Tensor:
    return torch.empty(16, 64, 28, 28, device="meta", **options)


def main() -> None:
    driver.set_active(Hopper())
    choose._GPUS = frozenset({"meta"})
    relu = batchnorm.BatchNorm2d(64, activation="relu", device="meta")
    last = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    table = torch.empty(32, 8, device="meta")
    small = batchnorm.BatchNorm1d(8, activation="silu", eps=1e-3, device="meta")
    mask = torch.empty(16, 28, 28, dtype=torch.bool, device="meta")
    strict = batchnorm.BatchNorm1d(8, nonfinite="raise", device="meta")
    with contextlib.redirect_stdout(sys.stderr):
        found = {
            "parts": seen(relu, image(**last), image(**last)),
            "whole": seen(small, table),
            "mask": seen(relu, image(), mask=mask),
            "given": seen(relu.eval(), image(**last)),
            "symbols": seen(small, table, dynamic=True),
            "strict": seen(strict, table),
        }
        with use("eager"):
            found["asked"] = seen(small, table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
