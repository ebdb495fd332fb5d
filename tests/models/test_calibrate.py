"""`batchnorm.calibrate`: exact for any split, atomic, and its report marks what depends on the split."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import DataError, InputShapeError, OptionError
from batchnorm.models.calibrate import _write

LAYERS = [batchnorm.BatchNorm1d, nn.BatchNorm1d]
SPLITS = {"whole": [203], "ragged": [64, 64, 64, 11], "sevens": [29] * 7, "singles": [1] * 203}


def _data(*shape: int) -> torch.Tensor:
    channels = torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))
    return torch.randn(shape) * (1 + channels) + 10.0 * channels - 3


def _expected(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.double().transpose(0, 1).flatten(1)
    return wide.mean(1), wide.var(1, correction=1)


def _state(model: nn.Module) -> dict[str, object]:
    """Everything that an interrupted calibration must not change."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": {name: id(buffer) for name, buffer in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def _assert_same_state(before: dict[str, object], after: dict[str, object]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def _network(norm: type[nn.Module] = batchnorm.BatchNorm1d) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), norm(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4), norm(4))
    model.train()
    model[5].eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model[1].running_mean.uniform_()
    return model


@pytest.mark.parametrize("norm", LAYERS)
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_gives_the_statistics_of_all_values(norm: type[nn.Module], split: str) -> None:
    """Pain row 1 (whole-dataset statistics) and row 31 (running_var is the unbiased variance)."""
    x = _data(203, 3, 7)
    layer = norm(3)
    report = batchnorm.calibrate(layer, x.split(SPLITS[split]))
    mean, var = _expected(x)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=0)
    assert report.samples == 203
    assert report.batches == len(SPLITS[split])
    assert report.layers[0].exact
    assert report.layers[0].values == 203 * 7


def test_row_1_good_training_and_bad_eval_is_mended() -> None:
    """Pain row 1: with running statistics that lag, eval differs from training; calibrated, it does not."""
    x = _data(512, 5)
    model = _network().train()
    model[3].p = 0.0
    trained = model(x)
    model.eval()
    lagging = (model(x) - trained).abs().max()
    batchnorm.calibrate(model, [x])
    calibrated = (model(x) - trained).abs().max()
    assert lagging > 0.5
    # What remains is the unbiased variance: each of the two norms scales by sqrt((n - 1) / n).
    assert calibrated < 2 / len(x) * trained.abs().max()


def test_only_the_running_statistics_change() -> None:
    model = _network()
    before = _state(model)
    batchnorm.calibrate(model, _data(40, 5).split(10))
    after = _state(model)
    for name in ("1.running_mean", "1.running_var", "5.running_mean", "5.running_var"):
        assert not torch.equal(before["state"].pop(name), after["state"].pop(name)), name
    _assert_same_state(before, after)


def test_dropout_is_off_and_no_graph_is_kept() -> None:
    model = _network()
    x = _data(64, 5)
    seen = []
    model[4].register_forward_hook(lambda _m, args, out: seen.append((args[0], out.requires_grad)))
    batchnorm.calibrate(model, [x])
    hidden, requires_grad = seen[0]
    stock = nn.functional.batch_norm(model[0](x), None, None, training=True).relu()
    torch.testing.assert_close(hidden, stock.detach())
    assert not requires_grad


def test_deeper_layers_are_marked_as_dependent_on_the_split() -> None:
    model = _network()
    report = batchnorm.calibrate(model, _data(40, 5).split(10))
    assert [(layer.name, layer.exact) for layer in report.layers] == [("1", True), ("5", False)]
    assert "5 *" in str(report)
    assert "depends on how the data was split" in str(report)


def test_the_report_says_how_far_the_statistics_moved() -> None:
    layer = batchnorm.BatchNorm1d(2, eps=1e-12)
    x = torch.randn(4000, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) + torch.tensor([6.0, 0.0])
    layer.double()
    report = batchnorm.calibrate(layer, [x])
    (change,) = report.layers
    mean, var = _expected(x)
    assert change.mean_shift == pytest.approx((mean / var.sqrt()).max().item())
    assert change.std_ratio == pytest.approx(var[0].sqrt().item())
    assert f"{change.mean_shift:.3g} std" in str(report)
    assert "4,000 samples in 1 batches" in str(report)


