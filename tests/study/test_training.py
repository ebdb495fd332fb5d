from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm import BatchNorm1d
from batchnorm.studies import learner_torch, training
from batchnorm.studies.arms import L1_STRENGTH, L2_STRENGTH, parse_arm
from batchnorm.studies.data import Dataset
from batchnorm.studies.learner_torch import TorchLearner, evaluation, input_spread, make_learner, session
from batchnorm.studies.records import Run
from batchnorm.studies.settings import Recipe
from batchnorm.studies.tasks import RunTask
from batchnorm.studies.training import evaluate, probe_steps, time_steps

from .own_code import write_own_code
from .tasks import run_task, timing_task


@pytest.fixture
def data() -> Dataset:
    random = np.random.default_rng(1)
    centres = 2 * random.standard_normal((3, 12))
    y = np.arange(300) % 3
    x = (0.5 + centres[y] + random.standard_normal((300, 12))).astype(np.float32)
    return Dataset("blobs", "here", x[:200], y[:200], x[200:], y[200:])


def train(task: RunTask, data: Dataset, report: Callable[[int], None]) -> Run:
    with session():
        return training.train(task, data, make_learner, report)


def learner_of(model: nn.Module, arm: str = "none") -> TorchLearner:
    return TorchLearner(model, parse_arm(arm), Recipe(), 1e-3, is_watched=True)


def run(
    data: Dataset,
    *,
    network: str = "mlp",
    arm: str = "batchnorm",
    learning_rate: float = 1e-2,
    seed: int = 0,
    epochs: int = 2,
    batch_size: int = 16,
) -> dict[str, Any]:
    record = train(
        run_task(network, arm, rate=learning_rate, seed=seed, epochs=epochs, batch_size=batch_size),
        data,
        _ignore,
    )
    return dataclasses.asdict(record)


def _ignore(_: int) -> None:
    pass


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 6), BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def test_a_record_holds_the_whole_run(data: Dataset) -> None:
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


def test_a_run_repeats_itself_and_leaves_the_callers_random_state(data: Dataset) -> None:
    before = torch.get_rng_state()
    first = run(data, arm="batchnorm+dropout")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert str(run(data, arm="batchnorm+dropout")) == str(first)  # where NaN is NaN
    assert run(data, arm="batchnorm+dropout", seed=1)["step_loss"] != first["step_loss"]


