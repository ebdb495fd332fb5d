"""`freeze`, `unfreeze` and `convert(model, statistics)`: frozen is frozen, until it is undone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.models import freeze as freeze_module
from batchnorm.models.norms.kinds import is_layer
from tests.models import nets
from tests.models.foreign import frozen_norm, frozen_timm_norm, timm_norm  # noqa: F401 -- fixtures
from tests.models.nets import anatomy, assert_alike, refuses, scrambled
from tests.torch.twins import STATISTICS, assert_identical, scramble, state

X = (4, 3, 6, 6)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in state(model).items() if name.endswith(STATISTICS)}


def _train(model: nn.Module, steps: int = 2) -> None:
    """A training loop as everybody writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        y = model(torch.randn(X, dtype=torch.float64))
        y.backward(torch.randn_like(y))
        optimizer.step()


class Thawing(nn.Module):
    """What a trainer or an author's own `train` does: every norm to training mode, one by one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for norm in _norms(self):
            norm.train(mode)
            norm.training = mode
        return self


def _by_loop(model: nn.Module) -> None:
    _train(model)


def _by_epochs(model: nn.Module) -> None:
    """As Lightning's loops: evaluation and training in turns."""
    for _ in range(2):
        model.eval()
        model(torch.randn(X, dtype=torch.float64))
        _train(model, steps=1)


def _by_subclass(model: nn.Module) -> None:
    _train(Thawing(model))


def _by_layer(model: nn.Module) -> None:
    for norm in _norms(model):
        norm.train()
    _train(model)


@pytest.mark.parametrize("train", [_by_loop, _by_epochs, _by_subclass, _by_layer])
def test_row_4_frozen_layers_stay_frozen_whoever_calls_train(train: Callable[[nn.Module], None]) -> None:
    """Row 4: statistics do not move, the rest learns; and the gradients are those of norms in evaluation."""
    model = scrambled(nets.resnet())
    assert batchnorm.freeze(model) is model
    before, weights = _statistics(model), model[0][0].weight.clone()
    train(model)
    assert all(norm.training for norm in _norms(model))
    assert_identical(_statistics(model), before)
    assert not torch.equal(model[0][0].weight, weights)
    assert {row.policy for row in batchnorm.inspect(model).rows} == {"running"}


def test_a_frozen_model_learns_as_one_whose_norms_evaluate() -> None:
    class Evaluating(Thawing):
        def train(self, mode: bool = True) -> nn.Module:
            nn.Module.train(self, mode)
            for norm in _norms(self):
                norm.eval()
            return self

    stock = scrambled(nets.resnet())
    model = batchnorm.freeze(copy.deepcopy(stock))
    assert_alike(Thawing(model), Evaluating(stock), torch.randn(X, dtype=torch.float64))


