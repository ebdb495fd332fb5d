"""What `torch.compile` sees of layers on a GPU: the kernels; traced in another process, without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.interpreted import HAS_TRITON
from tests.support.programs import run_python

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
SCRIPT = "tests.torch.graphs_with_kernels"

KERNELS = {
    "parts": ["measure_parts", "merge_moments", "normalize", "sum_parts", "merge_sums", "differentiate"],
    "whole": ["forward_whole", "backward_whole"],
    "given": ["normalize", "sum_parts", "merge_sums", "differentiate"],
}
WRITES = {
    "measure_parts": ["part_count", "part_m2", "part_mean"],
    "merge_moments": ["count", "m2", "mean", "rstd"],
    "normalize": ["y"],
    "forward_whole": ["count", "m2", "mean", "rstd", "y"],
    "sum_parts": ["part_count", "part_dy", "part_dy_xhat"],
    "merge_sums": ["a", "b", "c", "dbias", "dweight"],
    "differentiate": ["dx"],
    "backward_whole": ["dbias", "dweight", "dx"],
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_python("-m", SCRIPT))
    return found


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", KERNELS)
def test_row_28_graphs_hold_the_launches_of_an_eager_step(graphs: dict[str, Any], case: str) -> None:
    """Row 28: the same kernels, programs, warps and numbers, both ways; nothing opaque, and no copies."""
    found = graphs[case]
    assert [launch["kernel"] for launch in found["launches"]] == KERNELS[case]
    for ours, theirs in zip(found["launches"], found["eager"], strict=True):
        assert {name: ours[name] for name in theirs} == theirs
    assert found["opaque"] == []
    assert found["stored"] == (5 if case == "parts" else 3)  # x, dy and a residual, in each graph
    assert len(found["copies"]) == (2 if case == "given" else 0)  # statistics `[1, C]`, kept as they are now


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", KERNELS)
def test_the_compiler_knows_what_kernels_write(graphs: dict[str, Any], case: str) -> None:
    for launch in graphs[case]["launches"]:
        expected = WRITES[launch["kernel"]]
        has_residual = case == "parts" and launch["kernel"] == "differentiate"
        assert launch["writes"] == sorted([*expected, "dresidual"] if has_residual else expected)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", KERNELS)
def test_nothing_is_lost_on_the_way_through_inductor(
    graphs: dict[str, Any], case: str, tmp_path: Path
) -> None:
    """It passes floats as float32, and writes a kernel's source anew, with the constants it names."""
    for number, launch in enumerate(graphs[case]["launches"]):
        assert launch["rounded"] == []
        path = tmp_path / f"kernel_{number}.py"
        prelude = "import triton\nimport triton.language as tl\n\n"
        path.write_text(prelude + launch["source"])
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert hasattr(module, launch["kernel"])


@pytest.mark.parametrize("case", ["symbols", "mask", "strict", "asked"])
def test_opaque_operators_stay_where_kernels_cannot_be_seen(graphs: dict[str, Any], case: str) -> None:
    """Sizes that are symbols; a mask; an error that hangs on values; another engine."""
    found = graphs[case]
    assert found["launches"] == []
    assert found["opaque"] == ["batchnorm.normalize.default", "batchnorm.normalize_backward.default"]
