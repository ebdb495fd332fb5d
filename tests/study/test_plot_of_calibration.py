"""The picture of a calibration."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.statistics.calibration import CalibrationReport, LayerChange
from batchnorm.studies.plots import calibration

SVG = "{http://www.w3.org/2000/svg}"


def _report() -> CalibrationReport:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))
    return batchnorm.calibrate(model, torch.randn(40, 4).split(10))


def _texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def test_it_stands_by_itself_with_a_row_per_layer(tmp_path: Path) -> None:
    report, path = _report(), tmp_path / "off.svg"
    drawn = calibration.draw(report, path)
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    assert {"1", "4 *", "mean moved by, standard deviations"} <= set(_texts(root))
    style = root.find(f"{SVG}style").text
    for name in ("ink", "soft", "grid", "subject", "page", "sans"):
        assert f"--{name}:" in style, name
    assert "prefers-color-scheme: dark" in style
    assert f"by {max(layer.mean_shift for layer in report.layers):.2g}" in drawn.alt


def _lengths(drawn: str) -> list[float]:
    """Return the lengths of each layer's horizontal lines: over all channels, and over the middle half."""
    root = ElementTree.fromstring(drawn)
    found = []
    for path in root.iter("path"):
        words = path.attrib.get("d", "").split()
        if len(words) == 6 and words[0] == "M" and words[3] == "L" and words[2] == words[5]:
            found.append(float(words[4]) - float(words[1]))
    return found


def test_lines_are_as_long_as_the_channels_differ() -> None:
    """Ten times and a hundred times, on a log scale: twice as long."""
    narrow = LayerChange("a", 9, 1.0, 1.0, True, (0.1, 1.0), (1.0, 1.0))
    wide = LayerChange("b", 9, 1.0, 1.0, True, (0.01, 1.0), (1.0, 1.0))
    drawn = calibration.picture("k", CalibrationReport(9, 1, (narrow, wide), ()))
    lengths = sorted(length for length in _lengths(drawn.svg) if length > 1)
    assert any(abs(b / a - 2) < 1e-3 for a in lengths for b in lengths)


def test_a_report_without_channels_is_drawn_too() -> None:
    layer = LayerChange("norm", 9, 0.5, 2.0, True)
    assert "norm by 0.5" in calibration.picture("k", CalibrationReport(9, 1, (layer,), ())).alt


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ends in \.svg, not 'off\.png'"):
        calibration.draw(_report(), tmp_path / "off.png")
