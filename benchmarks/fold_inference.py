"""Time of a forward in evaluation: stock's network, `fold`'s copy, fx's, and both in ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import onnxruntime
import torch
from torch import Tensor, nn

import batchnorm

from . import zoo
from .fx_fuse import fx_fuse
from .interleaved import Clocked, clocked, interleave, medians, ratio, rest_and_wake
from .layouts import LAYOUTS, memory_format
from .progress import progress
from .tables import Row, Rows

ROUNDS, QUICK_ROUNDS = 15, 2
AGREEMENT = 1e-4  # of the largest output: float32, through 53 norms
STOCK, OURS, FX = "stock", "folded", "fx"
ONNX, ONNX_OURS = "ONNX Runtime", "ONNX Runtime, folded"
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A forward of a network of the zoo."""

    network: str
    batch: int
    side: int
    layout: str


CASES = tuple(
    Case(network, batch, 160, layout)
    for network in ("ResNet-18", "ResNet-50", "MobileNetV2")
    for batch in (1, 8)
    for layout in LAYOUTS
)
QUICK_CASES = tuple(Case("MobileNetV2", 1, 64, layout) for layout in LAYOUTS)


def measure(quick: bool = False) -> Rows:
    """Return a row per case: medians in seconds, and ratios to stock round by round."""
    return [_row(case, quick) for case in progress(QUICK_CASES if quick else CASES, "inference")]


def rivals(case: Case) -> dict[str, Run]:
    """Return a forward of each rival, of the same weights, on the same images."""
    model, _ = zoo.made(case.network)
    images = torch.randn(case.batch, 3, case.side, case.side, generator=torch.Generator().manual_seed(0))
    memory = memory_format(case.layout)
    model.to(memory_format=memory)  # type: ignore[call-overload]
    images = images.to(memory_format=memory)
    folded = batchnorm.fold(model, images)
    found = {name: _torch(one, images) for name, one in ((STOCK, model), (OURS, folded))}
    found[FX] = _torch(fx_fuse(model), images)
    if case.layout == "contiguous":  # ONNX Runtime has no other
        found |= {ONNX: _onnx(model, images), ONNX_OURS: _onnx(folded, images)}
    return found


def _torch(model: nn.Module, images: Tensor) -> Run:
    def run() -> Tensor:
        with torch.inference_mode():
            y: Tensor = model(images)
            return y

    return run


def _onnx(model: nn.Module, images: Tensor) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own dependencies
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    assert program is not None
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _row(case: Case, quick: bool) -> Row:
    runs = rivals(case)
    outputs = {name: run() for name, run in runs.items()}
    wanted = outputs[STOCK]
    off = {name: float((y - wanted).abs().max() / wanted.abs().max()) for name, y in outputs.items()}
    if max(off.values()) > AGREEMENT:
        raise RuntimeError(f"{case}: the rivals' outputs differ: {off}")
    # ONNX Runtime's threads wait by spinning: each step starts after they have gone to sleep.
    steps: dict[str, Clocked] = {name: clocked(run, rest_and_wake) for name, run in runs.items()}
    times = interleave(steps, QUICK_ROUNDS if quick else ROUNDS)
    return {
        **asdict(case),
        "seconds": medians(times),
        "ratios": {name: ratio(times[STOCK], taken) for name, taken in times.items() if name != STOCK},
        "off": max(off.values()),
    }
