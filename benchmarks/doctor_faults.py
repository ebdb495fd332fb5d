"""Faults planted into a small trained network, each in several strengths: what they cost, what is found."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.doctor.findings import CHECKS

from .tables import Row, Rows, table_of

CLASSES, COUNT = 4, 512
Plant = Callable[[nn.Sequential], None]


def network(norm: type[nn.Module] = nn.BatchNorm1d, momentum: float = 0.1) -> nn.Sequential:
    """Return two normalized layers and a classifier."""
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), norm(16, momentum=momentum), nn.ReLU(),
        nn.Linear(16, 16, bias=False), norm(16, momentum=momentum), nn.ReLU(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def samples(count: int = COUNT, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return points around a centre per class, `[N, 8]`, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    return centres[y] + torch.randn(count, 8, generator=generator), y


def batches(size: int = 32, count: int = COUNT) -> list[tuple[Tensor, Tensor]]:
    """Return the samples in batches of (x, y)."""
    x, y = samples(count)
    return list(zip(x.split(size), y.split(size), strict=True))


@functools.cache
def _weights() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(5):
            for x, y in batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        batchnorm.calibrate(model, batches(), group=False)
    return model.state_dict()


def trained() -> nn.Sequential:
    """Return the network, trained and in evaluation; its running statistics are those of the samples."""
    model = network()
    model.load_state_dict(_weights())
    return model.eval()


def accuracy(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]] | None = None) -> float:
    """Return the accuracy in the mode that the model is in, on the samples or on other batches."""
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in (batches(8) if data is None else data)]
    return float(torch.cat(right).float().mean())


@dataclass(frozen=True)
class Case:
    """A model with a fault.

    Attributes:
        model: as it is deployed.
        data: None = it is looked at without data.
        options: of `diagnose`.
        is_scored: whether the fault may cost accuracy as the model is now.
    """

    model: nn.Module
    data: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    is_scored: bool = True


def _planted(plant: Plant, **rest: Any) -> Callable[[], Case]:
    """Return what makes a case of the trained network and a fault in it."""

    def make() -> Case:
        model = trained()
        with torch.no_grad():
            plant(model)
        return Case(model, **rest)

    return make


def filled(name: str, value: float, count: int) -> Plant:
    """Return what fills the first values of a tensor of the second norm."""
    return lambda model: getattr(model[4], name)[:count].fill_(value)


def few_updates(count: int) -> Plant:
    """Return what leaves the initial values in the statistics of the second norm."""

    def plant(model: nn.Sequential) -> None:
        model[4].reset_running_stats()
        model.train()
        for x, _ in (2 * batches())[:count]:
            model(x)
        model.eval()

    return plant


def momentum(value: float) -> Plant:
    """Return what sets the momentum of both norms and trains on a few batches more."""

    def plant(model: nn.Sequential) -> None:
        for layer in (1, 4):
            model[layer].momentum = value
        model.train()
        for x, _ in batches(8):
            model(x)
        model.eval()

    return plant


def _each(change: Callable[[nn.Module], object]) -> dict[str, Plant]:
    """Return what changes the second norm, the first one, and both."""
    places = {"norm 2": (4,), "norm 1": (1,), "both norms": (1, 4)}
    return {
        name: functools.partial(lambda model, layers: [change(model[i]) for i in layers], layers=layers)
        for name, layers in places.items()
    }


def _shifted(strength: float) -> Plant:
    def plant(model: nn.Sequential) -> None:
        shift = torch.randn(16, generator=torch.Generator().manual_seed(0))
        model[4].running_mean += strength * model[4].running_var.sqrt() * shift

    return plant


def _frozen(norm: nn.Module) -> None:
    norm.requires_grad_(False)


def _untracked(norm: nn.Module) -> None:
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    norm.track_running_stats = False


def _ordered(share: float) -> Callable[[], Case]:
    def make() -> Case:
        x, y = samples()
        noise = torch.rand(COUNT, generator=torch.Generator().manual_seed(0))
        order = torch.argsort(y + CLASSES * (1 - share) * noise)
        return Case(
            trained(), list(zip(x[order].split(32), y[order].split(32), strict=True)), is_scored=False
        )

    return make


def _of_norm(x: Tensor, norm: nn.Module | None = None) -> Case:
    return Case(nn.Sequential(norm or nn.BatchNorm1d(3)).eval(), x.split(64), is_scored=False)


def _normal(count: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


class Twice(nn.Module):
    """Calls one norm for two inputs, so far apart."""

    def __init__(self, apart: float) -> None:
        super().__init__()
        self.norm, self.apart = nn.BatchNorm1d(3), apart

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        found: Tensor = self.norm(x) + self.norm(x + self.apart)
        return found


def _padded(bias: float) -> Case:
    """Return a norm between two convolutions, which turns padding into its bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, padding=1))
        nn.init.zeros_(model[0].bias)
        nn.init.constant_(model[1].bias, bias)
        lengths = torch.tensor([20, 12, 7, 16])
        x = torch.randn(4, 3, 20) * (torch.arange(20) < lengths[:, None])[:, None]
    return Case(model.eval(), [x], is_scored=False)


