"""The copy that `fold` returns: its own tensors, dtypes and layouts, and what else can be done with it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import batchnorm
from batchnorm.models.norms.find import find_norms
from tests.support.exported import run_onnx

from .foldable import assert_equal, folded, ready
from .nets import resnet


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def network(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    return ready(resnet(), dtype), torch.randn(3, 3, 8, 8).to(dtype)


def test_it_shares_no_memory_with_the_model() -> None:
    model, x = network()
    twin = folded(model, x, x, tolerance=1e-5)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not own & {tensor.data_ptr() for tensor in (*twin.parameters(), *twin.buffers())}
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert {name.rpartition(".")[2] for name in twin.state_dict()} == {"weight", "bias"}


def test_frozen_parameters_stay_frozen() -> None:
    model, x = network()
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in batchnorm.fold(model, x).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    """In float64, from the weights as they are: the folded weight is the nearest number of its dtype."""
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), dtype)
    conv, norm = model[0], model[1]
    twin = batchnorm.fold(model)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    assert torch.equal(twin[0].weight, (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
    assert torch.equal(twin[0].bias, (conv.bias.double() * scale + shift).to(dtype))
    x = torch.randn(2, 3, 6, 6).to(dtype)
    folded(model, x, x, tolerance=8 * torch.finfo(dtype).eps)


def test_channels_last_stays() -> None:
    model, x = network()
    model = model.to(memory_format=torch.channels_last)
    twin = folded(model, x, x, tolerance=1e-5)
    conv = twin[0][0]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()


def test_it_is_copied_pickled_loaded_and_folded_again() -> None:
    model, x = network()
    batchnorm.convert(model)
    twin = batchnorm.fold(model, x)
    assert_equal(twin, copy.deepcopy(twin), x, 0.0)
    assert_equal(twin, pickle.loads(pickle.dumps(twin)), x, 0.0)
    other = batchnorm.fold(ready(resnet()), None)
    other.float().load_state_dict(twin.state_dict())
    assert_equal(twin, other, x, 0.0)
    again = batchnorm.fold(twin, x)
    assert_equal(twin, again, x, 0.0)


def test_it_trains_as_a_network_without_norms() -> None:
    model, x = network()
    twin = batchnorm.fold(model, x).train()
    y = twin(x)
    y.backward(torch.randn_like(y))
    assert all(parameter.grad is not None for parameter in twin.parameters())


def _exported(model: nn.Module, x: Tensor) -> Any:
    return export(model, (x,)).module()


def _traced(model: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(model, x)


@pytest.mark.one_in(5)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("to", [_exported, _traced, None], ids=["export", "trace", "onnx"])
@pytest.mark.parametrize("convert", [False, True], ids=["stock", "ours"])
@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
def test_exports_keep_eps_mode_and_outputs(to: Any, convert: bool, fold: bool, tmp_path: Path) -> None:
    """Row 29: an export of the folded and of the unfolded model gives the model's outputs in evaluation.

    Each norm has an eps of its own, which counts: variances are small.
    """
    model, x = network()
    for number, found in enumerate(find_norms(model)):
        norm: Any = found.module
        norm.eps, norm.momentum = 0.3 + number / 10, 0.9
        norm.running_var.mul_(0.2)
    if convert:
        batchnorm.convert(model)
    with torch.no_grad():
        wanted = model.eval()(x)
    given = batchnorm.fold(model.train(), x) if fold else model.eval()
    before = {name: buffer.clone() for name, buffer in given.named_buffers()}
    if to is None:
        y, _ = run_onnx(given, (x,), tmp_path)
    else:
        y = to(given, x)(x)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in given.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in given.named_buffers())
    assert all(found.module.momentum == 0.9 for found in find_norms(model))
