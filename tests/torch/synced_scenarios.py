"""The scenarios of torch's own tests of SyncBatchNorm under DDP, which run on GPUs only there.

Source: `torch.testing._internal.distributed.distributed_test`, test_DistributedDataParallel_SyncBatchNorm and
those that begin so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm

STEPS = 5


class BatchNormNet(nn.Module):
    """torch's: linear, norm over `[N, 40, 1]`, relu, linear."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 40, bias=False)
        self.bn = nn.BatchNorm1d(4, affine=affine)
        self.fc2 = nn.Linear(40, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return class probabilities."""
        y = torch.reshape(self.fc1(x), (-1, 4, 10))
        y = self.fc2(torch.reshape(self.bn(y), (-1, 40)))
        return torch.softmax(y, dim=1)


@dataclass(frozen=True)
class Scenario:
    """One of torch's tests.

    Attributes:
        name: what its name ends with.
        make: the model, with stock norms.
        shape: of a sample.
        samples: of each of two ranks.
        outputs: shape of a target.
        channels_last: layout of the input.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2,)
    samples: tuple[int, int] = (2, 2)
    outputs: tuple[int, ...] = (4,)
    channels_last: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of both ranks."""
        generator = torch.Generator().manual_seed(len(self.name))
        total = sum(self.samples)
        x, target = (torch.randn(total, *s, generator=generator) for s in (self.shape, self.outputs))
        return (x.contiguous(memory_format=torch.channels_last) if self.channels_last else x), target


def _dense() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4))


SCENARIOS = (
    Scenario("SyncBatchNorm", BatchNormNet),
    Scenario(
        "Channels_Last",
        lambda: nn.BatchNorm2d(2, momentum=0.99),
        (2, 5, 3),
        outputs=(2, 5, 3),
        channels_last=True,
    ),
    Scenario("No_Affine", lambda: BatchNormNet(affine=False)),
    Scenario("2D_Input", _dense),
    Scenario("Single_Input_Per_Process", lambda: nn.BatchNorm1d(2), samples=(1, 1), outputs=(2,)),
    Scenario("Diff_Input_Sizes_gradient", BatchNormNet, samples=(2, 3)),
)


def train(model: nn.Module, x: Tensor, target: Tensor, share: float = 1.0) -> dict[str, Tensor]:
    """Return the state after steps on mean squares, times this rank's share of the mean over all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (share * nn.functional.mse_loss(model(x), target)).backward()
        optimizer.step()
    return {
        name.removeprefix("module."): value.detach().clone() for name, value in model.state_dict().items()
    }


def initial(scenario: Scenario) -> nn.Module:
    """Return the stock model, the same in every process."""
    torch.manual_seed(3)
    return scenario.make()


def on_rank(rank: int) -> dict[str, dict[str, Tensor]]:
    """Train under DDP on this rank's part."""
    found = {}
    for scenario in SCENARIOS:
        model = batchnorm.SyncBatchNorm.convert_sync_batchnorm(initial(scenario))
        x, target = (values.split(scenario.samples)[rank] for values in scenario.data())
        share = 2 * scenario.samples[rank] / sum(scenario.samples)
        found[scenario.name] = train(DistributedDataParallel(model), x, target, share)
    return found | {"Diff_Input_Sizes_Running_Value": running_value(rank), "half": half(rank)}


def sizes_of(rank: int) -> Tensor:
    """Return torch's input of a rank, whose length and values differ from the others'."""
    length = 10 ** (rank + 1)
    return torch.cat([torch.ones(2, 1, length) * base ** (rank - 1) for base in (0.1, 0.3)], dim=1)


def running_value(rank: int) -> dict[str, Tensor]:
    """Return running statistics after many batches of the same values."""
    layer = batchnorm.SyncBatchNorm(2, momentum=0.99)
    model = DistributedDataParallel(layer)
    for _ in range(100):
        model(sizes_of(rank)).mean().backward()
    return {"mean": layer.running_mean, "var": layer.running_var}


def half(rank: int) -> dict[str, Tensor]:
    """Return the output of a 16-bit model, and the gradient of its first weight."""
    model = batchnorm.SyncBatchNorm.convert_sync_batchnorm(initial(SCENARIOS[0]).half())
    parallel = DistributedDataParallel(model)
    y = parallel(torch.randn(2, 2, generator=torch.Generator().manual_seed(rank)).half())
    y.backward(torch.randn(2, 4).half())
    return {"y": y.detach(), "gradient": model.fc1.weight.grad}
