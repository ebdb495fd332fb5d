"""The recipes of docs/recipes.md: each program runs, and does what it says, on other models too."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm

_PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
_PROGRAMS = re.findall(r"```py(?:thon)?\n(.*?)```", _PAGE, re.DOTALL)


def _program(containing: str) -> dict[str, Any]:
    """Run the program with this text, and return its names."""
    (code,) = (code for code in _PROGRAMS if containing in code)
    names: dict[str, Any] = {}
    exec(compile(code, "recipe", "exec"), names)
    return names


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.again = self.first
        self.norms = nn.ModuleList(
            [batchnorm.BatchNorm1d(8), nn.BatchNorm1d(8, affine=False), nn.LayerNorm(8)]
        )
        self.scale = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.ones(3))


def test_row_57_norms_and_biases_do_not_decay() -> None:
    """Row 57: each parameter is in one group; without a gradient, those of norms and biases stay."""
    groups = _program("parameter_groups")["parameter_groups"]
    model = _Tied()
    decayed, rest = groups(model, weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in decayed["params"]] == ["scale", "first.weight"]
    assert {names[p] for p in rest["params"]} == set(names.values()) - {"scale", "first.weight"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([decayed, rest], lr=0.5).step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in ("scale", "first.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_row_59_group_norms_take_over_weight_and_bias() -> None:
    """Row 59: at any depth, a shared norm once; with one group per channel, an instance normalization."""
    replace = _program("to_group_norm")["to_group_norm"]
    shared = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.Sequential(shared), batchnorm.BatchNorm2d(6, affine=False), shared).eval()
    weight = shared.weight
    assert replace(model, groups=6) is model
    assert model[0][0] is model[2]
    assert model[2].weight is weight
    assert not model[2].training
    x = torch.randn(3, 6, 4, 4)
    torch.testing.assert_close(model[1](x), nn.functional.instance_norm(x))


def test_row_59_every_norm_is_checked_before_any_is_replaced() -> None:
    """Row 59: channels that do not divide, and an activation that would be lost."""
    replace = _program("to_group_norm")["to_group_norm"]
    for last, says in (
        (nn.BatchNorm2d(12), "1.0 has 12 channels, which 8 groups do not divide"),
        (batchnorm.BatchNorm2d(8, activation="relu"), "1.0 applies relu"),
    ):
        model = nn.Sequential(nn.BatchNorm2d(16), nn.Sequential(last))
        with pytest.raises(ValueError, match=says):
            replace(model, groups=8)
        assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated, and says so many times
def test_row_46_folded_and_then_quantized() -> None:
    """Row 46: no norm is left; the quantized model is near the float one, though its γ has zeros."""
    torch.manual_seed(0)
    ran = _program("prepare_fx")
    kinds = [type(module) for module in ran["quantized"].modules()]
    assert sum("quantized" in kind.__module__ for kind in kinds) == 2
    assert not any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    exact, found = ran["model"](ran["x"]), ran["quantized"](ran["x"])
    assert (found - exact).abs().max() < 0.06 * exact.abs().max()
    # A lone norm, as in DenseNet: before the convolution, behind nothing; with channels whose γ is 0.
    lone = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        lone[0].weight[1] = 0.0
        lone[0].running_mean.fill_(0.3)
    x = ran["x"]
    folded = batchnorm.fold(lone, x)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    prepared = ran["prepare_fx"](folded, ran["get_default_qconfig_mapping"](), (x,))
    prepared(x)
    found = ran["convert_fx"](prepared)(x)
    assert (found - lone(x)).abs().max() < 0.06 * lone(x).abs().max()


def _pooled(layer: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of what a linear layer gives for all samples, in float64."""
    received = x.double() @ layer.weight.detach().double().T + layer.bias.detach().double()
    return received.mean(0).float(), received.var(0).float()


def _assert_statistics(norm: nn.Module, wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(norm.running_mean, wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("average", ["ema", "swa", "swa, with buffers"])
def test_row_39_an_average_has_statistics_of_its_own_weights(average: str) -> None:
    """Rows 11 and 39: copied or averaged, buffers are off; calibrated, they are those of its weights."""
    ran = _program("AveragedModel")
    averaged, x, model = ran["averaged"], ran["x"], ran["model"]
    _assert_statistics(averaged.module[1], _pooled(averaged.module[0], x))
    if average != "ema":
        averaged = ran["AveragedModel"](model, use_buffers="buffers" in average)
        for batch in x.split(100):
            with torch.no_grad():
                model[0].weight.add_(0.1 * torch.randn_like(model[0].weight))
            model(batch)
            averaged.update_parameters(model)
        wanted = _pooled(averaged.module[0], x)
        if "buffers" not in average:
            assert torch.equal(averaged.module[1].running_mean, model[1].running_mean)
        assert not torch.allclose(averaged.module[1].running_var, wanted[1], rtol=0.01)
        batchnorm.calibrate(averaged, x.split(64))
        _assert_statistics(averaged.module[1], wanted)


def test_row_38_a_target_network_follows_with_its_running_statistics() -> None:
    """Row 38: parameters, statistics and counters; in float64 by hand; and calibrated, by its own weights."""
    ran = _program("def follow")
    _assert_statistics(ran["target"][1], _pooled(ran["target"][0], ran["states"]))
    critic, target = ran["critic"], copy.deepcopy(ran["target"])
    by_hand = {name: value.double() for name, value in target.state_dict().items()}
    for part in ran["states"].split(300):
        critic(part)
        ran["follow"](target, critic, share=0.25)
        for name, value in critic.state_dict().items():
            by_hand[name] += 0.25 * (value.double() - by_hand[name])
    for name, value in target.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, by_hand[name].float())
    assert target[1].num_batches_tracked == critic[1].num_batches_tracked
    assert not target.training


def test_scripts_of_timm() -> None:
    """The recipe is Python, and runs where timm imports: it needs torchvision, which not every torch has."""
    (code,) = (code for code in _PROGRAMS if "import timm" in code)
    program = compile(code, "recipe", "exec")
    if all(importlib.util.find_spec(name) for name in ("timm", "torchvision")):
        names: dict[str, Any] = {}
        exec(program, names)
        norms = [m for m in names["ema"].module.modules() if isinstance(m, batchnorm.BatchNorm2d)]
        assert norms
