"""`monitor`: rows are exact, training is as without it, and compilers and recomputes are heeded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import ArgumentTypeError, DataError, FileError, OptionError
from batchnorm.loggers import Row
from batchnorm.models.monitor import StepObserver
from tests.models import monitor_rank
from tests.support.ranks import found_by_ranks

Logged = list[tuple[int, Row]]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    first, last = batchnorm.BatchNorm2d(5), nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), first, nn.ReLU(), nn.Conv2d(5, 4, 1), last)
    with torch.no_grad():
        for norm in (net[1], net[4]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
    return net


def _step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    (model(x) * target).sum().backward()


def _data(steps: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 7, 7) + step, torch.randn(6, 4, 5, 5)) for step in range(steps)]


def _logging(logged: Logged) -> Any:
    return lambda row, step: logged.append((step, row))


def _expected(model: nn.Sequential, x: Tensor) -> Row:
    """By NumPy in float64, of a model before the step; gradients are those of `.grad` behind it."""
    row: Row = {}
    inputs = {"1": model[0](x)}
    inputs["4"] = copy.deepcopy(model)[:4](x)
    for name, received in inputs.items():
        norm = model[int(name)]
        values = received.detach().double().numpy().swapaxes(0, 1).reshape(received.shape[1], -1)
        mean, var = values.mean(1), values.var(1, ddof=1)
        running_mean, running_var = (t.double().numpy() for t in (norm.running_mean, norm.running_var))
        size = norm.weight.detach().abs().double().numpy()
        row[f"bn/{name}/mean_distance"] = np.sqrt(np.mean((mean - running_mean) ** 2 / (var + 1e-5)))
        logs = 0.5 * np.log((var + 1e-5) / (running_var + 1e-5))
        row[f"bn/{name}/std_ratio"] = np.exp(np.sqrt(np.mean(logs**2)))
        row[f"bn/{name}/values_per_channel"] = values.shape[1]
        row[f"bn/{name}/dead_channels"] = np.mean((size == 0) | (size < 1e-3 * np.median(size)))
    return row


def test_rows_are_exact_and_training_is_the_same() -> None:
    """Every second step; gradients are those of the step's backward, though they are cleared behind it."""
    plain, watched = _net(), _net()
    logged: Logged = []
    wanted: dict[int, Row] = {}
    with torch.no_grad():
        plain[1].weight[2] = watched[1].weight[2] = 0.0
    with batchnorm.monitor(watched, _logging(logged), every=2) as handle:
        for step, (x, target) in enumerate(_data(5)):
            wanted[step] = _expected(plain, x)
            _step(plain, x, target)
            _step(watched, x, target)
            for name in ("1", "4"):
                for what in ("weight", "bias"):
                    gradient = plain.get_parameter(f"{name}.{what}").grad
                    assert gradient is not None
                    wanted[step][f"bn/{name}/{what}_grad_norm"] = gradient.double().norm().item()
            for one, other in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
                assert torch.equal(one, other)
    assert handle.step == 5
    assert [step for step, _ in logged] == [0, 2, 4]
    for step, row in logged:
        assert row.keys() == wanted[step].keys()
        assert all(type(value) in (int, float) for value in row.values())
        np.testing.assert_allclose([row[k] for k in row], [wanted[step][k] for k in row], rtol=2e-5)
    assert logged[0][1]["bn/1/dead_channels"] == 0.2
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in watched.modules())
    assert not any(p._post_accumulate_grad_hooks for p in watched.parameters())


def test_between_the_steps_nothing_is_attached() -> None:
    """One hook before and one behind the model, which are gone after `remove`; evaluation is no step."""
    net, logged = _net(), []
    (x, target), *_ = _data(1)
    handle = batchnorm.monitor(net, _logging(logged), every=10)
    for _ in range(3):
        _step(net, x, target)
        net.eval()(x)
        net.train()
        assert not any(module._forward_pre_hooks for module in net.children())
    assert handle.step == 3
    assert [step for step, _ in logged] == [0]
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    handle.remove()
    handle.remove()
    _step(net, x, target)
    assert handle.step == 3
    assert len(logged) == 1


def test_norms_that_learn_no_more_are_logged_at_the_next_step() -> None:
    """Which waits for the gradients of those that do."""
    net, logged = _net().double(), []
    (x, target), *_ = _data(1)
    with batchnorm.monitor(net, _logging(logged), every=2):
        for _ in range(2):
            _step(net, x.double(), target)
        assert "bn/4/bias_grad_norm" in logged[0][1]
        net.requires_grad_(False)
        for _ in range(2):
            net(x.double())
        assert [step for step, _ in logged] == [0, 2]
        assert "bn/4/bias_grad_norm" not in logged[1][1]


