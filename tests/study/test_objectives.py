"""Losses and metrics of a study: against scikit-learn and torch, and the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import nn

import batchnorm
from batchnorm.errors import DataError, OptionError
from batchnorm.studies import StudyOptions, objectives, run_study, training
from batchnorm.studies.arms import parse_arm
from batchnorm.studies.data import Dataset, load_data
from batchnorm.studies.errors import StudyError
from batchnorm.studies.learner_torch import TorchLearner, make_learner
from batchnorm.studies.settings import Recipe, Setting
from tests.study.tasks import run_task

_OWN = """
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def data():
    random = np.random.default_rng(0)
    x = random.standard_normal((120, 4)).astype("f")
    y = np.stack([x[:, 0] - x[:, 1], np.abs(x[:, 2])], 1)
    train, test = slice(80), slice(80, None)
    train, test = (TensorDataset(torch.tensor(x[part]), torch.tensor(y[part])) for part in (train, test))
    return DataLoader(train, batch_size=16), test


def net(norm):
    return nn.Sequential(nn.Linear(4, 16), norm(16, activation=nn.ReLU()), nn.Linear(16, 2))


def wide(norm):
    return nn.Linear(4, 3)


def tripled(outputs, targets):
    return 3 * ((outputs - targets) ** 2).mean()


def no_scalar(outputs, targets):
    return (outputs - targets) ** 2


def a_number(outputs, targets):
    return 1.0


def within(outputs, targets):
    assert outputs.dtype == np.float64
    return (abs(outputs - targets) < 0.5).mean()


def of_each(outputs, targets):
    return abs(outputs - targets).mean(1)


def tokens():
    random = np.random.default_rng(0)
    images = random.standard_normal((24, 3, 8, 8)).astype("f")
    rows = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)]
    return iter(rows[:16]), iter(rows[16:])


def resnet(norm):
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    )
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, norm(child.num_features, spatial_dims=2))
    return model


def ids():
    random = np.random.default_rng(0)
    rows = []
    for i in range(24):
        length = int(random.integers(2, 6))
        valid = np.arange(6) < length
        rows.append({"input_ids": random.integers(1, 9, 6) * valid, "attention_mask": valid, "labels": i % 2})
    return iter(rows[:16]), iter(rows[16:])


class Reads(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.embedding, self.norm, self.linear = nn.Embedding(9, 4), norm(4, spatial_dims=1), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        assert input_ids.dtype == attention_mask.dtype == torch.int64
        assert ((input_ids == 0) == (attention_mask == 0)).all()
        x = self.norm(self.embedding(input_ids).transpose(1, 2)) * attention_mask[:, None]
        return {"logits": self.linear(x.sum(2) / attention_mask.sum(1, keepdim=True))}
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own.py"
    path.write_text(_OWN)
    return str(path)


def options(own: str, **more: Any) -> StudyOptions:
    given: dict[str, Any] = {
        "data": (f"{own}:data",),
        "networks": (f"{own}:net",),
        "arms": ("none", "batchnorm"),
        "learning_rates": (1e-2,),
        "seeds": 1,
        "epochs": 2,
        "batch_sizes": (16,),
        "jobs": 1,
        "out": Path(own).parent / "study",
    }
    return StudyOptions(**given | more)


def test_r2_and_accuracy_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    targets = random.standard_normal((50, 3)).astype(np.float32)
    outputs = targets + random.standard_normal((50, 3))
    assert objectives.r2(outputs, targets) == pytest.approx(
        sklearn.metrics.r2_score(targets, outputs), rel=1e-5
    )
    still = np.ones((4, 1))
    assert (objectives.r2(still, still), objectives.r2(still + 1, still)) == (1, 0)
    classes = random.integers(0, 3, 50)
    expected = sklearn.metrics.accuracy_score(classes, outputs.argmax(1))
    assert objectives.accuracy(outputs, classes) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"needs outputs of the targets' shape \(4, 1\), not \(4,\)"):
        objectives.r2(still[:, 0], still)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_mean_losses_are_those_of_torch(loss: str) -> None:
    random = np.random.default_rng(0)
    outputs = 5 * random.standard_normal((30, 4))
    targets = random.integers(0, 4, 30) if loss == "cross_entropy" else random.standard_normal((30, 4))
    function = nn.functional.cross_entropy if loss == "cross_entropy" else nn.functional.mse_loss
    expected = float(function(torch.tensor(outputs), torch.tensor(targets)))
    assert objectives.mean_loss(loss, outputs, targets) == pytest.approx(expected, rel=1e-12)


