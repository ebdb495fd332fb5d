"""Cases of single layers on a device, most important first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.layer_cases import Case, layouts

from . import floor

_BATCH = {"cuda": 256, "cpu": 4}
# Channels and plane, and which operations stand behind such a tensor; a plane of none is `[N, C]`.
_Shapes = dict[tuple[int, ...], tuple[str, ...]]
_RESNET: _Shapes = {
    **dict.fromkeys(
        (
            *((64, 112, 112), (64, 56, 56), (128, 56, 56), (128, 28, 28)),
            *((256, 28, 28), (256, 14, 14), (512, 14, 14), (512, 7, 7)),
        ),
        ("norm-relu",),
    ),
    **dict.fromkeys(((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)), ("norm-add-relu", "norm")),
}
_MOBILENET: _Shapes = {
    **dict.fromkeys(
        ((96, 112, 112), (144, 56, 56), (192, 28, 28), (384, 14, 14), (960, 7, 7)), ("norm-relu",)
    ),
    (24, 56, 56): ("norm-add", "norm"),
}
_OTHERS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "dense": ((8192, 4096), ("norm-relu", "norm-add-relu", "norm")),
    "video, 3-D": ((16, 64, 16, 56, 56), ("norm-relu", "norm-add-relu", "norm")),
}
_OTHERS_ON_CPU = {"dense": (1024, 512), "video, 3-D": (2, 16, 4, 28, 28)}
_DTYPES_AND_LAYOUTS = (
    ("bfloat16", "channels-last"),
    ("bfloat16", "contiguous"),
    ("float32", "channels-last"),
    ("float32", "contiguous"),
)


@dataclass(frozen=True)
class DeviceCase(Case):
    """A case on a device.

    Attributes:
        found_in: the network of such a layer.
        device: `cpu` or `cuda`.
        seconds: that its rounds may take, about.
    """

    found_in: str = ""
    device: str = "cuda"
    seconds: float = 0.6

    @property
    def network(self) -> str:
        """Name of a network that has such a layer."""
        return self.found_in

    @property
    def regime(self) -> str:
        """`one pass` where a channel stays on chip, else `split`; on CPUs the layout decides."""
        if self.device == "cpu":
            return floor.ONE_PASS if self.layout == "contiguous" else floor.SPLIT
        return floor.regime(self.shape, self.layout, self.tensor_bytes // self.values)

    @property
    def passes(self) -> int:
        """Times that a tensor must be read or written."""
        return floor.passes(self.regime, self.residual)

    def fields(self) -> dict[str, object]:
        """Return what identifies the case in a result file."""
        return {
            "operation": self.operation,
            "network": self.network,
            "shape": list(self.shape),
            "layout": self.layout,
            "dtype": self.dtype,
        }


def cases(device: str, quick: bool = False) -> list[DeviceCase]:
    """Return the cases of a device, those of the goals first."""
    if quick:
        return _quick(device)
    shapes = list(_shapes(device))
    found: list[DeviceCase] = []
    for dtype, layout in _DTYPES_AND_LAYOUTS:
        of_this = [
            DeviceCase(operation, shape, layout, dtype, (*_stock(operation), "ours"), network, device)
            for network, shape, operations in shapes
            if layout in layouts(shape)
            for operation in operations
        ]
        found += [case for case in of_this if case.activation]
        found += [case for case in of_this if not case.activation]
    return [_with_compiler(case) for case in found]


def _shapes(device: str) -> Iterable[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    for network, shapes in (("ResNet-50", _RESNET), ("MobileNetV2", _MOBILENET)):
        for shape, operations in shapes.items():
            yield network, (_BATCH[device], *shape), operations
    for network, (shape, operations) in _OTHERS.items():
        yield network, shape if device == "cuda" else _OTHERS_ON_CPU[network], operations


def _stock(operation: str) -> tuple[str, ...]:
    """Return torch's layers: as they are, without cuDNN, and in place where something is behind the norm."""
    return ("stock", "stock-native", *(() if operation == "norm" else ("stock-in-place",)))


def _with_compiler(case: DeviceCase) -> DeviceCase:
    """Add torch.compile to what the goals are of; seconds per case are too many for all."""
    asked = case.dtype == "bfloat16" and case.layout == "channels-last" and case.activation
    return replace(case, rivals=(*case.rivals, "compiled")) if asked else case


def _quick(device: str) -> list[DeviceCase]:
    def quick(operation: str, shape: tuple[int, ...], layout: str, dtype: str, *rivals: str) -> DeviceCase:
        return DeviceCase(
            operation, shape, layout, dtype, (*_stock(operation), "ours", *rivals), "quick look", device, 0.1
        )

    compiler = ("compiled",) if device == "cuda" else ()  # C++ takes half a minute
    return [
        quick("norm-relu", (8, 16, 14, 14), "channels-last", "bfloat16", *compiler),
        quick("norm-add-relu", (8, 16, 14, 14), "contiguous", "float32"),
        quick("norm", (64, 32), "channels-last", "float32"),
    ]
