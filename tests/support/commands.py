"""Runs commands on a user's model in this process, and looks at their errors and files."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from typer.testing import CliRunner, Result

from batchnorm.cli.commands import app

# A user's file, with models and data.
OWN = """
import numpy as np
import torch
from torch import nn


def data():
    random = np.random.default_rng(0)
    x, y = 3 + 2 * random.standard_normal((60, 3, 6, 6)), np.arange(60) % 3
    return x[:40], y[:40], x[40:], y[40:]


def flat():
    x, *rest = data()
    return x.reshape(40, -1), rest[0], rest[1].reshape(20, -1), rest[2]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())


def tied():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[3].weight = model[1].weight
    return model


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(x)) if x.sum() < 1e9 else x


class Special(nn.BatchNorm2d):
    pass


def special():
    return nn.Sequential(Special(3))


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        raise RuntimeError("no such road")


def number():
    return 3


def broken():
    raise RuntimeError("nothing here")
"""


def run(command: str, model: str, *options: object) -> Result:
    return CliRunner().invoke(app, [command, model, *map(str, options)])


def assert_fails(done: Result, code: int, *parts: str) -> None:
    line = done.stderr.splitlines()[-1]
    assert done.exit_code == code, done.output
    assert line.startswith("error: "), done.stderr
    assert all(part in line for part in parts), line
    assert "Traceback" not in done.output


def folder(own: Path) -> set[str]:
    return {path.name for path in own.parent.iterdir()} - {"__pycache__"}


def built(own: Path, function: str) -> nn.Module:
    scope: dict[str, object] = {}
    exec(compile(own.read_text(), str(own), "exec"), scope)
    return scope[function]()