def _exploding(batches: list[torch.Tensor], error: BaseException):
    yield from batches
    raise error


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_exception_in_the_data_leaves_the_model_as_it_was(error: BaseException) -> None:
    model = _network()
    before = _state(model)
    with pytest.raises(type(error)):
        batchnorm.calibrate(model, _exploding([_data(8, 5)] * 3, error))
    _assert_same_state(before, _state(model))


def test_an_exception_in_the_model_leaves_it_as_it_was() -> None:
    model = _network()
    before = _state(model)
    with pytest.raises(InputShapeError, match=r"1 \(BatchNorm1d\).*more than 1 value per channel"):
        batchnorm.calibrate(model, [_data(8, 5), _data(1, 5)])
    _assert_same_state(before, _state(model))


def test_an_interruption_of_the_last_write_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _network()
    before = _state(model)
    copy_, calls = torch.Tensor.copy_, []

    def interrupted(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    def write(values: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
        _write(values)

    monkeypatch.setattr("batchnorm.models.calibrate._write", write)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.calibrate(model, [_data(8, 5)])
    monkeypatch.undo()
    assert len(calls) == 3
    _assert_same_state(before, _state(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_the_layer_that_received_them(bad: float) -> None:
    model = _network()
    before = _state(model)
    x = _data(8, 5)
    x[3, 2] = bad
    with pytest.raises(DataError, match=r"^1: received NaN or inf"):
        batchnorm.calibrate(model, [x])
    _assert_same_state(before, _state(model))


def test_layers_that_no_sample_reached_are_named_and_left() -> None:
    model = _network()
    model.add_module("spare", batchnorm.BatchNorm1d(3))
    model.forward = lambda x: model[5](model[4](model[1](model[0](x))))
    with pytest.warns(UserWarning, match="no sample reached spare") as caught:
        report = batchnorm.calibrate(model, [_data(8, 5)])
    assert caught[0].filename == __file__
    assert report.unreached == ("spare",)
    assert torch.equal(model.spare.running_var, torch.ones(3))


def test_a_layer_used_twice_pools_what_it_received() -> None:
    shared = batchnorm.BatchNorm1d(3)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(2 * x + 1)

    x = _data(60, 3)
    report = batchnorm.calibrate(Twice(), x.split(20))
    mean, var = _expected(torch.cat([x, 2 * x + 1]))
    torch.testing.assert_close(shared.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shared.running_var.double(), var, rtol=1e-6, atol=0)
    assert report.layers[0].values == 120


def test_batches_of_every_form() -> None:
    x = _data(30, 3)
    forms = {
        "tensors": (x.split(10), None),
        "pairs": ([(part, torch.zeros(10)) for part in x.split(10)], None),
        "dataset": (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=7), None),
        "dicts": ([{"input": part} for part in x.split(10)], None),
        "own": ([{"a": {"b": part}} for part in x.split(10)], lambda model, batch: model(batch["a"]["b"])),
    }
    results = {}
    for name, (data, forward) in forms.items():
        layer = batchnorm.BatchNorm1d(3)
        assert batchnorm.calibrate(layer, data, forward=forward).samples == 30, name
        results[name] = layer.running_var
    for name, found in results.items():
        torch.testing.assert_close(found, results["tensors"], rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([object()], "got a object: pass forward="),
        ([("a", "b")], "got a tuple: pass forward="),
        ([(torch.ones(2, 3),) * 3], "got a tuple: pass forward="),
    ],
)
def test_data_of_unknown_form_is_refused(data: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        batchnorm.calibrate(batchnorm.BatchNorm1d(3), data)


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(OptionError, match="Linear has no batch normalization"):
        batchnorm.calibrate(nn.Linear(2, 2), [])


def test_momentum_and_counters_are_as_before() -> None:
    layer = batchnorm.BatchNorm1d(3, momentum=None)
    layer(_data(8, 3))
    before = copy.deepcopy(layer)
    batchnorm.calibrate(layer, [_data(8, 3)])
    assert layer.momentum is None
    assert torch.equal(layer.num_batches_tracked, before.num_batches_tracked)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    batchnorm.calibrate(batchnorm.BatchNorm1d(3), [_data(8, 3)] * 2, progress=True)
    assert "Calibrating" in capsys.readouterr().out
    batchnorm.calibrate(batchnorm.BatchNorm1d(3), iter([_data(8, 3)] * 2), progress=True)  # of no length
    assert "Calibrating" in capsys.readouterr().out
    batchnorm.calibrate(batchnorm.BatchNorm1d(3), [_data(8, 3)] * 2)
    assert capsys.readouterr().out == ""
