"""What verbs return shows as a table in notebooks too: the same cells, and every name escaped."""

from __future__ import annotations

from html import escape
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.folding.table import FoldRow, FoldTable

NAME = "<img src=x onerror=alert(1)>"


class _Table(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, _: object) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    model.add_module(NAME, batchnorm.BatchNorm2d(4))
    return model


def test_inspect_calibrate_and_fold_show_their_tables(model: nn.Module) -> None:
    report = batchnorm.calibrate(model, [torch.randn(8, 3, 6, 6)])
    plan = FoldTable("net", (FoldRow(NAME, "conv", "before", ""), FoldRow("b", None, None, "its <reason>")))
    for shown in (batchnorm.inspect(model), report, plan):
        source = shown._repr_html_()
        table = _Table(source)
        assert table.tags == {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
        assert NAME not in source
        assert NAME in table.cells
        title, header, *rows = str(shown).splitlines()
        assert title in table.text
        for line in (header, *rows):
            for cell in filter(None, line.split("  ")):
                assert cell.strip() in table.text
    assert escape("its <reason>") in plan._repr_html_()


def test_a_report_without_rows_has_no_table() -> None:
    table = _Table(batchnorm.inspect(nn.Linear(2, 2))._repr_html_())
    assert table.tags == {"div", "p", "strong"}
    assert "0 batch normalizations" in table.text
