"""Networks that the verbs are tried on, and what it takes for two of them to be the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from tests.torch.twins import assert_same, scramble, state

TIGHT = (1e-9, 1e-10)  # float64: some layers, each within a few ulps, over a few steps


class Basic(nn.Module):
    """torchvision's BasicBlock: one ReLU in two places, an addition in place."""

    def __init__(self, channels: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Unit(nn.Module):
    """A convolution and its norm, and an activation or none: what other blocks end with."""

    def __init__(self, activation: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class Residual(nn.Module):
    """The norm is in a child, the addition and a functional activation in the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(Unit(nn.SiLU()), Unit(None))
        self.slope = 0.01

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.layer(x))


class Functional(nn.Module):
    """Functions and methods as activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x).sigmoid()), inplace=True))


class Branching(nn.Module):
    """Control flow: the block is no graph; only running it shows what follows the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise RuntimeError("too large")
        y = self.act(self.norm(x))
        return y + self.other(y)


class Looping(nn.Module):
    """A loop over lists of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x)))
        return x


class Broadcast(nn.Module):
    """What is added has another shape than the norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return F.relu(self.norm(x) + mean)


def resnet() -> nn.Module:
    """Stem, two blocks, a head."""
    down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5))
    return nn.Sequential(stem, Basic(4), Basic(4, down), head)


def scrambled(model: nn.Module) -> nn.Module:
    """Return the model in float64 with norms away from their initial state."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            scramble(module)
    return model.double()


def assert_alike(model: nn.Module, stock: nn.Module, x: Tensor, steps: int = 4) -> None:
    """Raise unless both give the same outputs, gradients, parameters and statistics over some steps of SGD.

    In evaluation, then in training with random cotangents, then in evaluation again; dropout draws the same.
    """
    cotangents = [torch.randn_like(stock.eval()(x)) for _ in range(steps)]
    found = [_trained(copy.deepcopy(one), x, cotangents) for one in (model, stock)]
    assert_same(found[0], found[1], TIGHT)


def _trained(model: nn.Module, x: Tensor, cotangents: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {"y in evaluation": model.eval()(x).detach()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for step, cotangent in enumerate(cotangents):
        leaf = x.clone().requires_grad_()
        optimizer.zero_grad()
        y = model(leaf)
        y.backward(cotangent)
        found |= {f"y {step}": y.detach(), f"dx {step}": leaf.grad}
        found |= {f"d{n} {step}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return found | state(model) | {"y afterwards": model.eval()(x).detach()}


def anatomy(model: nn.Module) -> list[object]:
    """Return what a verb that raises must have left: classes, attributes, registrations, tensors, hooks."""
    return [
        (
            name,
            type(module),
            {k: _frozen(v) for k, v in vars(module).items()},
            {k: (id(t), None if t is None or is_lazy(t) else t.tolist()) for k, t in _own_tensors(module)},
        )
        for name, module in model.named_modules()
    ]


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]


def _frozen(value: object) -> object:
    return (id(value), tuple((k, id(v)) for k, v in value.items())) if isinstance(value, dict) else id(value)


def refuses(verb: Callable[..., object], model: nn.Module, *args: object) -> str:
    """Call a verb that must raise, check that the model is untouched, and return the message."""
    before = anatomy(model)
    try:
        verb(model, *args)
    except Exception as error:
        assert anatomy(model) == before
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{verb} did not raise")
