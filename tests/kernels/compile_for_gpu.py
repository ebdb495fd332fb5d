"""Compile every kernel for a GPU, without one: an engine's calls, whose launches end after compilation."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from batchnorm.kernels.gpu import engine as gpu
from batchnorm.kernels.gpu import launches
from batchnorm.kernels.interface import RunningState
from batchnorm.torch.call import Call
from tests.support.primitives import Primitives

engine = Primitives(gpu)


class Hopper:
    """A driver that knows what it would compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


# Those without moments, which take z: behind an activation that only cuts off, they compute little else.
_TELLING = frozenset({"normalize", "sum_parts", "differentiate"})


def compiled(kernel: Any, programs: int, warps: int, on: Any, arguments: dict[str, Any]) -> None:
    """Compile as a launch does; and see that nothing was left to fuse where kernels must agree."""
    del on
    options = {**arguments, "grid": (programs,), "num_warps": warps}
    made = kernel.warmup(**options)
    assert made.asm["cubin"]
    print(made.name)
    if made.name in _TELLING and arguments.get("ACTIVATION") in (None, "relu", "relu6"):
        assert _arithmetic(made) == _arithmetic(kernel.warmup(**options, enable_fp_fusion=False)), made.name


def _arithmetic(made: Any) -> Counter[str]:
    """Return how many there are of each floating-point operation that may be fused with others."""
    return Counter(
        re.findall(r"(?:fma|mul|add|sub)(?:\.rn)?\.f(?:32|64)", made.asm["ptx"].replace(".rn", ""))
    )


def step(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    last: bool = False,
    masked: bool = False,
    fused: str | None = None,
    group_size: int | None = None,
    affine: bool = True,
    sequential: bool = False,
) -> None:
    """Compile what one step of training takes, and one of the split pairs."""
    x = torch.empty(shape, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.empty(shape[1], dtype=real) if affine else None for _ in range(2))
    options: dict[str, Any] = {
        "activation": fused,
        "residual": x if fused else None,
        "group_size": group_size,
    }
    options["mask"] = torch.ones(shape[0], *shape[2:], dtype=torch.bool) if masked else None
    mean, var = torch.empty(2, shape[1], dtype=real).unbind()
    skipped = torch.tensor(0) if masked else None
    running = RunningState(mean, var, torch.tensor(0), 0.1, skipped, sequential)
    activation_mask = engine.activation_mask(x, fused, group_size)
    _, found, rstd = engine.forward(
        x, 1e-5, weight, bias, running=running, activation_mask=activation_mask, **options
    )
    engine.backward(x, x, found.mean, rstd, False, weight, bias, **options)
    if activation_mask is not None:
        kept = {
            "activation": fused,
            "mask": options["mask"],
            "group_size": group_size,
            "activation_mask": activation_mask,
        }
        engine.backward(x, x, found.mean, rstd, False, weight, **kept)
    engine.normalize(x, found.mean, rstd, weight, bias, **options)
    engine.backward_reduce(x, x, found.mean, rstd, weight, bias, **options)
    gpu.evaluate(Call(x, weight, bias), mean, var)


def main(steps: str) -> None:
    """Compile every kernel, for "few" steps or for "all"."""
    driver.set_active(Hopper())
    gpu.launch = launches.launch = compiled  # type: ignore[assignment]
    step((64, 64, 56, 56), torch.bfloat16, last=True, fused="relu")
    step((256, 512, 7, 7), torch.float16, masked=True, fused="silu", group_size=100)
    if steps == "few":
        return
    step((64, 64, 56, 56), torch.float32, fused="gelu")
    step((64, 5, 90, 110), torch.float64, masked=True, fused="tanh", group_size=60, sequential=True)
    step((256, 256), torch.bfloat16, fused="relu6", affine=False)
    step((64, 1, 3), torch.float32, fused="elu")
    step((1, 1), torch.float32, fused="hardswish")
    step((2, 1), torch.float64, fused="sigmoid")
    step((300, 7), torch.float16, fused="leaky_relu", last=False)


if __name__ == "__main__":
    main(sys.argv[1])
