"""Cases of single layers: operations, shapes of well-known networks, layouts and rivals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

FORWARD_AND_BACKWARD = ("norm", "norm-relu", "norm-add-relu")
EVALUATION = ("eval-norm", "eval-norm-relu")
INFERENCE = ("infer-norm", "infer-norm-relu")  # the same under torch.inference_mode()
# Operation -> how pages call it.
OPERATIONS = {
    "norm": "norm",
    "norm-relu": "norm → ReLU",
    "norm-add": "norm → add",
    "norm-add-relu": "norm → add → ReLU",
    "eval-norm": "evaluation: norm",
    "eval-norm-relu": "evaluation: norm → ReLU",
    "infer-norm": "inference mode: norm",
    "infer-norm-relu": "inference mode: norm → ReLU",
}
TINY, LARGE = 2**13, 2**18  # values of a tensor: tiny up to and with the one, large above the other
HUGE_BYTES = 48_000_000  # above it, glibc asks the system for every block anew

_RESNET = (
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 64, 56, 56),
    (32, 128, 28, 28),
    (32, 1024, 14, 14),
    (32, 512, 7, 7),
    (2, 256, 14, 14),
)
SHAPES: dict[tuple[int, ...], str] = {
    **dict.fromkeys(_RESNET, "ResNet-50"),
    (32, 144, 56, 56): "MobileNetV2",
    (32, 192, 28, 28): "MobileNetV2",
    (32, 960, 7, 7): "MobileNetV2",
    (32, 320, 28, 28): "DenseNet-121",
    (32, 640, 14, 14): "DenseNet-121",
    (4, 1024, 7, 7): "DenseNet-121",
    (32, 512, 400): "speech, 1-D",
    (8, 80, 200): "speech, 1-D",
    (4, 64, 8, 56, 56): "video, 3-D",
    (4, 256, 4, 14, 14): "video, 3-D",
    (4096, 1024): "dense",
    (128, 4096): "dense",
    (256, 512): "dense",
    (32, 64): "tiny",
    (2, 16, 8, 8): "tiny",
}
# Other operations and dtypes: one shape of each kind of kernel.
FEW_SHAPES = (
    (32, 256, 56, 56),
    (32, 64, 56, 56),
    (32, 1024, 14, 14),
    (32, 960, 7, 7),
    (32, 512, 400),
    (4, 256, 4, 14, 14),
    (4096, 1024),
    (256, 512),
    (32, 64),
)
SMALL_SHAPES = ((256, 512), (32, 64))
# Of forwards alone, where Python is the bound.
INFERENCE_SHAPES = {
    (32, 64): "tiny",
    (256, 512): "dense",
    (8, 64, 28, 28): "small batch",
    (1, 64, 56, 56): "one image",
}
# For the rivals that must be compiled first.
RIVAL_SHAPES = ((32, 64, 56, 56), (32, 512, 7, 7), (4096, 1024), (256, 512))
OTHER_RIVALS = ("compiled", "jax", "keras")
QUICK_SHAPES = ((32, 64), (256, 512), (32, 128, 28, 28), (32, 512, 7, 7))


@dataclass(frozen=True)
class Case:
    """One operation on one tensor; `rivals` are names of layer_rivals.py."""

    operation: str
    shape: tuple[int, ...]
    layout: str
    dtype: str = "float32"
    rivals: tuple[str, ...] = ("stock", "ours")

    @property
    def network(self) -> str:
        """Name of a network that has such a layer."""
        return (INFERENCE_SHAPES | SHAPES).get(self.shape, "")

    @property
    def evaluation(self) -> bool:
        """A forward with running statistics; else forward and backward of a training step."""
        return self.operation in EVALUATION or self.inference

    @property
    def inference(self) -> bool:
        """Whether the forward runs under `torch.inference_mode()`; else evaluation is under `no_grad`."""
        return self.operation in INFERENCE

    @property
    def residual(self) -> bool:
        """A second tensor is added."""
        return "add" in self.operation

    @property
    def activation(self) -> str | None:
        """Name of the activation, if there is one."""
        return "relu" if self.operation.endswith("relu") else None

    @property
    def values(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.values * (4 if self.dtype == "float32" else 2)

    @property
    def passes(self) -> int:
        """Times that a tensor must be read or written: the floor.

        In training 5 where a channel's values lie side by side and are read again from the cache (x, y; x,
        dy, dx), and 8 where they do not fit (x, x, y; x, dy, x, dy, dx). A residual is read and its gradient
        written: 2 more. In evaluation 2 (x, y).
        """
        if self.evaluation:
            return 3 if self.residual else 2
        return (5 if self.layout == "contiguous" else 8) + (2 if self.residual else 0)

    @property
    def bytes_moved(self) -> int:
        """Bytes of those passes."""
        return self.passes * self.tensor_bytes


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the layouts that torch has for a shape; in `[N, C]` the channels are always last."""
    if len(shape) == 2:
        return ("channels-last",)
    return ("contiguous",) if len(shape) == 3 else ("contiguous", "channels-last")


def cases(quick: bool = False) -> list[Case]:
    """Return the cases with the default allocator."""
    if quick:
        return [
            *_each("norm-relu", QUICK_SHAPES),
            *_each("norm-add-relu", QUICK_SHAPES[2:3]),
            *_each("eval-norm", QUICK_SHAPES[2:3]),
            *map(_with_in_place, _each("infer-norm-relu", QUICK_SHAPES[:1])),
        ]
    found = [_with_rivals(case) for case in _each("norm-relu", SHAPES)]
    found += [replace(case, dtype="bfloat16") for case in _each("norm-relu", FEW_SHAPES)]
    for operation in ("norm", "norm-add-relu"):
        found += _each(operation, FEW_SHAPES)
        found += [replace(case, dtype="bfloat16") for case in _each(operation, SMALL_SHAPES)]
    for operation in EVALUATION:
        found += map(_with_in_place, _each(operation, dict.fromkeys((*FEW_SHAPES, *INFERENCE_SHAPES))))
    for operation in INFERENCE:
        found += map(_with_in_place, _each(operation, INFERENCE_SHAPES))
    return found


def reuse_memory_cases(quick: bool = False) -> list[Case]:
    """Return the cases with `reuse_memory()`: large tensors, where new memory costs most."""
    if quick:
        return _each("norm-relu", QUICK_SHAPES[2:3])
    large = [shape for shape in SHAPES if math.prod(shape) > LARGE]
    return [*_each("norm-relu", large), *_each("eval-norm", large[1:3])]


def _each(operation: str, shapes: Iterable[tuple[int, ...]]) -> list[Case]:
    return [Case(operation, shape, layout) for shape in shapes for layout in layouts(shape)]


def _with_rivals(case: Case) -> Case:
    """Add the chain with its ReLU in place, as most networks have it, and for a few shapes the compilers."""
    others = OTHER_RIVALS if case.shape in RIVAL_SHAPES else ()
    return replace(case, rivals=(*_with_in_place(case).rivals, *others))


def _with_in_place(case: Case) -> Case:
    """Add the chain with its activation in place, where there is one."""
    return replace(case, rivals=("stock", "stock-in-place", "ours")) if case.activation else case
