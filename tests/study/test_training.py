from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm1d
from batchnorm.study import probes, train_torch
from batchnorm.study.arms import L1_STRENGTH, L2_STRENGTH, parse_arm
from batchnorm.study.run_record import probe_steps
from batchnorm.study.tasks import RunTask, TimingTask
from batchnorm.study.train_torch import Learner, TensorData, evaluate, time_steps, train

from .own_code import write_own_code


@pytest.fixture
def data() -> TensorData:
    random = np.random.default_rng(1)
    centres = 2 * random.standard_normal((3, 12))
    y = np.arange(300) % 3
    x = (0.5 + centres[y] + random.standard_normal((300, 12))).astype(np.float32)
    parts = [torch.from_numpy(array) for array in (x[:200], y[:200], x[200:], y[200:])]
    return TensorData(parts[0], parts[1], parts[2], parts[3], (12,), 3)


def run(
    data: TensorData,
    *,
    network: str = "mlp",
    arm: str = "batchnorm",
    learning_rate: float = 1e-2,
    seed: int = 0,
    epochs: int = 2,
    batch_size: int = 16,
) -> dict[str, Any]:
    return train(RunTask(network, arm, learning_rate, seed, epochs, batch_size, 0.9), data, _ignore)


def _ignore(_: int) -> None:
    pass


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 6), BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def test_a_record_holds_the_whole_run(data: TensorData) -> None:
    record = run(data)
    assert record["status"] == "finished"
    assert (record["steps_per_epoch"], len(record["step_loss"]), len(record["epochs"])) == (12, 24, 2)
    assert record["step_loss"][-1] < record["step_loss"][0]
    assert record["epochs"][-1]["test_accuracy"] > 0.8
    assert record["parameters"] == 12 * 64 + 64 + 2 * 64 + 64 * 3 + 3
    steps = record["gradient_norm"]["steps"]
    assert steps[0] == 0
    assert steps[-1] == 23
    assert record["gradient_norm"]["layers"].keys() == {"linear1", "linear2"}
    drift = record["input_drift"]["layers"]["linear2"]
    assert len(drift["mean"]) == len(drift["std"]) == len(steps)
    assert record["test_time_statistics"].keys() == {"batch", "running", "calibrated"}


def test_a_run_repeats_itself_and_leaves_the_callers_random_state(data: TensorData) -> None:
    before = torch.get_rng_state()
    first = run(data, arm="batchnorm+dropout")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert run(data, arm="batchnorm+dropout") == first
    assert run(data, arm="batchnorm+dropout", seed=1)["step_loss"] != first["step_loss"]


