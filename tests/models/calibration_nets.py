"""Networks whose norms depend on one another in every way, and their statistics computed independently."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

import batchnorm
from tests.models import nets


class Branches(nn.Module):
    """Two branches of unequal depth, joined; a norm on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.right = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4))
        self.join = batchnorm.BatchNorm2d(4, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.join(self.left(x), residual=self.right(x))


class Twice(nn.Module):
    """One norm, called for two inputs of which neither depends on it, and another behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(x) * self.shared(2 * x + 1))


class Chained(nn.Module):
    """One norm called on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x))


class Routed(nn.Module):
    """Each batch takes one of two ways, by its own values; the norms stand in another order on each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0, 0, 0] > 0:
            return self.third(self.second(F.relu(self.first(x))))
        return self.third(self.first(x))


class Again(nn.Module):
    """For some batches the first norm is called once more, behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return y + self.first(2 * x) if x[0, 0, 0, 0] > 0 else y


class Swapped(nn.Module):
    """The order of two norms depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x[0, 0, 0, 0] > 0 else self.a(self.b(x))


class Hidden(nn.Module):
    """The second norm depends on the first through numbers, memory and kernels that are no operators."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.how(self.first(x), x))


class Kernel(nn.Module):
    """Computes by a kernel that is no operator, and that torch's modes do not see."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return batchnorm.functional.normalize_batch(y + x)[0]


class Compiled(nn.Module):
    """Computes as an extension in C++ does: nothing of it is seen from Python."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return (y + x).exp()


def _written(y: Tensor, x: Tensor) -> Tensor:
    found = torch.empty_like(x)
    found[:] = y
    return found


def _added(y: Tensor, x: Tensor) -> Tensor:
    found = [x.clone()]
    torch._foreach_add_(found, [y])
    return found[0]


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "item": lambda y, x: x * y.amax().item(),
    "numpy": lambda y, x: x + torch.from_numpy(y.numpy().copy()),
    "tolist": lambda y, x: torch.tensor(y.tolist(), dtype=x.dtype),
    "branch": lambda y, x: x.exp() if y.max() > 2 else x.sin(),
    "written into": _written,
    "written by a list of tensors": _added,
    "a view": lambda y, x: x.clone().flatten().copy_(y.flatten()).view_as(x),
    "a selection": lambda y, x: x * (1 + y[y > 0].numel()),
    "a module with a kernel": Kernel(),
    "a module in C++": Compiled(),
    "our function": lambda y, x: batchnorm.functional.batch_norm(y, None, None, training=True, eps=0.5) * x,
    "our layer": lambda y, x: batchnorm.BatchNorm2d(3, eps=0.5, track_running_stats=False).to(x)(y) * x,
}


def dense() -> nn.Module:
    """Eight layers, each with a norm, of both makers."""
    layers: list[nn.Module] = []
    for depth in range(8):
        norm = nn.BatchNorm1d if depth % 2 else batchnorm.BatchNorm1d
        layers += [nn.Linear(6, 6), norm(6), nn.ELU()]
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), *layers)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": nets.resnet,
    "branches": Branches,
    "dense": dense,
    "twice": Twice,
    "loop": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nets.Looping()),
    "control flow": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nets.Branching()),
}


def images(count: int) -> Tensor:
    """Return images `[count, 3, 4, 4]` whose channels differ in mean and spread, in no order."""
    spread = torch.tensor([1.0, 3.0, 0.5]).view(-1, 1, 1)
    return (torch.randn(count, 3, 4, 4) + torch.tensor([0.0, 2.0, -5.0]).view(-1, 1, 1)) * spread


def by_hand(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (mean, unbiased var) of each norm, norm after norm, on all of x at once in float64.

    In evaluation, with hooks that note what each norm receives. Of the norms that have no statistics yet,
    those are next whose input stays the same when the outputs of all such norms change.
    """
    model = copy.deepcopy(model).double().eval()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    norms = {n: m for n, m in norms.items() if m.running_mean is not None}
    done: dict[str, tuple[Tensor, Tensor]] = {}
    while len(done) < len(norms):
        seen = [_received(model, norms, done, x, seed) for seed in (1, 2)]
        ready = [n for n in norms if n not in done and torch.equal(seen[0][n], seen[1][n])]
        assert ready, "a circle"
        for name in ready:
            wide = seen[0][name].transpose(0, 1).flatten(1)
            done[name] = (wide.mean(1), wide.var(1, correction=1))
            norms[name].running_mean, norms[name].running_var = done[name]
    return done


def _received(
    model: nn.Module, norms: dict[str, nn.Module], done: dict[str, object], x: Tensor, seed: int
) -> dict[str, Tensor]:
    received: dict[str, list[Tensor]] = {name: [] for name in norms}
    generator = torch.Generator().manual_seed(seed)
    handles = []
    for name, norm in norms.items():
        handles.append(
            norm.register_forward_pre_hook(lambda _m, args, name=name: received[name].append(args[0].clone()))
        )
        if name not in done:
            handles.append(
                norm.register_forward_hook(
                    lambda _m, _args, y: torch.randn(y.shape, generator=generator, dtype=y.dtype)
                )
            )
    with torch.no_grad():
        model(x.double())
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in received.items()}