def test_arms_of_a_seed_see_the_same_batches(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    step = TorchLearner.step

    def watched(self: TorchLearner, x: Any, y: Any) -> float:
        seen.append(torch.from_numpy(x))
        return step(self, x, y)

    monkeypatch.setattr(TorchLearner, "step", watched)
    run(data, arm="none")
    run(data, arm="batchnorm+dropout")
    assert all(torch.equal(one, other) for one, other in zip(seen[:24], seen[24:], strict=True))
    epoch = torch.cat(seen[:12])
    assert len(torch.unique(epoch, dim=0)) == 192
    assert not torch.equal(epoch, torch.cat(seen[12:24]))


def test_penalties_are_those_of_the_loss(data: Dataset) -> None:
    """And the gradient norms that are recorded are those of the cross-entropy alone."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.from_numpy(data.x_train[:16]), torch.from_numpy(data.y_train[:16])
    weights = [model[0].weight, model[2].weight]
    penalty = sum(
        L1_STRENGTH * weight.abs().sum() + L2_STRENGTH * weight.square().sum() for weight in weights
    )
    expected = torch.autograd.grad(cross_entropy(model(x), y) + penalty, list(model.parameters()))
    of_loss = torch.autograd.grad(cross_entropy(model(x), y), weights)
    learner = learner_of(model, "l1+l2")
    learner.step(x.numpy(), y.numpy())
    assert learner.gradient_norms() == pytest.approx([float(gradient.norm()) for gradient in of_loss])
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_recorded_losses_are_of_the_cross_entropy_alone(data: Dataset) -> None:
    assert run(data, arm="l1")["step_loss"][0] == run(data, arm="none")["step_loss"][0]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_curve(data: Dataset) -> None:
    record = run(data, arm="none", learning_rate=1e30)
    assert record["status"] == "diverged"
    *before, last = record["step_loss"]
    assert 1 <= len(before) < 11
    assert all(math.isfinite(loss) for loss in before)
    assert not math.isfinite(last)
    assert record["test_time_statistics"] is None


def test_steps_to_target_is_the_first_check_that_reaches_it(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(training, "reaches", lambda *_: next(answers))
    record = run(data, epochs=1, arm="none")
    assert record["target_checked_every"] == 2
    assert record["steps_to_target"] == 6


def test_the_target_is_looked_up_at_steps_a_tenth_apart_and_at_the_end(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    check = training._Training._check_target

    def spy(self: training._Training) -> None:
        looked.append(self.step)
        check(self)

    monkeypatch.setattr(training._Training, "_check_target", spy)
    monkeypatch.setattr(training, "reaches", lambda *_: False)
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

    class Fixed:
        def predict(self, x: Any, *, by_batch: bool = False) -> Any:
            nonlocal seen
            assert not by_batch
            seen += len(x)
            return x

    answers = np.random.default_rng(0).permutation(np.arange(1000) < wrong).astype(int)
    x, y = np.eye(2)[answers], np.zeros(1000, np.int64)
    fixed: Any = Fixed()
    assert training.reaches(fixed, x, y, 0.9) == (wrong <= 100)
    assert (seen < 1000) == (wrong >= 600)


def test_target_that_is_never_reached_has_no_steps(data: Dataset) -> None:
    assert math.isnan(run(data, epochs=1, learning_rate=1e-9)["steps_to_target"])


def test_evaluation_is_the_mean_over_all_examples(data: Dataset) -> None:
    model = small()
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(data.x_train))
    loss, accuracy = evaluate(learner_of(model), data.x_train, data.y_train)
    assert model.training
    classes = torch.from_numpy(data.y_train)
    assert loss == pytest.approx(cross_entropy(output, classes).item(), rel=1e-5)
    assert accuracy == (output.argmax(1) == classes).sum().item() / 200


def test_training_accuracy_is_of_a_fixed_sample_in_no_order(data: Dataset) -> None:
    by_class = np.argsort(data.y_train, kind="stable")
    data = dataclasses.replace(data, x_train=data.x_train[by_class], y_train=data.y_train[by_class])
    task = run_task("mlp", "none", rate=1e-3, batch_size=16)
    (x, y), again = (training._Training(task, data, learner_of(small()), _ignore).seen for _ in range(2))
    assert len(x) == len(y) == 100
    assert np.bincount(y).min() > 20
    assert np.unique(y[:20]).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(again[0], x)


def test_statistics_of_three_kinds_are_told_apart(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_running_statistics_that_stand_still(*_: object) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 30), BatchNorm1d(30, momentum=0.0), nn.ReLU(), nn.Linear(30, 3))

    monkeypatch.setattr(learner_torch, "build_network", with_running_statistics_that_stand_still)
    shifted = dataclasses.replace(data, x_train=data.x_train + 30, x_test=data.x_test + 30)
    accuracy = run(shifted, epochs=3)["test_time_statistics"]
    assert accuracy["running"] < 0.7
    assert accuracy["batch"] > 0.9
    assert accuracy["calibrated"] > 0.9
    monkeypatch.undo()
    assert run(data, arm="layernorm", epochs=1)["test_time_statistics"] is None


def test_a_network_with_the_wrong_output_is_refused(data: Dataset, tmp_path: Path) -> None:
    four = dataclasses.replace(data, x_train=data.x_train[:, :4], x_test=data.x_test[:, :4])
    own = write_own_code(tmp_path)
    with pytest.raises(ValueError, match=r"gives \(2, 5\) for two examples, not \(2, 3\)"):
        run(four, network=f"{own}:five_outputs", arm="none")
    with pytest.raises(ValueError, match=r"gives tuple for two examples, not \(2, 3\)"):
        run(four, network=f"{own}:two_results", arm="none")


def test_a_layer_without_a_gradient_has_no_norm() -> None:
    class Spare(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[0](x)

    learner = learner_of(Spare(nn.Linear(2, 2), nn.Linear(2, 2)), "l1+l2")
    learner.step(np.ones((3, 2), np.float32), np.array([0, 1, 1]))
    used, spare = learner.gradient_norms()
    assert used > 0
    assert math.isnan(spare)


def test_input_spread_is_taken_per_unit_under_batch_statistics() -> None:
    model = small()
    model[1].running_mean.fill_(50.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.tensor([[0.0], [4.0]]).expand(2, 12) + torch.arange(12.0)
    spread = input_spread(model, lambda: model(x))
    assert spread["0"] == (pytest.approx(2 + 5.5), pytest.approx(2.0))
    with torch.no_grad():
        hidden = model[:3].train()(x)
    assert spread["4"][0] == pytest.approx(hidden.mean().item(), rel=1e-5)
    model.load_state_dict(before)
    input_spread(model, lambda: model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_input_spread_of_a_convolution_is_per_channel() -> None:
    x = torch.zeros(4, 2, 3, 3)
    x[:, 1] = torch.tensor([0.0, 2.0, 0.0, 2.0]).reshape(4, 1, 1)
    model = nn.Sequential(nn.Conv2d(2, 1, 3))
    assert input_spread(model, lambda: model(x)) == {"0": (0.5, 0.5)}


def test_batch_statistics_are_undone_after_an_error() -> None:
    model = small()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = torch.randn(8, 13)
    with pytest.raises(RuntimeError), evaluation(model, by_batch=True):
        model(torch.randn(8, 12)) + model(wrong)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bytes_kept_are_those_that_autograd_saves_once_each() -> None:
    x, y = np.ones((5, 4), np.float32), np.array([0, 1, 2, 0, 1])
    # The input, the log-probabilities, the classes, and the sum of the classes' weights.
    expected = 5 * 4 * 4 + 5 * 3 * 4 + 5 * 8 + 4
    model = nn.Linear(4, 3)
    assert learner_of(model).bytes_kept(x, y) == expected
    assert learner_of(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).bytes_kept(x, y) == expected + 120


def test_bytes_kept_do_not_count_a_data_set_behind_a_batch(data: Dataset) -> None:
    assert 16 * 12 * 4 < run(data, arm="none", epochs=1)["bytes_kept_for_backward"] < data.x_train.nbytes


def test_probes_are_few_and_closer_at_the_beginning() -> None:
    steps = sorted(probe_steps(1250))
    assert len(steps) <= 24
    assert (steps[0], steps[-1]) == (0, 1249)
    assert steps[1] - steps[0] < steps[-1] - steps[-2]
    assert probe_steps(1) == {0}


def test_progress_adds_up(data: Dataset) -> None:
    reported: list[int] = []
    train(run_task("mlp", "none", rate=1e-3, epochs=5, batch_size=16), data, reported.append)
    assert reported == [25, 25, 10]


def test_timing_gives_each_arm_as_many_blocks(data: Dataset) -> None:
    before, began = torch.get_rng_state(), time.monotonic()
    with session():
        measured = time_steps(timing_task("mlp", ("dropout", "batchnorm"), batch_size=16), data, make_learner)
    elapsed = time.monotonic() - began
    assert torch.equal(torch.get_rng_state(), before)
    assert {len(arm.seconds_per_step) for arm in measured.arms.values()} == {9}
    assert all(seconds > 0 for arm in measured.arms.values() for seconds in arm.seconds_per_step)
    assert sum(sum(arm.seconds_per_step) for arm in measured.arms.values()) < elapsed
    kept = {name: arm.bytes_kept_for_backward for name, arm in measured.arms.items()}
    assert min(kept.values()) > 0
    assert kept["batchnorm"] != kept["dropout"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_step_is_that_of_torch_with_decayed_weights(data: Dataset, optimizer: str) -> None:
    recipe = Recipe(optimizer=optimizer, momentum=0.5 if optimizer == "sgd" else 0.0, weight_decay=0.1)
    ours, theirs = small(), small()
    theirs.load_state_dict(ours.state_dict())
    weights = [layer.weight for layer in theirs if isinstance(layer, nn.Linear)]
    rest = [value for value in theirs.parameters() if not any(value is weight for weight in weights)]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    made = {
        "sgd": lambda: torch.optim.SGD(groups, 0.1, momentum=0.5),
        "adam": lambda: torch.optim.Adam(groups, 0.1),
        "adamw": lambda: torch.optim.AdamW(groups, 0.1),
    }[optimizer]()
    learner = TorchLearner(ours, parse_arm("none"), recipe, 0.1)
    for step in range(3):
        x, y = data.x_train[16 * step :][:16], data.y_train[16 * step :][:16]
        torch.manual_seed(step)
        learner.step(x, y)
        made.zero_grad()
        torch.manual_seed(step)
        cross_entropy(theirs.train()(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        made.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_statistics_frozen_late_stand_still_from_then_on(data: Dataset) -> None:
    frozen = learner_of(small())
    x, y = data.x_train[:16], data.y_train[:16]
    frozen.step(x, y)
    frozen.freeze_statistics()
    kept = [norm.running_mean.clone() for norm in frozen.model if isinstance(norm, BatchNorm1d)]
    assert kept
    frozen.step(x, y)
    after = [norm.running_mean for norm in frozen.model if isinstance(norm, BatchNorm1d)]
    assert all(map(torch.equal, kept, after))
    record = run(data, arm="batchnorm:Running(after=0.5)")
    assert record["status"] == "finished"
    assert record["test_time_statistics"] is None
