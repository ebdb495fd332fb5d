"""What ONNX Runtime makes of a model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


def run_onnx(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> tuple[Tensor, set[str]]:
    """Return what onnxruntime makes of the exported model, and the kinds of its nodes."""
    onnx = pytest.importorskip("onnx", reason="onnx, of the extra dev, is not there")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the extra dev, is not there")
    pytest.importorskip("onnxscript", reason="onnxscript, of the extra dev, is not there")
    with warnings.catch_warnings():
        # Of the exporter's own dependencies; nothing here is ours to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    path = folder / "model.onnx"
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {entry.name: t.numpy() for entry, t in zip(session.get_inputs(), inputs, strict=True)}
    (y,) = session.run(None, feed)
    return torch.from_numpy(y), {node.op_type for node in onnx.load(path).graph.node}
