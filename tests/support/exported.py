"""Runs an exported model in ONNX Runtime."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def run_onnx(
    model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, exporter: str = "default"
) -> tuple[Tensor, set[str]]:
    """Return the output of the exported model in ONNX Runtime, and the kinds of its nodes.

    Args:
        exporter: "default"; "program": the same, of what torch.export has made before; or "traced": the older
            one, by torch.jit.trace.
    """
    onnx = pytest.importorskip("onnx", reason="onnx, of the group test, is not there")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, of the group test, is not there")
    pytest.importorskip("onnxscript", reason="onnxscript, of the group test, is not there")
    with warnings.catch_warnings():
        # Of the exporter's own dependencies; nothing here is ours to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        path = folder / "model.onnx"
        if exporter == "traced":
            torch.onnx.export(model, inputs, path, dynamo=False)
        else:
            exported = torch.export.export(model, inputs) if exporter == "program" else model
            torch.onnx.export(exported, inputs, dynamo=True, verbose=False).save(path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    if any(t.dtype == torch.bfloat16 for t in inputs):  # which NumPy does not have
        return _run_bfloat16(session, inputs), kinds
    feed = {entry.name: t.numpy() for entry, t in zip(session.get_inputs(), inputs, strict=True)}
    (y,) = session.run(None, feed)
    return torch.from_numpy(y), kinds


def _run_bfloat16(session: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the output of a session with bfloat16 inputs of one shape, by the memory of tensors."""
    onnx = importlib.import_module("onnx")
    binding, y = session.io_binding(), torch.zeros_like(inputs[0])
    kind = onnx.TensorProto.BFLOAT16
    for entry, t in zip(session.get_inputs(), inputs, strict=True):
        binding.bind_input(entry.name, "cpu", 0, kind, list(t.shape), t.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, kind, list(y.shape), y.data_ptr())
    session.run_with_iobinding(binding)
    return y