def test_arms_of_a_seed_see_the_same_batches(data: TensorData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    backward = Learner.backward

    def watched(self: Learner, x: torch.Tensor, y: torch.Tensor) -> float:
        seen.append(x)
        return backward(self, x, y)

    monkeypatch.setattr(Learner, "backward", watched)
    run(data, arm="none")
    run(data, arm="batchnorm+dropout")
    assert all(torch.equal(one, other) for one, other in zip(seen[:24], seen[24:], strict=True))
    epoch = torch.cat(seen[:12])
    assert len(torch.unique(epoch, dim=0)) == 192
    assert not torch.equal(epoch, torch.cat(seen[12:24]))


def test_penalties_are_those_of_the_loss(data: TensorData) -> None:
    torch.manual_seed(3)
    model, arm = small().eval(), parse_arm("l1+l2")
    x, y = data.x_train[:16], data.y_train[:16]
    weights = [model[0].weight, model[4].weight]
    penalty = sum(
        L1_STRENGTH * weight.abs().sum() + L2_STRENGTH * weight.square().sum() for weight in weights
    )
    expected = torch.autograd.grad(cross_entropy(model(x), y) + penalty, list(model.parameters()))
    learner = Learner(model, arm, 1e-3)
    learner.backward(x, y)
    learner.update()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_recorded_losses_are_of_the_cross_entropy_alone(data: TensorData) -> None:
    assert run(data, arm="l1")["step_loss"][0] == run(data, arm="none")["step_loss"][0]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_curve(data: TensorData) -> None:
    record = run(data, arm="none", learning_rate=1e30)
    assert record["status"] == "diverged"
    *before, last = record["step_loss"]
    assert 1 <= len(before) < 11
    assert all(math.isfinite(loss) for loss in before)
    assert not math.isfinite(last)
    assert record["test_time_statistics"] is None


def test_steps_to_target_is_the_first_check_that_reaches_it(
    data: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(train_torch, "reaches", lambda *_: next(answers))
    record = run(data, epochs=1, arm="none")
    assert record["target_checked_every"] == 2
    assert record["steps_to_target"] == 6


def test_the_target_is_looked_up_at_steps_a_tenth_apart_and_at_the_end(
    data: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    check = train_torch._Run._check_target

    def spy(self: train_torch._Run) -> None:
        looked.append(self.record.step)
        check(self)

    monkeypatch.setattr(train_torch._Run, "_check_target", spy)
    monkeypatch.setattr(train_torch, "reaches", lambda *_: False)
    total = len(run(data, epochs=8, arm="none")["step_loss"])
    assert looked[:4] == [2, 4, 6, 8]
    assert looked[-1] == total
    gaps = [(after - before, before) for before, after in itertools.pairwise(looked)]
    assert all(gap <= max(2, before // 10) for gap, before in gaps)
    assert any(gap > 2 for gap, _ in gaps)


@pytest.mark.parametrize("wrong", [0, 99, 100, 101, 600, 1000])
def test_a_target_is_reached_by_the_exact_fraction(wrong: int) -> None:
    """`reaches` stops early, and says what counting all of the examples would say."""
    seen = 0

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            seen += len(x)
            return torch.nn.functional.one_hot(x[:, 0], 2).float()

    answers = (torch.arange(1000) < wrong).long()
    order = torch.randperm(1000)
    x, y = answers[order].unsqueeze(1), torch.zeros(1000, dtype=torch.long)
    assert train_torch.reaches(Fixed(), x, y, 0.9) == (wrong <= 100)
    assert (seen < 1000) == (wrong >= 600)


def test_target_that_is_never_reached_has_no_steps(data: TensorData) -> None:
    assert run(data, epochs=1, learning_rate=1e-9)["steps_to_target"] is None


def test_evaluation_is_the_mean_over_all_examples(data: TensorData) -> None:
    model = small()
    with torch.no_grad():
        output = model.eval()(data.x_train)
    model.train()
    loss, accuracy = evaluate(model, data.x_train, data.y_train)
    assert loss == pytest.approx(cross_entropy(output, data.y_train).item(), rel=1e-5)
    assert accuracy == (output.argmax(1) == data.y_train).sum().item() / 200


def test_training_accuracy_is_of_a_fixed_sample_in_no_order(data: TensorData) -> None:
    by_class = torch.argsort(data.y_train, stable=True)
    data = TensorData(data.x_train[by_class], data.y_train[by_class], data.x_test, data.y_test, (12,), 3)
    x, y = train_torch._fixed_sample(data)
    assert len(x) == len(y) == 100
    assert y.bincount().min() > 20
    assert y[:20].unique().tolist() == [0, 1, 2]
    assert torch.equal(train_torch._fixed_sample(data)[0], x)


def test_statistics_of_three_kinds_are_told_apart(data: TensorData, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_running_statistics_that_stand_still(*_: object) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 30), BatchNorm1d(30, momentum=0.0), nn.ReLU(), nn.Linear(30, 3))

    monkeypatch.setattr(train_torch, "build_network", with_running_statistics_that_stand_still)
    shifted = TensorData(data.x_train + 30, data.y_train, data.x_test + 30, data.y_test, (12,), 3)
    accuracy = run(shifted, epochs=3)["test_time_statistics"]
    assert accuracy["running"] < 0.7
    assert accuracy["batch"] > 0.9
    assert accuracy["calibrated"] > 0.9
    monkeypatch.undo()
    assert run(data, arm="layernorm", epochs=1)["test_time_statistics"] is None


def test_a_network_with_the_wrong_output_is_refused(data: TensorData, tmp_path: Path) -> None:
    four = TensorData(data.x_train[:, :4], data.y_train, data.x_test[:, :4], data.y_test, (4,), 3)
    with pytest.raises(ValueError, match=r"gives \(2, 5\) for two examples, not \(2, 3\)"):
        run(four, network=f"{write_own_code(tmp_path)}:five_outputs", arm="none")


def test_gradient_norms_are_of_the_cross_entropy() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.grad = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    assert probes.gradient_norms(probes.weight_layers(model)) == {"0": 5.0}


def test_input_spread_is_taken_per_unit_under_batch_statistics() -> None:
    model = small()
    model[1].running_mean.fill_(50.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.tensor([[0.0], [4.0]]).expand(2, 12) + torch.arange(12.0)
    spread = probes.input_spread(model, x)
    assert spread["0"] == (pytest.approx(2 + 5.5), pytest.approx(2.0))
    with torch.no_grad():
        hidden = model[:3].train()(x)
    assert spread["4"][0] == pytest.approx(hidden.mean().item(), rel=1e-5)
    model.load_state_dict(before)
    probes.input_spread(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_input_spread_of_a_convolution_is_per_channel() -> None:
    x = torch.zeros(4, 2, 3, 3)
    x[:, 1] = torch.tensor([0.0, 2.0, 0.0, 2.0]).reshape(4, 1, 1)
    assert probes.input_spread(nn.Sequential(nn.Conv2d(2, 1, 3)), x) == {"0": (0.5, 0.5)}


def test_batch_statistics_are_undone_after_an_error() -> None:
    model = small()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = torch.randn(8, 13)
    with pytest.raises(RuntimeError), probes.batch_statistics(model):
        model(torch.randn(8, 12)) + model(wrong)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bytes_kept_are_those_that_autograd_saves_once_each() -> None:
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    # The input, the log-probabilities, the classes, and the sum of the classes' weights.
    expected = 5 * 4 * 4 + 5 * 3 * 4 + 5 * 8 + 4
    model = nn.Linear(4, 3)
    assert probes.bytes_kept_for_backward(model, x, y) == expected
    assert (
        probes.bytes_kept_for_backward(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), x, y)
        == expected + 120
    )


def test_bytes_kept_do_not_count_a_data_set_behind_a_batch(data: TensorData) -> None:
    assert 16 * 12 * 4 < run(data, arm="none", epochs=1)["bytes_kept_for_backward"] < data.x_train.nbytes


def test_probes_are_few_and_closer_at_the_beginning() -> None:
    steps = sorted(probe_steps(1250))
    assert len(steps) <= 24
    assert (steps[0], steps[-1]) == (0, 1249)
    assert steps[1] - steps[0] < steps[-1] - steps[-2]
    assert probe_steps(1) == {0}


def test_progress_adds_up(data: TensorData) -> None:
    reported: list[int] = []
    train(RunTask("mlp", "none", 1e-3, 0, 5, 16, 0.9), data, reported.append)
    assert reported == [25, 25]


def test_timing_gives_each_arm_as_many_blocks(data: TensorData) -> None:
    before, began = torch.get_rng_state(), time.monotonic()
    measured = time_steps(TimingTask("mlp", ("dropout", "batchnorm"), 16), data)
    elapsed = time.monotonic() - began
    assert torch.equal(torch.get_rng_state(), before)
    assert {len(arm["seconds_per_step"]) for arm in measured.values()} == {9}
    assert all(seconds > 0 for arm in measured.values() for seconds in arm["seconds_per_step"])
    assert sum(sum(arm["seconds_per_step"]) for arm in measured.values()) < elapsed