def _exported(layers: tuple[int, ...]) -> Case:
    model = trained()
    for layer in layers:
        model[layer].train()
    x, open_batch = samples()[0][:8], ({0: torch.export.Dim.AUTO},)
    return Case(torch.export.export(model, (x,), dynamic_shapes=open_batch).module())


def _spoiled(count: int) -> Case:
    x, y = samples()
    x[:count, 0] = math.inf
    return Case(trained(), list(zip(x.split(32), y.split(32), strict=True)))


def _bias_before(scale: float) -> Case:
    model = trained()
    model[3] = nn.Linear(16, 16)
    model[3].weight.data.copy_(_weights()["3.weight"])
    model[3].bias.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(scale)
    batchnorm.calibrate(model, batches(), group=False)
    return Case(model)


def _dropout(rate: float) -> Case:
    model = trained()
    model.insert(4, nn.Dropout(rate))
    return Case(model.eval())


def _mixed(convert: Callable[[nn.Sequential], object]) -> Callable[[], Case]:
    def make() -> Case:
        model = trained()
        convert(model)
        return Case(model)

    return make


def _sync_stock(model: nn.Sequential) -> None:
    model[4] = nn.SyncBatchNorm.convert_sync_batchnorm(model[4])


def _few_of_one(number: int) -> Callable[[], Case]:
    ones = [(x, y) for x, y in batches(1)[:number]]
    return lambda: Case(trained(), [*batches(), *ones], {"samples": COUNT + number + 1}, is_scored=False)


def _meta() -> Case:
    with torch.device("meta"):
        return Case(nn.BatchNorm1d(3).eval(), is_scored=False)


def _decayed(decay: float) -> Case:
    model = trained()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    return Case(model, None, {"optimizer": optimizer})


def _plants(strengths: dict[str, Plant], **rest: Any) -> dict[str, Callable[[], Case]]:
    return {told: _planted(plant, **rest) for told, plant in strengths.items()}


def _fills(name: str, values: Iterable[tuple[str, float, int]]) -> dict[str, Callable[[], Case]]:
    return {told: _planted(filled(name, value, count)) for told, value, count in values}


def _of(make: Callable[[Any], Case], told: str, strengths: Iterable[Any]) -> dict[str, Callable[[], Case]]:
    return {told.format(value): functools.partial(make, value) for value in strengths}