def test_a_gradient_that_an_optimizer_in_the_backward_has_used_up_is_left_out() -> None:
    """Such a hook steps and drops the gradient before the monitor's, which came later."""
    net, logged = _net(), []
    (x, target), *_ = _data(1)
    net[1].weight.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with batchnorm.monitor(net, _logging(logged)):
        _step(net, x, target)
    assert "bn/1/weight_grad_norm" not in logged[0][1]
    assert logged[0][1]["bn/1/bias_grad_norm"] == pytest.approx(float(net[1].bias.grad.norm()))


def test_a_step_that_raises_leaves_no_hook_on_the_norms() -> None:
    net, logged = _net(), []
    (x, target), *_ = _data(1)
    with batchnorm.monitor(net, _logging(logged), every=1):
        with pytest.raises(RuntimeError):
            net(x[:, :2])
        assert not any(module._forward_pre_hooks for module in net.children())
        with pytest.warns(UserWarning, match="no batch normalization was reached"):
            _step(net, x, target)
    assert "bn/1/mean_distance" not in logged[0][1]
    assert "bn/1/mean_distance" in logged[1][1]


def test_errors_of_a_norm_have_its_name() -> None:
    """Its input is looked at before the norm looks at it, which raises."""
    net = nn.Sequential(batchnorm.BatchNorm2d(4))
    with (
        pytest.raises(ValueError, match="0 \\(BatchNorm2d\\)"),
        batchnorm.monitor(net, print, every=1) as handle,
    ):
        net(torch.zeros(3))
    assert handle.step == 1


