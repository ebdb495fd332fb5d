"""`fold` over a part of the zoo: networks of transformers from small configurations, and nasty ones.

`benchmarks.run fold-zoo-cpu` measures all of it.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from benchmarks import fold_page, fold_zoo, zoo
from benchmarks.fold_possible import possible


def measured(name: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the networks' own
        return fold_zoo.row(name)


# network -> norms that run, and how many of them are absorbed
EXPECTED = {
    "ResNet-18": (20, 20),
    "transformers ResNet-18": (20, 20),
    "RegNetY": (23, 23),
    "MobileNetV2 (transformers)": (52, 52),
    "EfficientNet": (49, 49),
    "LeViT": (39, 39),
    "SwiftFormer": (15, 15),
    "TextNet": (51, 51),
    "RepVGG": (16, 16),
    "MobileOne": (38, 38),
    "FastViT": (22, 22),
    "NASNet": (12, 12),
    "MixNet": (10, 10),
    "CSP": (13, 13),
    "norm before the average": (6, 6),
    "InceptionNeXt": (4, 4),
    "ConvMixer": (7, 2),
    "ENet": (5, 4),
    "PP-LCNet": (27, 27),
    "DETR": (19, 19),
    "HuBERT": (1, 0),
    "FastSpeech2-Conformer": (5, 5),
    "PatchTST": (4, 4),
    "PatchTSMixer": (4, 2),
    "shared convolution": (4, 2),
    "pre-activation": (6, 3),
    "U-Net": (4, 4),
    "tapped convolution": (1, 0),
    "norm called twice": (1, 0),
    "control flow": (2, 2),
    "functional norm": (1, 0),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", EXPECTED)
def test_what_can_be_absorbed_is_and_nothing_is_wrong(name: str) -> None:
    """Rows 12 and 13: over networks that people use; the second count does not know how `fold` works."""
    row = measured(name)
    assert (row["running"], row["absorbed"]) == EXPECTED[name]
    assert row["allowed_absorbed"] == row["allowed"] == row["absorbed"]
    assert sum(row["stay"].values()) == row["running"] - row["absorbed"]
    assert "" not in row["stay"]
    assert row["off_float64"] is None or row["off_float64"] < 1e-12
    assert row["off_float32"] < 1e-5
    assert not fold_page.is_wrong(row)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "before", "left"), [("RepVGG", 12, 6), ("MobileOne", 32, 7), ("FastViT", 16, 4)]
)
def test_row_61_parallel_convolutions_become_one(name: str, before: int, left: int) -> None:
    """Row 61: the figures in docs/fold.md."""
    model, example = zoo.made(name)
    for network, count in ((model, before), (batchnorm.fold(model, example), left)):
        assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == count


def test_fx_folds_a_shared_convolution_wrongly() -> None:
    """Row 12: PT 104593, 197539. What the table says of fx's fuse is so."""
    found = measured("shared convolution")["fx"]
    assert found["absorbed"] == 4
    assert found["off"] > 0.1


class Both(nn.Module):
    """What `possible` must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.alone, self.read = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.before, self.next = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.padded, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.read(self.alone(self.conv(x)).relu()).relu()
        return self.last(self.padded(self.next(self.before(y)).relu()))


def test_the_independent_count() -> None:
    torch.manual_seed(0)
    assert possible(Both(), torch.randn(2, 3, 6, 6)) == {"alone", "before"}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"off_float64": 1e-6}, "wrong"),
        ({"off_float64": float("nan")}, "wrong"),
        ({"off_float64": None, "off_float32": 1e-2}, "wrong"),
        ({"absorbed": 1}, "norms that run"),
        ({"allowed_absorbed": 1}, "allows"),
    ],
)
def test_a_goal_that_is_missed_is_said_to_be(change: dict[str, Any], what: str) -> None:
    row = {
        "network": "RepVGG", "running": 4, "absorbed": 4, "allowed": 4, "allowed_absorbed": 4,
        "off_float64": 1e-15, "off_float32": 1e-7, "fx": {"absorbed": 0, "error": "TraceError: no"},
    }  # fmt: skip
    assert all(found.reached for found in fold_page.zoo_findings([row]))
    assert [f.what for f in fold_page.zoo_findings([row | change]) if not f.reached and what in f.what]


def test_the_table_shows_every_network() -> None:
    shown = fold_page.zoo_table([measured("tapped convolution"), measured("shared convolution")])
    assert "| tapped convolution | 1 | 0 | 0 |" in shown
    assert "**wrong by" in shown
    assert zoo.ZOO.keys() >= EXPECTED.keys()
