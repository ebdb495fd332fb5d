"""The measures behind the experiments, against what can be computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import batchnorm
from batchnorm.claims.tools import (
    CORRUPTIONS,
    activations_by_depth,
    adapted_error,
    along_gradient,
    corrupted,
    error_over_samples,
    gradients_by_depth,
    growth_per_layer,
    noise_behind_norms,
    variance_shift,
)


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), batchnorm.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(*layers, nn.Linear(8, 8), batchnorm.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_line_along_the_gradient_of_a_quadratic() -> None:
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    curvatures = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 0.5]]))
    start = model.weight[0].detach().clone()
    line = along_gradient(model, lambda: 0.5 * (curvatures * model.weight[0] ** 2).sum(), (0.1, 0.3))
    gradient = curvatures * start
    for length, loss, distance in zip((0.1, 0.3), line.losses, line.distances, strict=True):
        there = start - length * gradient
        assert loss == pytest.approx(float(0.5 * (curvatures * there**2).sum()))
        assert distance == pytest.approx(float((curvatures * length * gradient).norm()))
    assert line.smoothness == pytest.approx(float((curvatures * gradient).norm() / gradient.norm()))
    assert line.spread == pytest.approx(max(line.losses) - min(line.losses))
    assert torch.equal(model.weight[0], start)


def test_the_line_leaves_the_model_as_it_was_also_after_an_error(network: nn.Sequential) -> None:
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    before, calls = state(network), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("in between")
        return cross_entropy(network(x), y)

    with pytest.raises(RuntimeError, match="in between"):
        along_gradient(network, loss, (0.1, 0.2, 0.3))
    assert_unchanged(network, before)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_gradients_and_activations_by_depth_are_those_of_a_step(network: nn.Sequential) -> None:
    network[3].p = 0.0
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    before = state(network)
    norms = gradients_by_depth(network, lambda: cross_entropy(network(x), y))
    activations = activations_by_depth(network, lambda: network(x))
    assert_unchanged(network, before)
    cross_entropy(network(x), y).backward()
    assert list(norms) == ["0", "4", "7"] == list(activations)
    for name, norm in norms.items():
        assert norm == pytest.approx(float(network.get_submodule(name).weight.grad.norm()), rel=1e-5)
    assert activations["0"] == pytest.approx(network[0](x).square().mean().sqrt().item(), rel=1e-5)


def test_growth_per_layer_of_a_geometric_series() -> None:
    assert growth_per_layer([1.21**power for power in (5, 4, 3, 2)]) == pytest.approx(1.21)
    assert growth_per_layer([1.0, 2.0, 4.0]) == pytest.approx(0.5)


def test_noise_is_behind_norms_in_training_and_gone_behind_the_context() -> None:
    norm = batchnorm.BatchNorm1d(200)
    x = torch.randn(400, 200)
    plain = norm(x)
    with noise_behind_norms(norm, shift=0.5, scale=1.25):
        torch.manual_seed(0)
        noisy = norm(x)
        again = norm(x)
        norm.eval()
        evaluated = norm(x)
    assert torch.equal(evaluated, norm(x))
    norm.train()
    assert torch.equal(norm(x), plain)
    means, deviations = noisy.mean(0), noisy.std(0)
    assert 0.4 < means.max().item() < 0.55
    assert -0.55 < means.min().item() < -0.4
    assert 0.75 < deviations.min().item() < 0.85
    assert 1.2 < deviations.max().item() < 1.35
    assert (again.mean(0) - means).abs().mean().item() > 0.1  # drawn anew


def test_error_over_samples_calibrates_copies(network: nn.Sequential) -> None:
    x, before = torch.randn(64, 4) + 3, state(network)
    found = error_over_samples(network, x, (8, 64), lambda model: float(model[1].running_mean.norm()))
    assert_unchanged(network, before)
    for size, norm in found.items():
        inputs = network[0](x[:size]).mean(0)
        assert norm == pytest.approx(inputs.norm().item(), rel=1e-4)


def test_variance_shifts_by_what_dropout_adds(network: nn.Sequential) -> None:
    x, before = torch.randn(4000, 4), state(network)
    norms = [network[1], network[5]]
    first, second = variance_shift(network, norms, x)
    assert_unchanged(network, before)
    assert first == pytest.approx(1, abs=1e-3)  # no dropout before it
    # Kept with probability 1/2, the weighted inputs' variance grows by Σ w² E[h²] over the channels.
    hidden = network[:3](x)
    weight = network[4].weight
    plain = (hidden @ weight.T).var(0)
    expected = ((plain + hidden.square().mean(0) @ weight.T.square()) / plain).mean().item()
    assert second == pytest.approx(expected, rel=0.1)
    network[3].p = 0.0
    assert variance_shift(network, norms, x) == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_their_strength(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    changes = [float((corrupted(x, kind, strength) - x).square().mean()) for strength in range(1, 6)]
    assert changes == sorted(changes)
    assert changes[0] > 0
    assert torch.equal(corrupted(x, kind, 3, seed=1), corrupted(x, kind, 3, seed=1))
    if kind != "noise":  # neither blur nor contrast changes an even image
        even = torch.full((1, 3, 16, 16), 0.3)
        torch.testing.assert_close(corrupted(even, kind, 5), even)


@pytest.mark.parametrize("prior", [None, 0.0, 16.0])
def test_adapted_error_is_of_the_mixed_statistics(prior: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), batchnorm.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    x, y = torch.rand(24, 1, 8, 8) * 2 + 1, torch.randint(5, (24,))
    wrong = 0
    for images, classes in zip(x.split(8), y.split(8), strict=True):
        inputs = model[0](images)
        share = 0.0 if prior is None else 8 / (8 + prior)
        mean = share * inputs.mean((0, 2, 3))
        var = (1 - share) + share * inputs.var((0, 2, 3), correction=0)
        normalized = (inputs - mean.view(4, 1, 1)) / (var.view(4, 1, 1) + 1e-5).sqrt()
        wrong += int((model[2:](normalized).argmax(1) != classes).sum())
    found = adapted_error(copy.deepcopy(model), x, y, prior=prior, batch_size=8)
    assert found == pytest.approx(wrong / 24, abs=1e-6)