def test_shared_calls_masks_skipped_batches_and_what_a_layer_has_not() -> None:
    """Calls of one step are pooled; padding is not counted; γ and β that do not learn have no gradient."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(3, affine=False, nonfinite="skip")
            self.untracked = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            both = self.norm(x, lengths=lengths) + self.norm(2 * x, lengths=lengths)
            found: Tensor = self.untracked(both)
            return found

    net, logged = Net(), []
    net.untracked.bias.requires_grad_(False)
    x, lengths = torch.randn(4, 3, 6), torch.tensor([6, 2, 3, 1])
    with batchnorm.monitor(net, _logging(logged), every=1):
        (net(x, lengths) * torch.randn(4, 3, 6)).sum().backward()
        broken = x.clone()
        broken[0, 0, 0] = torch.inf
        net(broken, lengths)
    values = np.concatenate([part[:, :n].numpy() for part, n in zip(x, lengths.tolist(), strict=True)], 1)
    values = np.concatenate([values, 2 * values], 1).astype(float)
    first = logged[0][1]
    distance = np.sqrt(np.mean(values.mean(1) ** 2 / (values.var(1, ddof=1) + 1e-5)))
    assert first["bn/norm/mean_distance"] == pytest.approx(distance, rel=1e-5)
    assert first["bn/norm/values_per_channel"] == 24
    assert first["bn/norm/skipped"] == 0
    assert first.keys() == {
        *(f"bn/norm/{what}" for what in ("mean_distance", "std_ratio", "values_per_channel", "skipped")),
        *(f"bn/untracked/{what}" for what in ("values_per_channel", "dead_channels", "weight_grad_norm")),
    }
    assert logged[1][1]["bn/norm/skipped"] == 2
    assert np.isnan(logged[1][1]["bn/norm/mean_distance"])


def test_two_forwards_before_a_backward_still_log_its_gradients() -> None:
    net, logged = _net(), []
    (x, target), *_ = _data(1)
    with batchnorm.monitor(net, _logging(logged), every=4):
        ((net(x) - net(-x)) * target).sum().backward()
        assert logged == []
        net(x)
        assert len(logged) == 1
    assert "bn/4/weight_grad_norm" in logged[0][1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_are_not_counted(reentrant: bool) -> None:
    """Neither as steps nor as values; gradients are those of the backward around them."""
    plain, net = batchnorm.convert(_net()), batchnorm.convert(_net())  # a stock norm moves twice
    logged: Logged = []
    wanted: Logged = []
    with batchnorm.monitor(net, _logging(logged), every=2) as handle:
        for x, target in _data(3):
            x.requires_grad_(True)
            (checkpoint(net, x, use_reentrant=reentrant) * target).sum().backward()
    assert handle.step == 3
    with batchnorm.monitor(plain, _logging(wanted), every=2):
        for x, target in _data(3):
            (plain(x) * target).sum().backward()
    assert [step for step, _ in logged] == [0, 2]
    for (_, found), (_, exact) in zip(logged, wanted, strict=True):
        assert found == pytest.approx(exact, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it, and hides that otherwise
@pytest.mark.parametrize("form", ["returned", "in place", "a part"])
def test_compiled_models_are_observed_and_not_compiled_again(form: str) -> None:
    torch.compiler.reset()
    net, plain = _net(), _net()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model: Any = net
    if form == "returned":
        model = torch.compile(net, backend=backend)
    else:
        (net if form == "in place" else net[1]).compile(backend=backend)
    logged: Logged = []
    wanted: Logged = []
    with batchnorm.monitor(model, _logging(logged), every=3) as handle:
        for x, target in _data(4):
            _step(model, x, target)
    assert handle.step == 4
    assert graphs == 1
    with batchnorm.monitor(plain, _logging(wanted), every=3):
        for x, target in _data(4):
            _step(plain, x, target)
    assert [step for step, _ in logged] == [0, 3]
    for (_, found), (_, exact) in zip(logged, wanted, strict=True):
        assert found == pytest.approx(exact, rel=1e-3)
    assert torch.compiler.is_compiling() is False
    _step(model, *_data(1)[0])
    assert graphs == 1


def test_under_ddp_rank_0_logs_its_own_batch_and_nothing_waits(tmp_path: Path) -> None:
    """Training is the same bit for bit; the values and gradients are those of rank 0, before the average."""
    first, second = found_by_ranks(monitor_rank, 2, tmp_path)
    assert [found["steps"] for found in (first, second)] == [3, 3]
    assert [step for step, _ in first["rows"]] == [0, 2]
    assert second["rows"] == []
    for found in (first, second):
        for name, value in found["net"].items():
            assert torch.equal(value, found["plain"][name]), name
    row = first["rows"][0][1]
    assert row["bn/1/values_per_channel"] == row["bn/4/values_per_channel"] == 8
    x, target = monitor_rank.shard(0)
    received = monitor_rank.network()[0](x).detach().double()
    distance = (received.mean(0).square() / (received.var(0) + 1e-5)).mean().sqrt().item()
    assert row["bn/1/mean_distance"] == pytest.approx(distance, rel=1e-5)
    # The gradient of the last bias does not depend on what is before it: this rank's, not the mean of both.
    assert row["bn/4/bias_grad_norm"] == pytest.approx(
        (target.sum(0) / target.numel()).norm().item(), rel=1e-5
    )


def test_a_model_that_is_compiled_after_it_is_told() -> None:
    torch.compiler.reset()
    net = _net()
    handle = batchnorm.monitor(net, _logging([]))
    with pytest.warns(UserWarning, match="compile it before"):
        torch.compile(net, backend="eager", fullgraph=True)(_data(1)[0][0])
    with pytest.warns(UserWarning, match="saw no forward of Sequential in training mode"):
        handle.remove()


def test_copies_and_files_of_the_model_have_no_hook() -> None:
    net, logged = _net(), []
    with batchnorm.monitor(net, _logging(logged), every=1) as handle:
        _step(net, *_data(1)[0])
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            other(_data(1)[0][0])
        assert handle.step == 1


def test_options_are_checked_first() -> None:
    net = _net()
    with pytest.raises(OptionError, match="Sequential has no batch normalization to monitor"):
        batchnorm.monitor(net[:1], print)
    for every in (0, True, 2.5):
        with pytest.raises(OptionError, match="every is a number of steps"):
            batchnorm.monitor(net, print, every=every)
    with pytest.raises(ArgumentTypeError, match="got None"):
        batchnorm.monitor(net, None)  # type: ignore[arg-type]
    assert not net._forward_pre_hooks


def test_csv_files(tmp_path: Path) -> None:
    """Rows are added to a file that is there, after a crash too; another file is refused as it is."""
    net, path = _net(), tmp_path / "norms.csv"
    (x, target), *_ = _data(1)
    for start in (0, 40):
        handle = batchnorm.monitor(net, path, every=20)
        handle.step = start
        _step(net, x, target)
        handle.remove()
    lines = path.read_text().splitlines()
    assert lines[0] == "step,name,value"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        [step, f"bn/{name}/{what}"]
        for step in ("0", "40")
        for name, what in [line.split(",")[1].split("/")[1:] for line in lines[1:13]]
    ]
    with pytest.raises(FileError, match="there is no folder"):
        batchnorm.monitor(net, tmp_path / "none" / "norms.csv")
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    with pytest.raises(DataError, match="has not the columns step,name,value"):
        batchnorm.monitor(net, str(other))
    assert other.read_text() == "my notes\n"
    assert not net._forward_pre_hooks


def test_two_monitors_whose_steps_overlap_leave_compilation_as_it_was() -> None:
    torch.compiler.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    first, second = (StepObserver(_net(), lambda *_: None) for _ in range(2))
    compiled = torch.compile(torch.nn.Linear(2, 2), backend=backend)
    first.attach(0)
    second.attach(0)
    compiled(torch.ones(1, 2))
    first.detach()
    compiled(torch.ones(1, 2))
    assert graphs == 0
    second.detach()
    compiled(torch.ones(1, 2))
    assert graphs == 1