def test_freezing_keeps_modules_parameters_buffers_and_hooks() -> None:
    model = nets.resnet()
    heard: list[str] = []
    model[0][1].register_forward_hook(lambda *_: heard.append("forward"))
    objects = [*model.modules(), *model.parameters(), *model.buffers()]
    keys = list(model.state_dict())
    batchnorm.freeze(model)
    assert all(a is b for a, b in zip(objects, [*model.modules(), *model.parameters(), *model.buffers()],
                                      strict=True))  # fmt: skip
    assert list(model.state_dict()) == keys
    model(torch.randn(X))
    assert heard == ["forward"]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_there_and_back(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Twice frozen, copied, unfrozen twice, reverted: the model that it was, bit for bit."""
    stock = scrambled(nets.resnet())
    model = batchnorm.freeze(batchnorm.freeze(copy.deepcopy(stock)), parameters=True)
    model = copied(batchnorm.freeze(model, parameters=True))
    _train(model)
    model.load_state_dict(stock.state_dict())
    assert "batchnorm.unfreeze(model) first" in refuses(batchnorm.revert, model)
    assert batchnorm.unfreeze(model) is model
    batchnorm.revert(batchnorm.unfreeze(model))
    assert [vars(a).keys() for a in model.modules()] == [vars(b).keys() for b in stock.modules()]
    assert [type(a) for a in model.modules()] == [type(b) for b in stock.modules()]
    assert_alike(model, stock, torch.randn(X, dtype=torch.float64))


def test_parameters_are_frozen_too_and_learn_again_where_they_did() -> None:
    """A gradient that is there is dropped, else an optimizer would take one more step with it."""
    model = scrambled(nets.resnet())
    first, second, *rest = _norms(model)
    first.weight.requires_grad_(False)
    second.weight = first.weight  # one parameter in two layers
    last = rest[-1]
    parametrize.register_parametrization(last, "weight", nn.Identity())
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    y = model(torch.randn(X, dtype=torch.float64))
    y.backward(torch.randn_like(y))
    batchnorm.freeze(model, parameters=True)
    before = state(model)
    optimizer.step()
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    of_norms = {f"{row.name}.{name}" for row in batchnorm.inspect(model).rows
                for name, _ in model.get_submodule(row.name).named_parameters()}  # fmt: skip
    others = {name for name, _ in model.named_parameters()} - of_norms
    biases = {name for name in others if name.endswith("bias")}  # the norm behind one leaves it no gradient
    assert others - biases <= moved <= others
    assert others - biases
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name in of_norms}
    batchnorm.unfreeze(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learned


def test_a_part_of_a_model_is_frozen_alone() -> None:
    model = scrambled(nets.resnet())
    batchnorm.freeze(model[1])
    before = _statistics(model)
    _train(model)
    moved = {name for name, value in _statistics(model).items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"0", "2", "3"}
    assert type(model[0][1]) is nn.BatchNorm2d
    norm = batchnorm.freeze(nn.BatchNorm1d(3))
    assert norm.statistics == batchnorm.Running()


def test_unfreezing_what_was_never_frozen_changes_nothing() -> None:
    for model in (nets.resnet(), batchnorm.convert(nets.resnet())):
        before = anatomy(model)
        batchnorm.unfreeze(model)
        assert anatomy(model) == before


def test_row_6_what_cannot_be_frozen_is_refused_by_name(frozen_norm: type[nn.Module]) -> None:  # noqa: F811
    """Row 6: and nothing has changed, not even the layers before it."""

    class Special(nn.BatchNorm2d):
        pass

    for norm, reason in (
        (Special(4), r"1 \(.*Special\): a subclass"),
        (nn.BatchNorm2d(4, track_running_stats=False), r"1 \(torch.nn.BatchNorm2d\): .*has none"),
    ):
        model = nn.Sequential(nn.BatchNorm2d(4), norm)
        before = anatomy(model)
        with pytest.raises(OptionError, match=reason):
            batchnorm.freeze(model)
        assert anatomy(model) == before
    for verb in (batchnorm.freeze, batchnorm.unfreeze):
        with pytest.raises(OptionError, match="Linear has no batch normalization to"):
            verb(nn.Linear(2, 2))
    model = nn.Sequential(nn.BatchNorm2d(4), frozen_norm(4))
    before = anatomy(model)
    with pytest.raises(OptionError, match=r"1 \(torchvision.*frozen for good: batchnorm.convert"):
        batchnorm.unfreeze(model)
    assert anatomy(model) == before


def test_an_interruption_leaves_what_learned_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.resnet()
    y = model(torch.randn(X))
    y.backward(torch.randn_like(y))
    before, parameters = anatomy(model), list(model.parameters())
    grads = [parameter.grad for parameter in parameters]
    hold = freeze_module._hold

    def interrupted(norms: list[object]) -> None:
        hold(norms)
        assert not all(parameter.requires_grad for parameter in parameters)
        raise KeyboardInterrupt

    monkeypatch.setattr(freeze_module, "_hold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.freeze(model, parameters=True)
    assert anatomy(model) == before
    assert all(parameter.requires_grad for parameter in parameters)
    assert all(a.grad is b for a, b in zip(parameters, grads, strict=True))


def test_lazy_layers_freeze_before_they_know_their_channels() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyBatchNorm1d(track_running_stats=False))
    assert "2 (torch.nn.LazyBatchNorm1d): " in refuses(batchnorm.freeze, model)
    batchnorm.freeze(model[0], parameters=True)
    model(torch.randn(4, 3, 5, 5))
    assert model[0].num_batches_tracked == 0
    assert not model[0].weight.requires_grad
    batchnorm.unfreeze(model)
    assert model[0].weight.requires_grad
    assert model[0].statistics == batchnorm.Batch()


def test_timms_layers_freeze(timm_norm: type[nn.Module]) -> None:  # noqa: F811
    stock = scrambled(nn.Sequential(timm_norm(4, nn.SiLU()), timm_norm(4, nn.Softplus())))
    model, x = copy.deepcopy(stock), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    batchnorm.freeze(model)
    torch.testing.assert_close(model.train()(x), stock.eval()(x))


def test_fused_models_freeze_and_frozen_ones_fuse() -> None:
    stock = scrambled(nets.resnet())
    for first, second in ((batchnorm.freeze, batchnorm.fuse), (batchnorm.fuse, batchnorm.freeze)):
        model = second(first(copy.deepcopy(stock)))
        before, x = _statistics(model), torch.randn(X, dtype=torch.float64)
        torch.testing.assert_close(model.train()(x), stock.eval()(x))
        assert_identical(_statistics(model), before)
        assert [type(part) for part in model[0]][2] is not nn.GELU


def test_calibrate_leaves_frozen_layers_alone_and_says_so() -> None:
    """They use their statistics while others are measured, as in training."""
    model = scrambled(nets.resnet())
    batchnorm.freeze(model[:2])
    before, data = _statistics(model), torch.randn(8, *X[1:], dtype=torch.float64)
    report = batchnorm.calibrate(model, data.split(4))
    assert report.frozen == ("0.1", "1.bn1", "1.bn2")
    assert "Frozen, left as before: 0.1, 1.bn1, 1.bn2." in str(report)
    moved = {name for name, value in _statistics(model).items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in moved} == {layer.name for layer in report.layers}
    received: list[Tensor] = []
    model[2].bn1.register_forward_pre_hook(lambda _norm, args: received.append(args[0]))
    model.eval()(data)
    torch.testing.assert_close(model[2].bn1.running_mean, received[0].mean((0, 2, 3)))
    batchnorm.freeze(model)
    with pytest.raises(OptionError, match=r"not frozen: batchnorm.unfreeze"):
        batchnorm.calibrate(model, data.split(4))


def test_convert_sets_a_policy_on_every_layer() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4), batchnorm.BatchNorm2d(4), nn.LazyBatchNorm2d(), nn.SyncBatchNorm(4), nn.Flatten()
    )
    batchnorm.convert(model, batchnorm.Running(), example=None)
    assert [m.statistics for m in model if is_layer(m)] == [batchnorm.Running()] * 4
    batchnorm.convert(model)  # no policy: no change
    assert model[0].statistics == batchnorm.Running()
    del model[3]
    batchnorm.convert(model, statistics=batchnorm.Batch())
    assert {m.statistics for m in model if is_layer(m)} == {batchnorm.Batch()}
    untracked = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    assert "1 (torch.nn.BatchNorm2d): statistics=Running() uses" in refuses(
        batchnorm.convert, untracked, batchnorm.Running()
    )
    assert "statistics must be" in refuses(batchnorm.convert, untracked, torch.randn(2, 4, 3, 3))


def test_row_6_torchvisions_frozen_layer_becomes_a_frozen_one(frozen_norm: type[nn.Module]) -> None:  # noqa: F811
    """Rows 4 and 6: buffers stay the same tensors, what it lacks is filled, old checkpoints load."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), frozen_norm(4, eps=0.1), nn.ReLU())
    _fill(stock[1])
    model = copy.deepcopy(stock)
    buffers = dict(model[1].named_buffers())
    keys = set(model.state_dict())
    x = torch.randn(X)
    batchnorm.convert(model, example=x)
    assert type(model[1]) is batchnorm.BatchNorm2d
    assert (model[1].eps, model[1].statistics) == (0.1, batchnorm.Running())
    assert {name: value.data_ptr() for name, value in model[1].state_dict().items() if name in buffers} == {
        name: value.data_ptr() for name, value in buffers.items()
    }
    assert set(model.state_dict()) - keys == {"1.num_batches_tracked"}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]
    expected = model.state_dict()
    model.load_state_dict(stock.state_dict())
    assert_identical(model.state_dict(), expected)
    torch.testing.assert_close(model.train()(x), stock(x))
    assert "batchnorm.unfreeze(model) first" in refuses(batchnorm.revert, model)
    batchnorm.fuse(model)
    assert model[1].activation == "relu"
    batchnorm.revert(batchnorm.unfreeze(model))
    assert type(model[1]) is nn.BatchNorm2d
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.eval()(x), stock(x))
    assert vars(model[1]).keys() == vars(nn.BatchNorm2d(4)).keys()