def test_predictions_move_by_probabilities_or_in_deviations() -> None:
    logits = np.log([[0.5, 0.5], [0.9, 0.1]])
    other = np.log([[0.7, 0.3], [0.9, 0.1]])
    assert objectives.moved("cross_entropy", logits, other) == pytest.approx(0.1)
    numbers = np.array([[0.0], [2.0]])
    assert objectives.moved("mse", numbers, numbers + 0.5) == pytest.approx(0.5)
    assert objectives.moved("mse", np.ones((2, 1)), np.zeros((2, 1))) == 0


def learner(own: str, loss: str, network: str = "net") -> tuple[TorchLearner, Dataset]:
    data = load_data(f"{own}:data", targets=objectives.targets_of(loss))
    setting = Setting("data", f"{own}:{network}", 16)
    return make_learner(setting, Recipe(loss=loss), parse_arm("none"), data, 0, 1e-3, False), data


def test_a_step_is_that_of_the_loss(own: str) -> None:
    ours, data = learner(own, "mse")
    tripled, _ = learner(own, f"{own}:tripled")
    x, y = torch.from_numpy(data.x_train[:16]), torch.from_numpy(data.y_train[:16])
    expected = nn.functional.mse_loss(ours.model(x), y)
    gradients = torch.autograd.grad(expected, list(ours.model.parameters()))
    assert ours.step(data.x_train[:16], data.y_train[:16]) == pytest.approx(expected.item())
    assert tripled.step(data.x_train[:16], data.y_train[:16]) == pytest.approx(3 * expected.item())
    for once, thrice, gradient in zip(
        ours.model.parameters(), tripled.model.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(once.grad, gradient)
        torch.testing.assert_close(thrice.grad, 3 * gradient)
    outputs = tripled.predict(data.x_test)
    assert isinstance(outputs, np.ndarray)
    expected_loss = 3 * ((outputs - data.y_test) ** 2).mean()
    assert tripled.loss(outputs, data.y_test) == pytest.approx(expected_loss, rel=1e-5)
    assert ours.loss(outputs, data.y_test) == pytest.approx(expected_loss / 3, rel=1e-5)


def test_a_study_of_numbers_from_end_to_end(own: str) -> None:
    found = run_study(options(own, loss="mse", epochs=20))
    score = found.results["arms"]["batchnorm"]["test_accuracy"]["mean"]
    assert 0.5 < score < 1
    assert (found.results["provenance"]["loss"], found.results["provenance"]["metric"]) == ("mse", "r2")
    page = found.report.read_text(encoding="utf-8")
    assert "Held-out R²" in page
    assert "ccurac" not in page.replace("accuracy-", "").replace("-accuracy", "").replace('"accuracy"', "")
    again = run_study(options(own, loss="mse", epochs=20))
    assert again.results["runs"] == found.results["runs"]
    with pytest.raises(DataError, match="was made with other settings, metric 'r2'"):
        run_study(options(own, loss="mse", metric=f"{own}:within", epochs=20))


def test_a_loss_and_a_metric_of_ones_own(own: str) -> None:
    found = run_study(options(own, loss=f"{own}:tripled", metric=f"{own}:within"))
    learners = learner(own, f"{own}:tripled")
    run = training.train(
        run_task(
            f"{own}:net",
            "none",
            rate=1e-2,
            batch_size=16,
            epochs=2,
            loss=f"{own}:tripled",
            metric=f"{own}:within",
        ),
        learners[1],
        make_learner,
        lambda _: None,
    )
    assert found.results["arms"]["none"]["test_accuracy"]["mean"] == pytest.approx(run.accuracy)
    command = found.results["provenance"]["command"]
    assert "--loss own.py:tripled --metric own.py:within" in command
    assert str(Path(own).parent) not in command


WRONG = {
    "loss no_scalar": r"returned a tensor of shape \[16, 2\], not a tensor with one number: return its mean",
    "loss a_number": r"returned 1\.0, not a tensor",
    "metric of_each": r"returned an array of shape \(40,\), not one number",
    "network wide": r"the network gives \(2, 3\) for two examples, not \(2, 2\)",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_function_is_one_line(own: str, what: str) -> None:
    kind, name = what.split()
    recipe: dict[str, Any] = {"loss": "mse", "metric": "r2"}
    if kind != "network":
        recipe[kind] = f"{own}:{name}"
    task = run_task(f"{own}:{name if kind == 'network' else 'net'}", batch_size=16, **recipe)
    data = load_data(f"{own}:data", targets="numbers")
    with pytest.raises((StudyError, ValueError), match=WRONG[what]):
        training.train(task, data, make_learner, lambda _: None)


def test_losses_and_targets_have_to_go_together(own: str) -> None:
    with pytest.raises(OptionError, match="unknown loss 'huber': known are cross_entropy, mse, or your own"):
        options(own, loss="huber")
    with pytest.raises(OptionError, match="unknown metric 'f1'"):
        options(own, metric="f1")
    with pytest.raises(OptionError, match="--metric r2 is not for --loss cross_entropy"):
        options(own, metric="r2")
    with pytest.raises(OptionError, match="--metric accuracy needs classes"):
        run_study(options(own, loss=f"{own}:tripled", metric="accuracy"))
    with pytest.raises(DataError, match="data digits has classes, which loss mse is not for"):
        run_study(options(own, data=("digits",), networks=("mlp",), loss="mse"))


@pytest.mark.parametrize(("data", "network"), [("tokens", "resnet"), ("ids", "Reads")])
def test_networks_are_called_by_names_and_give_logits(own: str, data: str, network: str) -> None:
    found = load_data(f"{own}:{data}")
    run = training.train(run_task(f"{own}:{network}", batch_size=8), found, make_learner, lambda _: None)
    assert not run.diverged
    assert run.gradient_norm.layers
    assert (run.movements is None) == (data == "tokens")
    if run.movements is not None:
        assert (run.movements.running.by_mates, run.movements.running.by_padding) == (0, 0)
        assert run.movements.batch.by_padding == 0
        unmasked = training.train(
            run_task(f"{own}:{network}", "batchnorm:unmasked", batch_size=8),
            found,
            make_learner,
            lambda _: None,
        )
        assert unmasked.movements is not None
        assert unmasked.movements.batch.by_padding > 0


def test_the_study_is_a_function_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((40, 4)).astype(np.float32), np.arange(40) % 2
    common: dict[str, Any] = {"arms": ["none", "batchnorm"], "learning_rate": 1e-2, "seeds": 1, "epochs": 1}
    result = batchnorm.study(
        (x, y, x[:8], y[:8]), "mlp", batch_size=8, out=tmp_path / "a", progress=False, **common
    )
    assert set(result.results["arms"]) == {"none", "batchnorm"}
    assert result.report.is_file()
    with pytest.raises(OptionError, match="not a function at the top level of a file"):
        batchnorm.study("digits", lambda norm: norm(3), out=tmp_path / "b", progress=False, **common)
    assert not (tmp_path / "b").exists()
