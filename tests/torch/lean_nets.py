"""Small networks whose gradients `lean` must not change, and what it takes to see that it does something."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import batchnorm
from tests.torch.twins import scramble

Around = Callable[[], AbstractContextManager[object]]


def norm(channels: int, activation: str | None = "relu") -> nn.Module:
    return scramble(batchnorm.BatchNorm2d(channels, activation=activation))


def conv(inputs: int, outputs: int, size: int = 3, groups: int = 1, stride: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups)


class Residual(nn.Module):
    """A block whose last norm adds the shortcut: basic, a bottleneck, or inverted."""

    def __init__(self, inputs: int, widths: tuple[int, ...], activation: str | None = "relu") -> None:
        super().__init__()
        self.body = nn.Sequential()
        channels = inputs
        for number, width in enumerate(widths):
            size = 3 if number == len(widths) // 2 else 1
            self.body.append(conv(channels, width, size, groups=width if width == channels else 1))
            if number < len(widths) - 1:
                self.body.append(norm(width, "relu6" if activation is None else activation))
            channels = width
        self.norm = norm(channels, activation)
        self.down = nn.Sequential(conv(inputs, channels, 1), norm(channels, None))
        self.projects = inputs != channels

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x), self.down(x) if self.projects else x)


class PreActivation(nn.Module):
    """Norm → activation → convolution, twice, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            norm(channels), conv(channels, channels), norm(channels, "silu"), conv(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Dense(nn.Module):
    """What comes out stands behind what came in."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(norm(channels), conv(channels, growth))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


class Gated(nn.Module):
    """Channels weighed by a gate in 0..1, that a norm with a sigmoid gives."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels, "silu")
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(channels, channels, 1))
        self.squash = norm(channels, "sigmoid")
        self.project = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.project(y * self.squash(self.gate(y)))


class UNet(nn.Module):
    """Skips and a concatenation, a norm upon it, and a norm of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(3, 6), norm(6), conv(6, 6), norm(6, "gelu"))
        self.inner = nn.Sequential(conv(6, 8), norm(8, None), norm(8, "tanh"), nn.ConvTranspose2d(8, 6, 2, 2))
        self.up = nn.Sequential(norm(12), conv(12, 6), norm(6))

    def forward(self, x: Tensor) -> Tensor:
        beside = self.down(x)
        inner = self.inner(nn.functional.max_pool2d(beside, 2))
        return self.up(torch.cat((beside, inner), 1))


NETS: dict[str, Callable[[], nn.Module]] = {
    "VGG": lambda: nn.Sequential(
        conv(3, 6),
        norm(6),
        nn.MaxPool2d(2),
        conv(6, 8),
        norm(8, "leaky_relu"),
        nn.MaxPool2d(2),
        nn.Dropout(0.3),
    ),
    "basic blocks": lambda: nn.Sequential(
        conv(3, 6),
        norm(6),
        Residual(6, (6, 6)),
        Residual(6, (8, 8)),
        *(Residual(8, (8, 8)) for _ in range(9)),
    ),
    "bottlenecks": lambda: nn.Sequential(
        conv(3, 4), norm(4), Residual(4, (4, 4, 8)), *(Residual(8, (4, 4, 8)) for _ in range(6))
    ),
    "pre-activation": lambda: nn.Sequential(conv(3, 6), *(PreActivation(6) for _ in range(3)), norm(6)),
    "dense": lambda: nn.Sequential(
        conv(3, 4), *(Dense(4 + 3 * k, 3) for k in range(4)), norm(16), conv(16, 4)
    ),
    "inverted": lambda: nn.Sequential(
        conv(3, 4), norm(4), *(Residual(4, (12, 12, 4), None) for _ in range(7)), Gated(4)
    ),
    "U-Net": UNet,
}


def small_net(depth: int = 2) -> nn.Module:
    """Return convolutions with norms behind them."""
    torch.manual_seed(3)
    layers = [layer for _ in range(depth) for layer in (conv(4, 4), norm(4, "silu"))]
    return nn.Sequential(*layers, conv(4, 3))


def gradients(
    model: nn.Module, x: Tensor, around: Around = contextlib.nullcontext, steps: int = 2
) -> dict[str, Tensor]:
    """Return loss, all gradients and the state after some steps of SGD of a copy, random cotangents."""
    model = copy.deepcopy(model)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = {}
    for step in range(steps):
        leaf = x.clone().requires_grad_()
        with around():
            y = model(leaf)
            loss = (y * torch.randn_like(y)).sum()
        optimizer.zero_grad()
        loss.backward()
        found |= {f"loss {step}": loss.detach(), f"dx {step}": leaf.grad}
        found |= {f"d{n} {step}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return found | {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Watch:
    """The storages of what goes into a model's norms, and comes out of them, while hooks are there."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: list[StorageWeakRef] = []
        self.outputs: list[StorageWeakRef] = []
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self._handles = [m.register_forward_hook(self._see) for m in norms]

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(StorageWeakRef(inputs[0].untyped_storage()))
        self.outputs.append(StorageWeakRef(output.untyped_storage()))

    def alive(self) -> tuple[int, int]:
        """Return how many inputs and outputs are in memory."""
        gc.collect()
        return tuple(sum(not s.expired() for s in kind) for kind in (self.inputs, self.outputs))
