"""`convert`, `revert`, `fuse` and `inspect` on real modules: what changes, and all that does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.models.verify import AgreementError
from tests.models.nets import anatomy


class Residual(nn.Module):
    """conv → norm → relu, conv → norm → add → relu, with one activation called twice, as in torchvision."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        found: Tensor = self.relu(out)
        return found


def network() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), Residual(), nn.Flatten(), nn.Linear(6 * 36, 5),
        nn.BatchNorm1d(5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def train(model: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """Return state and outputs after some steps of SGD, the last output in evaluation."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(steps):
        x, dy = torch.randn(8, 3, 8, 8, generator=generator), torch.randn(8, 5, generator=generator)
        optimizer.zero_grad()
        model(x).backward(dy / 8)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = {"y": model(torch.randn(8, 3, 8, 8, generator=generator))}
    return found | {name: value.clone() for name, value in model.state_dict().items()}


def assert_trains_alike(model: nn.Module, stock: nn.Module) -> None:
    found, expected = train(model), train(stock)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def picture(model: nn.Module) -> list[Any]:
    """Return what must be the same objects in a model that was not touched."""
    return [
        (name, id(module), type(module), module.training, {k: id(v) for k, v in vars(module).items()})
        for name, module in model.named_modules()
    ] + [
        (name, id(value), value.detach().numpy().tobytes())
        for name, value in model.state_dict(keep_vars=True).items()
    ]


def test_converted_models_train_as_stock_ones() -> None:
    model = network()
    stock = copy.deepcopy(model)
    assert batchnorm.convert(model, example=torch.randn(4, 3, 8, 8)) is model
    kinds = [row.kind for row in batchnorm.inspect(model).rows]
    assert kinds == ["batchnorm.BatchNorm2d"] * 3 + ["batchnorm.BatchNorm1d"]
    assert type(model[1]) is batchnorm.BatchNorm2d
    assert type(model[6]) is batchnorm.BatchNorm1d
    assert_trains_alike(model, stock)


def test_modules_parameters_hooks_and_modes_are_the_same_objects() -> None:
    model = network()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    heard: list[str] = []
    model[6].register_forward_hook(lambda *_: heard.append("forward"))
    shared = nn.Sequential(model, model[1])
    before = {name: id(value) for name, value in shared.state_dict(keep_vars=True).items()}
    modules = [id(module) for module in shared.modules()]
    modes = [module.training for module in shared.modules()]
    batchnorm.convert(shared)
    assert {name: id(value) for name, value in shared.state_dict(keep_vars=True).items()} == before
    assert [id(module) for module in shared.modules()] == modules
    assert [module.training for module in shared.modules()] == modes
    assert not model[1].weight.requires_grad
    assert shared[1] is model[1]
    model(torch.randn(4, 3, 8, 8))
    assert heard == ["forward"]


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm2d])
def test_row_47_attributes_that_others_hung_on_a_layer_stay(kind: type[nn.Module]) -> None:
    """Row 47: a qconfig, a tag, a module, and torch's own records; also on the way back."""
    norm = kind() if kind is nn.LazyBatchNorm2d else kind(6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm)
    qconfig, probe = object(), nn.Identity()
    norm.qconfig, norm.tag, norm.probe = qconfig, ["a"], probe
    batchnorm.convert(model)
    assert model[1] is norm
    assert (norm.qconfig, norm.tag, norm.probe) == (qconfig, ["a"], probe)
    batchnorm.revert(model)
    assert (norm.qconfig, norm.tag, norm.probe) == (qconfig, ["a"], probe)


@pytest.mark.parametrize("value", [nn.ReLU(), 5])
@pytest.mark.parametrize("name", ["activation", "domains", "statistics"])
def test_row_47_an_attribute_of_an_options_name_is_refused(name: str, value: object) -> None:
    """Row 47: it would be taken for the option, or lost."""
    model = network()
    setattr(model[1], name, value)
    before = anatomy(model)
    for verb in (batchnorm.convert, batchnorm.freeze):
        with pytest.raises(OptionError, match=rf"^1 \(torch.nn.BatchNorm2d\): .*attribute {name} of its own"):
            verb(model)
    assert anatomy(model) == before
    assert getattr(model[1], name) is value


def test_there_and_back_is_the_same_model_bit_for_bit() -> None:
    model = network()
    stock = copy.deepcopy(model)
    batchnorm.convert(model)
    batchnorm.fuse(model)
    assert batchnorm.revert(model) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert [vars(a).keys() for a in model.modules()] == [vars(b).keys() for b in stock.modules()]
    for (name, value), (_, other) in zip(model.state_dict().items(), stock.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model(x), stock(x))


@pytest.mark.parametrize("example", [None, torch.zeros(4, 3, 8, 8).normal_()], ids=["read", "run"])
def test_fused_models_train_as_stock_ones(example: Tensor | None) -> None:
    """norm → activation and norm → add → activation are one layer each, one tensor kept."""
    model = network()
    stock = copy.deepcopy(model)
    parameters = [id(parameter) for parameter in model.parameters()]
    fuses_with = [row.fuses_with for row in batchnorm.inspect(model, example).rows]
    assert fuses_with == ["silu", "relu", "add, relu", None]
    assert batchnorm.fuse(model, example) is model
    assert [id(parameter) for parameter in model.parameters()] == parameters
    calls: list[str] = []
    model[3].bn2.register_forward_hook(lambda _module, args, _y: calls.append(f"{len(args)} inputs"))
    assert_trains_alike(model, stock)
    assert model[1].activation == "silu"
    assert model[3].bn2.activation == "relu"


def test_an_intermediate_with_a_second_reader_is_not_fused() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.act(y) + y.tanh()

    model = nn.Sequential(TwoReaders())
    before = picture(model)
    example = torch.randn(4, 3, 5, 5)
    (row,) = batchnorm.inspect(batchnorm.fuse(model, example), example).rows
    assert row.fuses_with is None
    assert row.reason
    assert picture(model) == before


def test_row_6_an_unknown_subclass_is_refused_by_name_and_nothing_has_changed() -> None:
    class Special(nn.BatchNorm2d):
        pass

    model = network()
    model.append(Special(4))
    before = picture(model)
    with pytest.raises(OptionError, match=r"7 \(.*Special\).*a subclass"):
        batchnorm.convert(model)
    assert picture(model) == before


@pytest.mark.parametrize("verb", ["convert", "fuse"])
def test_a_change_that_does_not_agree_is_taken_back(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = picture(model)
    forward = batchnorm.BatchNorm2d.forward
    monkeypatch.setattr(batchnorm.BatchNorm2d, "forward", lambda self, x, *r: forward(self, x, *r) * 1.3)
    with pytest.raises(AgreementError, match=f"{verb} was taken back: "):
        getattr(batchnorm, verb)(model, example=torch.randn(4, 3, 8, 8))
    assert picture(model) == before


@pytest.mark.parametrize("verb", ["convert", "fuse", "revert"])
def test_a_model_that_cannot_train_on_the_example_is_compared_in_evaluation_with_a_warning(verb: str) -> None:
    """One sample is one value per channel behind the linear layer: no variance, so training raises."""
    model = network()
    with pytest.warns(UserWarning, match=f"{verb}: not compared in training, where .* ValueError: ") as told:
        getattr(batchnorm, verb)(model, example=torch.randn(1, 3, 8, 8))
    assert [warning.filename for warning in told] == [__file__]


def test_lazy_parametrized_and_untracked_layers() -> None:
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    batchnorm.convert(lazy, domains=1)
    lazy(torch.randn(2, 3, 4, 4))
    assert type(lazy[0]) is batchnorm.BatchNorm2d

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    norm = nn.BatchNorm2d(3, track_running_stats=False)
    parametrize.register_parametrization(norm, "weight", Doubled())
    x = torch.randn(4, 3, 5, 5)
    expected = norm(x)
    batchnorm.convert(norm)
    assert isinstance(norm, batchnorm.BatchNorm2d)
    torch.testing.assert_close(norm(x), expected)
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is batchnorm.BatchNorm2d


def test_revert_puts_an_activation_behind_and_refuses_a_residual() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), batchnorm.BatchNorm2d(4, activation="gelu"))
    x = torch.randn(4, 3, 5, 5)
    expected = model(x)
    batchnorm.revert(model, example=x)
    assert [type(part) for part in model[1]] == [nn.BatchNorm2d, nn.GELU]
    torch.testing.assert_close(model(x), expected)

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, residual=x)

    model = nn.Sequential(Adds())
    before = picture(model)
    with pytest.raises(OptionError, match=r"0\.norm .*calls it with a residual"):
        batchnorm.revert(model)
    assert picture(model) == before


def test_inspect_tells_of_health_and_changes_nothing() -> None:
    model = network()
    model[1].running_var[2] = -1.0
    model[1].num_batches_tracked += 4
    model[6].weight.data[1] = 0.0
    before = picture(model)
    report = batchnorm.inspect(model, torch.randn(4, 3, 8, 8))
    assert picture(model) == before
    first, *_, last = report.rows
    assert first.health == ("negative variance (1 of 6)",)
    assert last.health == ("never updated", "dead weight (1 of 5)")
    assert [row.fuses_with for row in report.rows] == ["silu", "relu", "add, relu", None]
    text = str(report)
    assert "negative variance" in text
    assert all(row.name in text for row in report.rows)