FAULTS: dict[str, dict[str, Callable[[], Case]]] = {
    "nonfinite-statistics": _fills("running_mean", [(f"{n} of 16", math.nan, n) for n in (1, 8, 16)]),
    "nonfinite-parameters": _fills("weight", [(f"{n} of 16", math.nan, n) for n in (1, 8, 16)]),
    "nonfinite-output": _of(_spoiled, "{} of 512 with inf", (1, 8, 64)),
    "negative-variance": _fills("running_var", [(f"{v:g}", v, 1) for v in (-1e-9, -1.0, -1e6)]),
    "never-updated": _plants(_each(lambda norm: norm.reset_running_stats())),
    "batch-mates": _plants(_each(lambda norm: norm.train()), data=batches()),
    "training-graph": {
        told: functools.partial(_exported, layers)
        for told, layers in (("norm 2", (4,)), ("norm 1", (1,)), ("both norms", (1, 4)))
    },
    "gap": _plants({f"{v:g} std": _shifted(v) for v in (0.3, 1.0, 3.0)}, data=batches()),
    "statistics-off": _plants({f"{v:g} std": _shifted(v) for v in (0.3, 1.0, 3.0)}, data=batches()),
    "frozen-parameters": _plants(_each(_frozen)),
    "mixed-modes": _plants(_each(lambda norm: norm.train())),
    "momentum": _plants({f"{v:g}": momentum(v) for v in (0.5, 0.9, 0.997)}),
    "prior": _plants({f"{n} updates": few_updates(n) for n in (24, 8, 2)}),
    "padding": _of(_padded, "bias {}", (0.01, 0.1, 1.0)),
    "ordered-batches": {f"{share:.0%} by class": _ordered(share) for share in (0.4, 0.7, 1.0)},
    "small-batches": {
        f"of {n}": _planted(lambda _: None, data=batches(n), is_scored=False) for n in (8, 4, 2)
    },
    "one-value": {f"{n} batches of one": _few_of_one(n) for n in (1, 4, 16)},
    "untracked": _plants(_each(_untracked)),
    "mixed-synchronization": {
        "norm 2": _mixed(lambda model: batchnorm.convert(model[4], batchnorm.Synced())),
        "norm 1": _mixed(lambda model: batchnorm.convert(model[1], batchnorm.Synced())),
        "norm 2, torch's": _mixed(_sync_stock),
    },
    "half-statistics": {
        "norm 2, bfloat16": _planted(lambda model: model[4].bfloat16(), is_scored=False),
        "bfloat16": _planted(lambda model: model.bfloat16(), is_scored=False),
        "float16": _planted(lambda model: model.half(), is_scored=False),
    },
    "huge-variance": _fills("running_var", [(f"{v:g}", v, 1) for v in (1e13, 1e20, 1e30)]),
    "zero-variance": _fills("running_var", [(f"{n} of 16", 0.0, n) for n in (1, 8, 16)]),
    "offset": _of(lambda v: _of_norm(_normal() + v), "{:g} std", (300.0, 3e3, 1e5)),
    "half-overflow": _of(lambda v: _of_norm(v * _normal()), "{:g} times normal", (2e4, 1e5, 1e10)),
    "repeated-calls": _of(
        lambda v: Case(Twice(v).eval(), _normal().split(64), is_scored=False), "{:g} apart", (1.0, 2.0, 10.0)
    ),
    "dropout-before": _of(_dropout, "rate {:g}", (0.1, 0.2, 0.5)),
    "weight-decay": _of(_decayed, "{:g}", (1e-5, 5e-4, 1e-2)),
    "dead-channels": _fills("weight", [(f"{n} of 16", 0.0, n) for n in (1, 8, 16)]),
    "frozen-statistics": _plants(_each(lambda norm: batchnorm.freeze(norm))),
    "bias-before": _of(_bias_before, "{:g}", (0.1, 1.0, 10.0)),
    "training-mode": _plants({"the model": lambda model: model.train()}),
    "unreadable": {
        "lazy": lambda: Case(nn.LazyBatchNorm1d().eval(), is_scored=False),
        "meta device": _meta,
    },
}


def measure(quick: bool = False) -> Rows:
    """Return a row per check: for each strength, the points of accuracy that it costs, and what is found."""
    healthy = accuracy(trained())
    rows = []
    for check in CHECKS:
        made = {told: make() for told, make in (FAULTS.get(check) or {}).items()}
        rows.append(
            {
                "check": check,
                "strengths": [strength(check, told, case, healthy) for told, case in made.items()],
            }
        )
    return rows[:3] if quick else rows


def strength(check: str, told: str, case: Case, healthy: float) -> Row:
    """Return what a fault costs, in points of accuracy, and the most severe finding of its check."""
    lost = 100 * (healthy - accuracy(case.model)) if case.is_scored else None
    found = batchnorm.diagnose(case.model, case.data, **case.options)
    severities = [of.severity for of in found.findings if of.check == check]
    return {"strength": told, "lost": lost, "found": severities[0] if severities else None}


def faults_table(rows: Rows) -> str:
    """Each check with its strengths, the weakest first."""
    return table_of(
        {
            "check": f"`{row['check']}`",
            **{
                name: _shown(of)
                for name, of in zip(("weakest", "middle", "strongest"), _three(row), strict=True)
            },
        }
        for row in rows
    )


def _three(row: Row) -> list[Row | None]:
    return [*row["strengths"], None, None, None][:3]


def _shown(strength: Row | None) -> str:
    if strength is None:
        return ""
    lost = "" if strength["lost"] is None else f", costs {abs(strength['lost']):.1f}"
    return f"{strength['strength']}{lost}: {strength['found'] or 'not found'}"
