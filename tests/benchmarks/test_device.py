"""Measurements on a device, tried on a CPU: rows, failures, time that runs out, and files."""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import goals, page, results_file, run
from benchmarks.device import clocks, floor, layer_cases, layers, steps, turns
from benchmarks.device import page as device_page
from benchmarks.device import run as device_run
from benchmarks.device.worker import Worker
from benchmarks.layer_rivals import tensors
from benchmarks.lazily import function
from benchmarks.progress import progress
from tests.benchmarks import told
from tests.support.programs import run_python

ROOT = Path(__file__).parent.parent.parent
CASE = layer_cases.DeviceCase(
    "norm-add-relu",
    (4, 6, 5, 5),
    "channels-last",
    "bfloat16",
    ("stock", "stock-native", "ours"),
    "a",
    "cpu",
    0.01,
)
STEP = steps.StepCase("ResNet-18", 8, 32, ("stock", "fused"), "cpu", 0.01)


class UnfitLayer(torch.nn.Module):
    """Computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(6))
        self.bias = torch.nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return (
            x * self.weight.view(1, -1, 1, 1).bfloat16() + self.bias.view(1, -1, 1, 1).bfloat16() + residual
        )


def test_a_layer_has_every_figure() -> None:
    row = layers.measured(CASE)
    assert row["failed"] == {}
    assert row["rivals"].keys() == {"stock", "stock-native", "ours"}
    assert row["bytes_moved"] == 10 * 600 * 2
    assert 0 < row["differs"] < layers.AGREEMENT["bfloat16"]
    assert row["stock_runs"] == {"stock": "NativeBatchNorm", "stock-native": "NativeBatchNorm"}
    assert all(found["host_seconds"] > 0 for found in row["rivals"].values())
    text = device_page.layers_text([row])
    assert "| 10 (split) |" in text
    assert "stock-native ÷ ours" in text
    assert "Without figures" not in text


def test_stock_runs_without_cudnn_where_it_says_so() -> None:
    for name, allowed in (("stock", torch.backends.cudnn.enabled), ("stock-native", False)):
        step, seen = layers.BUILD[name](CASE, tensors(CASE)), []
        step.model.register_forward_hook(lambda *_, seen=seen: seen.append(torch.backends.cudnn.enabled))
        step()
        step.results()
        assert seen == [allowed, allowed]


def test_a_rival_that_fails_drops_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> layers.LayerStep:
        raise torch.OutOfMemoryError("CUDA out of memory.\n\nTried to allocate")

    def late(case: layer_cases.DeviceCase, given: Any) -> layers.LayerStep:
        step = layers.BUILD["ours"](case, given)
        step.dy = step.dy[:1]  # what only the backward finds
        return step

    monkeypatch.setitem(layers.BUILD, "big", out_of_memory)
    monkeypatch.setitem(layers.BUILD, "late", late)
    row = layers.measured(replace(CASE, rivals=("big", "stock", "late", "ours")))
    assert row["failed"]["big"] == "OutOfMemoryError: CUDA out of memory."
    assert row["failed"]["late"].startswith("RuntimeError")
    assert row["rivals"].keys() == {"stock", "ours"}
    assert row["ratios"].keys() == {"stock / ours"}
    assert (
        "norm → add → ReLU, bfloat16 (a), (4, 6, 5, 5), channels-last: big: Out"
        in device_page.layers_text([row])
    )


def test_what_computes_something_else_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.BUILD, "ours", lambda _, given: layers.LayerStep(UnfitLayer(), given))
    row = layers.measured(CASE)
    assert row["failed"]["ours"].startswith("it differs from stock by")
    assert "ours" not in row["rivals"]
    assert row["ratios"] == {}
    assert "| failed |" in device_page.layers_text([row])
    assert not any(finding.number for finding in goals.device_layer_findings([row]))


def test_a_training_step_has_every_figure() -> None:
    row = steps.measured(replace(STEP, variants=steps.EAGER))
    assert row["failed"] == {}
    assert row["variants"].keys() == set(steps.EAGER)
    assert row["ratios"].keys() == {"stock / ours", "stock / fused", "stock / lean"}
    fused = row["variants"]["fused"]
    assert fused["images_per_second"] == pytest.approx(8 / fused["seconds"])
    assert row["differs"]["stock"] == 0 < row["differs"]["fused"] == row["differs"]["lean"] < 0.1
    assert "| ResNet-18 | 8 × 3 × 32² | lean |" in device_page.steps_text([row])


def test_a_network_that_computes_something_else_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(case: steps.StepCase) -> steps.TrainingStep:
        step = steps.VARIANTS["stock"](case)
        with torch.no_grad():
            step.model[-1].weight.neg_()
        return step

    def failing(_: steps.StepCase) -> steps.TrainingStep:
        raise RuntimeError("no compiler")

    monkeypatch.setitem(steps.VARIANTS, "fused", other)
    monkeypatch.setitem(steps.VARIANTS, "compiled", failing)
    row = steps.measured(replace(STEP, variants=("stock", "fused", "compiled")))
    assert row["variants"].keys() == {"stock"}
    assert row["failed"]["fused"].startswith("its logits differ from stock's by 2")
    assert row["failed"]["compiled"] == "RuntimeError: no compiler"


def test_floor_is_asked_of_the_channel() -> None:
    assert floor.regime((256, 512, 7, 7), "contiguous", 2) == floor.ONE_PASS
    assert floor.regime((256, 512, 7, 7), "channels-last", 2) == floor.SPLIT
    assert floor.regime((256, 64, 112, 112), "contiguous", 2) == floor.SPLIT
    assert [floor.passes(regime, adds) for regime in ("one pass", "split") for adds in (False, True)] == [
        5,
        7,
        8,
        10,
    ]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_cases_are_each_measured_once_and_what_the_goals_are_of_comes_first(device: str) -> None:
    found = layer_cases.cases(device)
    keys = [(case.operation, case.shape, case.layout, case.dtype) for case in found]
    assert len(set(keys)) == len(keys)
    first = found[:20]
    assert all(case.dtype == "bfloat16" and case.layout == "channels-last" for case in first)
    assert all("compiled" in case.rivals for case in first[:12])
    asked = steps.cases(device)
    assert len({(case.network, case.variants) for case in asked}) == len(asked) == 9
    assert (asked[0].network, asked[0].variants) == ("ResNet-50", steps.EAGER)


def test_rounds_are_as_many_as_there_is_time_for() -> None:
    failed: dict[str, str] = {}
    for seconds, rounds in ((0.0, turns.LEAST_ROUNDS), (60.0, 9)):
        assert turns.take_turns({"rival": lambda: 1.0}, seconds, 9, failed) == {"rival": [1.0] * rounds}
    assert failed == {}


def test_a_case_that_hangs_or_dies_takes_only_itself_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with Worker() as worker:
        first = worker.row(told.obeyed, "work", 600)
        assert first["process"] != os.getpid()
        assert worker.row(told.obeyed, "raise", 600) == {"missing": "ValueError: it is told to"}
        assert worker.row(told.obeyed, "work", 600) == first
        assert worker.row(told.obeyed, "sleep", 1)["missing"] == "stopped after 1 s"
        assert not is_there(first["process"])
        assert worker.row(told.obeyed, "die", 600)["missing"] == "its process ended, with code 7"


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_the_file_is_written_after_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cases = [told.Watching(number, tmp_path / "told-cpu.json") for number in range(3)]
    section = device_run.Section(lambda *_: cases, told.rows_with_figures, str, 1.0, 600.0)
    monkeypatch.setitem(device_run.SECTIONS, "told", section)
    device_run.run(device_run.Wanted("cpu", ("told",), 600.0, tmp_path, {}))
    assert [row["seen"] for row in results_file.load("told-cpu", tmp_path)["rows"]] == [0, 1, 2]


def test_what_was_not_reached_is_in_the_file(tmp_path: Path) -> None:
    facts = {"device": "NVIDIA H100 80GB HBM3"}
    wanted = device_run.Wanted("cpu", ("layers",), 0.0, tmp_path, {"commit": "abc"}, quick=True)
    rows = device_run.measure("layers", wanted, facts, Worker(), 0.0, 0.0)
    found = results_file.load("layers-nvidia-h100-80gb-hbm3", tmp_path)
    assert found == {"provenance": {"device": "NVIDIA H100 80GB HBM3", "commit": "abc"}, "rows": rows}
    assert {row["missing"] for row in rows} == {"not reached in the 0 s of `layers`"}
    assert len(rows) == len(layer_cases.cases("cpu", quick=True))


def test_the_page_shows_the_files_that_there_are(tmp_path: Path) -> None:
    assert "There is no figure of a GPU yet" in page.block("gpu-state", tmp_path)
    for name in page.DEVICE_BLOCKS:
        assert "ot measured" in page.block(name, tmp_path)
    row = layers.measured(CASE)
    missing = [case.fields() | {"missing": "no time"} for case in layer_cases.cases("cuda")]
    step = STEP.fields() | {"missing": "stopped after 180 s"}
    for device in ("cpu", "nvidia-h100-80gb-hbm3"):
        results_file.write(f"layers-{device}", {"device": device}, [row, *missing], tmp_path)
    results_file.write("steps-nvidia-h200", {"device": "h200"}, [step], tmp_path)
    assert "`layers-nvidia-h100-80gb-hbm3`, `steps-nvidia-h200`" in page.block("gpu-state", tmp_path)
    shown = page.block("gpu-layers", tmp_path)
    assert "- no time: 110 of 111 cases" in shown
    assert "layers-cpu" not in shown
    assert "- stopped after 180 s: ResNet-18 (stock, fused)" in page.block("gpu-steps", tmp_path)
    assert "not measured" in page.block("gpu-step-goals", tmp_path)


def layer_row(ratios: dict[str, float], over_floor: float, **fields: Any) -> dict[str, Any]:
    return {
        "operation": "norm-relu",
        "dtype": "bfloat16",
        "layout": "channels-last",
        "regime": floor.SPLIT,
        "tensor_bytes": 10**8,
        "ratios": {f"{name} / ours": {"median": found} for name, found in ratios.items()},
        "rivals": {"ours": {"over_floor": over_floor}},
    } | fields


def test_goals_of_a_gpu_are_of_the_right_rows() -> None:
    rows = [
        layer_row({"stock": 1.6, "compiled": 1.3}, 1.2),
        layer_row({"stock": 1.25, "compiled": 0.8}, 1.2, operation="norm-add-relu"),
        layer_row({"stock": 1.9}, 1.2, regime=floor.ONE_PASS, tensor_bytes=100),
        layer_row({"stock": 2.2}, 1.2, regime=floor.ONE_PASS, layout="contiguous", tensor_bytes=100),
        layer_row({"stock": 0.1}, 1.2, layout="contiguous", tensor_bytes=100),
        layer_row({"stock": 0.1}, 2.0, operation="norm"),
        layer_row({"stock": 0.1}, 9.0, dtype="float32", tensor_bytes=100),
        {"missing": "no time"},
    ]
    stock, native, _, compiled, on_chip, floors, of_main = goals.device_layer_findings(rows)
    assert (stock.found, stock.number, stock.reached) == (pytest.approx(2**0.5), 2, True)
    assert (native.number, native.reached) == (0, False)
    assert (compiled.found, compiled.reached) == (pytest.approx(1.04**0.5), False)
    assert (on_chip.found, on_chip.number, on_chip.reached) == (pytest.approx(4.18**0.5), 2, True)
    assert [found.asked for found in (stock, compiled, on_chip)] == ["≥ 1.4", "≥ 1.1", "≥ 2"]
    assert (floors.found, floors.worst, floors.number) == (1.2, 2.0, 3)
    assert (of_main.number, of_main.reached) == (2, True)


def test_goals_of_training_steps_are_of_resnet50() -> None:
    bytes_of = {"stock": {"held": 10, "peak": 100}, "lean": {"held": 5, "peak": 66}}
    row = {
        "network": "ResNet-50",
        "ratios": {"stock / fused": {"median": 1.2}},
        "variants": {name: {"bytes": found} for name, found in bytes_of.items()},
    }
    faster, peak, held = goals.device_step_findings([row, row | {"network": "MobileNetV2"}])
    assert (faster.found, faster.number, faster.reached) == (pytest.approx(1.2), 1, True)
    assert (peak.found, peak.reached) == (0.66, False)
    assert (held.found, held.asked) == (0.5, "–")


def test_every_measurement_and_table_is_there() -> None:
    for name in (*sum(run.MEASUREMENTS.values(), ()), *(show for _, show in page.BLOCKS.values())):
        assert callable(function(name)), name


def test_what_cannot_be_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--device", "cpu", "accuracy-cpu"], "'accuracy-cpu' is none of layers, steps"),
        (["layers"], "'layers' is none of accuracy-cpu, "),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch sees no CUDA device here")]),
    ):
        with pytest.raises(SystemExit):
            run.main(words)
        assert said in capsys.readouterr().err


def test_progress_needs_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert list(progress("ab", "letters")) == ["a", "b"]
    assert capsys.readouterr().err == "letters: 1 of 2\nletters: 2 of 2\n"


# As where only torch and NumPy are installed: these cannot be found, in the processes that follow either.
HIDE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {"typer", "rich", "keras", "tensorflow", "numba", "jax", "matplotlib", "transformers", "jinja2"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.path[:] = [path for path in sys.path if not path.endswith("src")]  # nor is batchnorm itself
"""


