"""Small networks that are trained on CPUs, with a norm of choice.

Sources: the MLP is that of examples/torch_digits.py, `deep` that of `batchnorm study`; Arık & Pfister 2019,
arXiv:1908.07442 (TabNet); Bhatt et al. 2024, arXiv:1902.05605 (CrossQ).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module | None]  # takes the number of channels; None is no norm at all


def _chain(*layers: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(*(layer for layer in layers if layer is not None))


def mlp(norm: Norm) -> nn.Module:
    """Return the network of examples/torch_digits.py: dense 64, ReLU, norm, dense."""
    return _chain(nn.Linear(784, 64), nn.ReLU(), norm(64), nn.Linear(64, 10))


def deep(norm: Norm) -> nn.Module:
    """Return eight layers of dense 100, norm and sigmoid, and a dense output."""
    layers: list[nn.Module | None] = []
    for inputs in (784, *[100] * 7):
        layers += [nn.Linear(inputs, 100), norm(100), nn.Sigmoid()]
    found = _chain(*layers, nn.Linear(100, 10))
    for layer in found:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return found


def critic(norm: Norm) -> nn.Module:
    """Return two layers of dense 256, norm and ReLU, and a value."""
    hidden: list[nn.Module | None] = []
    for inputs in (24, 256):
        hidden += [nn.Linear(inputs, 256), norm(256), nn.ReLU()]
    return _chain(*hidden, nn.Linear(256, 1))


def conv_net(norm: Norm) -> nn.Module:
    """Return three layers of convolution 3×3, norm and ReLU, to 64 channels, and a dense output."""
    layers: list[nn.Module | None] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), norm(outputs), nn.ReLU()]
    return _chain(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class _GatedLayer(nn.Module):
    """A dense layer, a norm and a gated linear unit."""

    def __init__(self, norm: Norm, dense: nn.Linear) -> None:
        super().__init__()
        self.layers = _chain(dense, norm(dense.out_features), nn.GLU())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


class _FeatureTransformer(nn.Module):
    """Four gated layers, of which all but the first add their input; the first two share their weights."""

    def __init__(self, norm: Norm, shared: tuple[nn.Linear, ...], width: int) -> None:
        super().__init__()
        own = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.layers = nn.ModuleList(_GatedLayer(norm, dense) for dense in (*shared, *own))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = (x + layer(x)) * math.sqrt(0.5)
        return x


class TabNet(nn.Module):
    """A network like TabNet of 54 features and 7 classes, in three steps: 20 norms.

    It has the sizes that libraries have by default. Differs from TabNet: attention is by softmax, not by
    sparsemax, and the first norm is of the same kind as the others.
    """

    FEATURES, CLASSES, _WIDTH, _STEPS = 54, 7, 8, 3

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        width = 2 * self._WIDTH  # half for the decision, half for the attention of the next step
        shared = (
            nn.Linear(self.FEATURES, 2 * width, bias=False),
            nn.Linear(width, 2 * width, bias=False),
        )
        self.first = _chain(norm(self.FEATURES))
        self.transformers = nn.ModuleList(
            _FeatureTransformer(norm, shared, width) for _ in range(self._STEPS + 1)
        )
        self.attention = nn.ModuleList(
            _chain(nn.Linear(self._WIDTH, self.FEATURES, bias=False), norm(self.FEATURES))
            for _ in range(self._STEPS)
        )
        self.head = nn.Linear(self._WIDTH, self.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, `[N, 7]`, of features, `[N, 54]`."""
        x = self.first(x)
        first, *transformers = self.transformers
        attended = first(x)[:, self._WIDTH :]
        prior = torch.ones_like(x)
        decision: Tensor | float = 0.0
        for attention, transformer in zip(self.attention, transformers, strict=True):
            mask = (attention(attended) * prior).softmax(1)
            prior = prior * (1.3 - mask)
            decided, attended = transformer(mask * x).split(self._WIDTH, 1)
            decision = decision + decided.relu()
        found: Tensor = self.head(decision)
        return found


def _normed_mlp(norm: Norm, inputs: int, outputs: int) -> nn.Module:
    """Return an MLP of two layers of 256 units with a norm before each dense layer, as CrossQ has it."""
    layers: list[nn.Module | None] = [norm(inputs)]
    for width in (inputs, 256):
        layers += [nn.Linear(width, 256), nn.ReLU(), norm(256)]
    return _chain(*layers, nn.Linear(256, outputs))


class ActorCritic(nn.Module):
    """A Gaussian policy and two critics, as CrossQ trains them: 9 norms.

    The critics have 256 units per layer; CrossQ's default of 2048 leaves a CPU nothing but matrix products.
    """

    STATE, ACTION = 17, 6

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.actor = _normed_mlp(norm, self.STATE, 2 * self.ACTION)
        self.critics = nn.ModuleList(_normed_mlp(norm, self.STATE + self.ACTION, 1) for _ in range(2))

    def act(self, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return actions, `[N, 6]`, and the logarithms of their densities, `[N, 1]`."""
        mean, log_std = self.actor(state).chunk(2, 1)
        log_std = log_std.clamp(-20, 2)
        action = (mean + log_std.exp() * noise).tanh()
        log_density = -0.5 * noise.square() - log_std - (1 - action.square() + 1e-6).log()
        return action, log_density.sum(1, keepdim=True)

    def least_value(self, state: Tensor, action: Tensor) -> Tensor:
        """Return the lesser of both critics' values, `[N, 1]`."""
        first, second = (one(torch.cat((state, action), 1)) for one in self.critics)
        return torch.minimum(first, second)