def test_a_frozen_layer_with_the_batchs_policy_is_frozen_no_more(frozen_norm: type[nn.Module]) -> None:  # noqa: F811
    model = batchnorm.convert(nn.Sequential(frozen_norm(4)), batchnorm.Batch())
    model(torch.randn(5, 4, 3, 3) + 1)
    assert model[0].num_batches_tracked == 1


def test_frozen_layers_of_timm(frozen_timm_norm: type[nn.Module], timm_norm: type[nn.Module]) -> None:  # noqa: F811
    stock = nn.Sequential(frozen_timm_norm(4, nn.SiLU()), frozen_timm_norm(4, nn.Softplus()))
    for norm in stock:
        _fill(norm)
    model, x = copy.deepcopy(stock), torch.randn(5, 4, 3, 3)
    batchnorm.convert(model, example=x)
    assert model[0].activation == "silu"
    torch.testing.assert_close(model.train()(x), stock(x))
    batchnorm.revert(batchnorm.unfreeze(model))
    assert [type(norm) for norm in model] == [timm_norm] * 2
    torch.testing.assert_close(model.eval()(x), stock(x))


def test_frozen_layers_of_transformers_detectors() -> None:
    stock = nn.Sequential(DetrFrozenBatchNorm2d(4))
    _fill(stock[0])
    model, x = copy.deepcopy(stock), torch.randn(5, 4, 3, 3)
    assert batchnorm.inspect(model).rows[0].policy == "running"
    batchnorm.convert(model, example=x)
    torch.testing.assert_close(model.train()(x), stock(x))
    assert model[0].statistics == batchnorm.Running()


def _fill(norm: nn.Module) -> None:
    """Give four buffers values of some past."""
    norm.num_batches_tracked = torch.tensor(0)
    scramble(norm)
    del norm.num_batches_tracked