def test_it_runs_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {"PYTHONPATH": tmp_path, "OMP_NUM_THREADS": "1", "PATH": ""}  # no git either
    python = functools.partial(run_python, cwd=ROOT, **environment)

    hidden = "import importlib.util as u; print([u.find_spec(n) for n in ('typer', 'numba', 'batchnorm')])"
    assert python("-c", hidden).strip() == "[None, None, None]"
    filled = "from benchmarks import page as p; t = p.GPU_PAGE.read_text(); print(p.filled(t) == t)"
    assert python("-c", filled).strip() == "True"
    out = tmp_path / "out"
    words = ("--device", "cpu", "--quick", "--out", str(out), "--commit", "1a2b3c4")
    printed = python("-m", "benchmarks.run", *words)
    assert "Ours ran on the engine `eager`." in printed
    assert "Without figures" not in printed
    found = {name: json.loads((out / f"{name}-cpu.json").read_text()) for name in ("layers", "steps")}
    assert found["layers"]["provenance"]["commit"] == "1a2b3c4"
    for file in found.values():
        assert all("missing" not in row and row["failed"] == {} for row in file["rows"])
    (row,) = found["steps"]["rows"]
    assert row["variants"].keys() == set(steps.EAGER)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_waiting_takes_as_long_as_it_does() -> None:
    watch = clocks.CudaClock()
    host: list[float] = []
    step = watch.of_layer(lambda: torch.cuda._sleep(watch._cycles), host)
    for _ in range(3):
        seconds = step()
    assert seconds == pytest.approx(clocks.HEAD_START, rel=0.2)
    assert 0 < host[-1] < clocks.HEAD_START
    assert layers.measured(replace(CASE, device="cuda"))["failed"] == {}
