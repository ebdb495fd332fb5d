"""Small networks that are trained in a second, with faults planted into them, and remedies that are run."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.doctor.findings import Diagnosis, Finding

CLASSES = 4


def network(norm: type[nn.Module] = nn.BatchNorm1d, momentum: float = 0.1) -> nn.Sequential:
    """Two normalized layers and a classifier."""
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), norm(16, momentum=momentum), nn.ReLU(),
        nn.Linear(16, 16, bias=False), norm(16, momentum=momentum), nn.ReLU(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def samples(count: int = 512, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Points around a centre per class, `[N, 8]`, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    return centres[y] + torch.randn(count, 8, generator=generator), y


def batches(size: int = 32, count: int = 512) -> list[tuple[Tensor, Tensor]]:
    """The samples in batches of (x, y)."""
    x, y = samples(count)
    return list(zip(x.split(size), y.split(size), strict=True))


@functools.cache
def _weights() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(5):
            for x, y in batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        batchnorm.calibrate(model, batches())
    return model.state_dict()


def trained() -> nn.Sequential:
    """Return the network, trained and in evaluation; its running statistics are those of the samples."""
    model = network()
    model.load_state_dict(_weights())
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Accuracy on the samples, in evaluation."""
    x, y = samples()
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def checks(diagnosis: Diagnosis) -> set[tuple[str, str, str | None]]:
    """Return severity, check and layer of each finding."""
    return {(found.severity, found.check, found.layer) for found in diagnosis.findings}


def only(diagnosis: Diagnosis, check: str) -> Finding:
    """Return the first finding of a check."""
    found = [finding for finding in diagnosis.findings if finding.check == check]
    assert found, f"no {check}: {diagnosis}"
    return found[0]


def applied(finding: Finding, **names: object) -> dict[str, object]:
    """Run the remedy of a finding as it is printed, and return what its names hold afterwards."""
    scope: dict[str, object] = {"batchnorm": batchnorm, "torch": torch, **names}
    exec(compile(finding.remedy, finding.check, "exec"), scope)
    return scope
