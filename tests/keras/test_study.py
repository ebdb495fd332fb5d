"""`batchnorm study --framework keras`, on this process's backend."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.errors import DataError, OptionError
from batchnorm.keras import BatchNormalization
from batchnorm.studies import StudyOptions, StudyResult, run_study, training
from batchnorm.studies import probes_keras as probes
from batchnorm.studies.arms import L1_STRENGTH, L2_STRENGTH, Arm, parse_arm
from batchnorm.studies.data import Dataset, load_data
from batchnorm.studies.errors import StudyError
from batchnorm.studies.learner_keras import KerasLearner, make_learner, session
from batchnorm.studies.networks import WS_EPS, WS_GAIN
from batchnorm.studies.networks_keras import NormFactory, build_network
from batchnorm.studies.optimizer_keras import make_optimizer
from batchnorm.studies.records import Movement
from batchnorm.studies.settings import Recipe
from batchnorm.studies.tasks import RunTask
from batchnorm.studies.terminal import Display
from batchnorm.studies.training import probe_steps
from batchnorm.studies.verdicts import judge, read
from tests.keras.study_code import write_own_code
from tests.study.tasks import run_task
from tests.study.test_padding import sequences

pytestmark = pytest.mark.xdist_group("study in Keras")  # a study is run once

BATCH, STEPS = 20, 3  # of 60 examples
ON_ONE_BACKEND = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="its subject is the same on every backend: one is enough"
)


class Counting(Display):
    """Keeps how many runs were started, and what is left."""

    def __init__(self) -> None:
        self.started: tuple[int, int] | None = None
        self.left = 0.0

    def training(self, runs: int, finished: int, work: float, workers: int) -> None:
        del workers
        self.started, self.left = (runs, finished), work

    def advance(self, work: float) -> None:
        self.left -= work


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_code(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def data(own: Path) -> Dataset:
    return load_data(f"{own}:data")


def task(network: str, arm: str = "batchnorm", *, rate: float = 1e-2, epochs: int = 2) -> RunTask:
    return run_task(network, arm, rate=rate, seed=1, epochs=epochs, batch_size=BATCH)


def run_of(run: RunTask, data: Dataset, report: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    with session():
        return asdict(training.train(run, data, make_learner, report))


def train(network: str, data: Dataset, arm: str = "batchnorm", **changes: Any) -> dict[str, Any]:
    return run_of(task(network, arm, **changes), data)


def weights(model: keras.Model) -> list[Any]:
    return [np.array(value, np.float64) for value in model.get_weights()]


# A whole study, in a worker process


def options(own: Path, **changes: Any) -> StudyOptions:
    settings: dict[str, Any] = {
        "framework": "keras",
        "networks": (f"{own}:four_layers",),
        "data": (f"{own}:data",),
        "arms": ("none", "batchnorm"),
        "learning_rates": (1e-2,),
        "seeds": 1,
        "epochs": 2,
        "batch_sizes": (BATCH,),
        "jobs": 1,
        "out": own.parent / "out",
    }
    return StudyOptions(**{**settings, **changes})


@pytest.fixture(scope="module")
def study(own: Path) -> tuple[StudyResult, Counting]:
    display = Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)  # one device, as users have it, and so one pool of threads
        return run_study(options(own), display), display


@pytest.mark.slow
def test_a_study_leaves_what_one_in_torch_leaves(study: tuple[StudyResult, Counting], backend: str) -> None:
    result, display = study
    assert (display.started, display.left) == ((2, 0), pytest.approx(0, abs=1e-6))
    names = {path.name for path in result.folder.iterdir()}
    assert names == {".lock", "runs", "timing", "results.json", "curves.csv", "report.html"}
    provenance = result.results["provenance"]
    assert (provenance["framework"], provenance["backend"]) == ("keras", backend)
    assert provenance["versions"]["keras"] == keras.__version__
    assert backend in provenance["versions"]
    assert provenance["threads"] == {"training": 1, "timing": 1}
    assert f"KERAS_BACKEND={backend} batchnorm study --framework keras" in provenance["command"]
    for stored in (result.folder / "runs").iterdir():
        settings = json.loads(stored.read_text())["settings"]
        assert (settings["framework"], settings["backend"]) == ("keras", backend)
        assert settings["keras"] == keras.__version__
    timed = result.results["timing"]["own.py:four_layers"]
    assert {len(arm["seconds_per_step"]) for arm in timed.values()} == {9}


@pytest.mark.slow
def test_every_verdict_is_given(study: tuple[StudyResult, Counting], backend: str) -> None:
    result, _ = study
    (network,) = read(result.folder / "results.json").networks
    claims = {claim.key: claim for claim in judge(network)}
    assert claims.keys() >= {"accuracy", "gradients", "drift", "statistics", "cost"}
    not_measured = "What it keeps for the backward pass was not measured."
    assert (not_measured in claims["cost"].answer) == (backend != "torch")
    page = result.report.read_text(encoding="utf-8")
    words = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
    assert f"Keras on {words[backend]}" in page
    assert page.count("<svg") >= 6


@pytest.mark.slow
def test_a_study_goes_on_and_is_not_mixed_with_one_in_torch(
    study: tuple[StudyResult, Counting], own: Path
) -> None:
    again = Counting()
    assert run_study(options(own), again).results["runs"] == study[0].results["runs"]
    assert again.started is None
    with pytest.raises(DataError, match=r"'framework' 'keras' \(now None\).*--out"):
        run_study(options(own, framework="torch"))


# One run


def test_losses_gradients_and_inputs_are_those_of_the_mathematics(own: Path, data: Dataset) -> None:
    """At a rate of next to nothing every step has the weights of the first: NumPy can follow."""
    run = run_task(
        f"{own}:net", "l1+l2", rate=1e-12, seed=1, epochs=2, batch_size=BATCH, target_accuracy=0.01
    )
    record = run_of(run, data)
    model = build_network(f"{own}:net", parse_arm("l1+l2"), (4,), 3, seed=1)
    model(data.x_test[:1])
    w1, b1, w2, b2 = weights(model)
    losses, norms = [], []
    for epoch in (1, 2):
        order = np.random.RandomState(1_000_003 + epoch).permutation(60)
        for rows in order.reshape(STEPS, BATCH):
            x, y = data.x_train[rows].astype(np.float64), data.y_train[rows]
            hidden = np.tanh(x @ w1 + b1)
            logits = hidden @ w2 + b2
            share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            losses.append(-np.log(share[np.arange(BATCH), y]).mean())
            by_logits = (share - np.eye(3)[y]) / BATCH
            by_hidden = by_logits @ w2.T * (1 - hidden**2)
            norms.append([np.linalg.norm(x.T @ by_hidden), np.linalg.norm(hidden.T @ by_logits)])
    np.testing.assert_allclose(record["step_loss"], losses, rtol=1e-5)
    probed = record["gradient_norm"]["steps"]
    assert probed == sorted(probe_steps(6))
    layers = record["gradient_norm"]["layers"]
    assert list(layers) == ["dense", "dense_1"]
    np.testing.assert_allclose(np.transpose(list(layers.values())), np.array(norms)[probed], rtol=1e-5)
    seen = data.x_train[np.random.RandomState(0).permutation(60)[:30]].astype(np.float64)
    drift = record["input_drift"]["layers"]
    for layer, values in (("dense", seen), ("dense_1", np.tanh(seen @ w1 + b1))):
        np.testing.assert_allclose(drift[layer]["mean"], values.mean(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(drift[layer]["std"], values.std(axis=0).mean(), rtol=1e-4)
    assert (record["target_checked_every"], record["steps_to_target"]) == (1, 1)
    assert record["parameters"] == 4 * 8 + 8 + 8 * 3 + 3


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_curve(own: Path, data: Dataset) -> None:
    record = train(f"{own}:subclassed", data, "none", rate=1e30)
    assert record["status"] == "diverged"
    *before, last = record["step_loss"]
    assert 1 <= len(before) < STEPS
    assert all(map(math.isfinite, before))
    assert not math.isfinite(last)
    assert len(record["gradient_norm"]["steps"]) == len(before)
    assert record["epochs"] == []
    assert record["test_time_statistics"] is None


def test_a_run_learns_and_repeats_itself(own: Path, data: Dataset) -> None:
    # More steps than are looked into: the target is looked up after every one.
    run = run_task(f"{own}:net", "batchnorm+dropout", seed=1, epochs=9, batch_size=BATCH, target_accuracy=1.0)
    reported: list[int] = []
    record = run_of(run, data, reported.append)
    assert reported == [25, 2]
    assert len(record["gradient_norm"]["steps"]) < len(record["step_loss"]) == 9 * STEPS
    assert record["status"] == "finished"
    assert record["epochs"][-1]["test_loss"] < record["epochs"][0]["test_loss"]
    assert record["epochs"][-1]["train_loss"] == pytest.approx(record["epochs"][-1]["test_loss"], abs=0.5)
    assert np.mean(record["step_loss"][-3:]) < np.mean(record["step_loss"][:3])
    assert record["step_loss"][0] != record["step_loss"][STEPS]
    assert str(run_of(run, data)) == str(record)  # where NaN is NaN
    # The first look inside is at the weights of the start, before the first update.
    start = build_network(f"{own}:net", parse_arm("batchnorm+dropout"), (4,), 3, seed=1)
    start(data.x_test[:1])
    spread = probes.input_spread(start, data.x_train[np.random.RandomState(0).permutation(60)[:30]])
    drift = record["input_drift"]["layers"].values()
    assert [(layer["mean"][0], layer["std"][0]) for layer in drift] == list(spread.values())


def test_statistics_of_three_kinds_are_told_apart(own: Path) -> None:
    record = train(f"{own}:stands_still", load_data(f"{own}:shifted"), rate=3e-2, epochs=4)
    accuracy = record["test_time_statistics"]
    assert accuracy["running"] == record["epochs"][-1]["test_accuracy"] < 0.7
    assert accuracy["batch"] > 0.9
    assert accuracy["calibrated"] > 0.9


def test_a_subclassed_network_is_looked_into_too(own: Path, data: Dataset) -> None:
    record = train(f"{own}:subclassed", data, epochs=1)
    assert list(record["gradient_norm"]["layers"]) == ["dense", "dense_1"]
    assert all(norm > 0 for norms in record["gradient_norm"]["layers"].values() for norm in norms)
    assert record["test_time_statistics"].keys() == {"batch", "running", "calibrated"}


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("five_outputs", r"gives \(2, 5\) for two examples, not \(2, 3\)"),
        ("raises", "no such layer here"),
        ("no_model", "no_model returned int, not a keras.Model"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused(
    own: Path, data: Dataset, network: str, message: str
) -> None:
    with pytest.raises((ValueError, RuntimeError, StudyError), match=message):
        train(f"{own}:{network}", data)


# Parts


def test_the_optimizer_adds_the_penalties_of_kernels_and_notes_gradients_without_them() -> None:
    random = np.random.default_rng(0)
    arm = Arm("strong", l1=0.3, l2=0.2)
    values = [random.standard_normal(shape) for shape in ((4, 3), (3,), (3, 2), (2, 2))]
    variables = [keras.Variable(value, dtype="float32") for value in values]
    unused = keras.Variable(np.ones((2, 2)), dtype="float32", trainable=False)
    kernels = [[variables[0]], [variables[2], variables[3]], []]
    optimizer = make_optimizer(Recipe(), 0.1, arm, kernels, noting=True)
    optimizer.build(variables)
    assert not any(variable is unused for variable in optimizer.variables)
    first = [np.zeros_like(value) for value in values]
    second = [np.zeros_like(value) for value in values]
    for step in range(1, 4):
        gradients = [random.standard_normal(value.shape) * 10.0 ** (-step) for value in values]
        optimizer.apply([keras.ops.convert_to_tensor(g, "float32") for g in gradients], variables)
        noted = keras.ops.convert_to_numpy(optimizer.gradient_norms)
        both = math.hypot(np.linalg.norm(gradients[2]), np.linalg.norm(gradients[3]))
        np.testing.assert_allclose(noted, [np.linalg.norm(gradients[0]), both, math.nan], rtol=1e-5)
        for i, value in enumerate(values):
            penalty = 0.0 if i == 1 else 0.3 * np.sign(value) + 0.4 * value
            gradient = gradients[i] + penalty
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            mean, square = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            values[i] = value - 0.1 * mean / (np.sqrt(square) + 1e-8)
    for variable, value in zip(variables, values, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), value, rtol=1e-4, atol=1e-5)
    assert parse_arm("l1+l2") == Arm("l1+l2", l1=L1_STRENGTH, l2=L2_STRENGTH)


def test_norms_of_gradients_that_all_but_vanished_are_no_zeros() -> None:
    variable = keras.Variable(np.zeros(4), dtype="float32")
    optimizer = make_optimizer(Recipe(), 1e-3, parse_arm("none"), [[variable]], noting=True)
    optimizer.build([variable])
    for scale, expected in ((1e-30, 2e-30), (0.0, 0.0), (1e30, 2e30)):
        optimizer.apply([keras.ops.convert_to_tensor(np.full(4, scale), "float32")], [variable])
        noted = keras.ops.convert_to_numpy(optimizer.gradient_norms)
        np.testing.assert_allclose(noted, [expected], rtol=1e-5)


def small() -> keras.Sequential:
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, bias_initializer="random_normal", name="first"),
            BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Dense(3, name="last"),
        ]
    )
    model.get_layer("norm").moving_mean.assign(np.full(6, 50.0))
    return model


def test_batch_statistics_are_those_of_the_batch_and_undone_after_an_error(data: Dataset) -> None:
    model = small()
    before = [np.array(value) for value in map(keras.ops.convert_to_numpy, model.variables)]
    w, b, _, _, _, _, *rest = weights(model)
    x = data.x_train.astype(np.float64)
    hidden = x @ w + b
    normalized = (hidden - hidden.mean(axis=0)) / np.sqrt(hidden.var(axis=0) + 1e-3)
    expected = normalized @ rest[-2] + rest[-1]
    with probes.batch_statistics(model):
        inside = keras.ops.convert_to_numpy(model(data.x_train, training=False))
    with pytest.raises(Exception, match=r"shape|incompatible"), probes.batch_statistics(model):
        model(data.x_train, training=False) + model(data.x_train[:, :3], training=False)
    np.testing.assert_allclose(inside, expected, rtol=1e-4, atol=1e-5)
    spread = probes.input_spread(model, data.x_train)
    assert spread["first"] == (
        pytest.approx(x.mean(), rel=1e-5),
        pytest.approx(x.std(axis=0).mean(), rel=1e-5),
    )
    assert spread["last"] == (
        pytest.approx(0, abs=1e-5),
        pytest.approx(normalized.std(axis=0).mean(), rel=1e-3),
    )
    for value, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, keras.ops.convert_to_numpy(variable))
    assert all("call" not in vars(layer) for layer in model.layers)
    running = keras.ops.convert_to_numpy(model(data.x_train, training=False))
    assert np.abs(running - expected).max() > 1


def test_a_frozen_normalization_keeps_its_statistics(data: Dataset) -> None:
    model = small()
    model.get_layer("norm").trainable = False
    assert probes.batch_norms(model) == []
    running = keras.ops.convert_to_numpy(model(data.x_train, training=False))
    with probes.batch_statistics(model):
        inside = keras.ops.convert_to_numpy(model(data.x_train, training=False))
    np.testing.assert_array_equal(inside, running)


def test_inputs_of_convolutions_are_looked_at_by_channel() -> None:
    x = np.zeros((4, 3, 3, 2), np.float32)
    x[:, :2, :, 1] = np.array([0.0, 3.0, 0.0, 3.0]).reshape(4, 1, 1)
    model = keras.Sequential([keras.layers.Conv2D(1, 3, data_format="channels_last", name="conv")])
    assert probes.input_spread(model, x)["conv"] == pytest.approx((0.5, math.sqrt(2) / 2))


def test_layers_are_found_at_any_depth_and_told_apart_by_name() -> None:
    inner = keras.Sequential(
        [keras.layers.Dense(4, name="dense"), keras.layers.SeparableConv1D(2, 1, name="s")]
    )
    model = keras.Sequential([inner, keras.layers.Dense(3, name="dense")])
    model.build((None, 5, 4))
    layers = probes.weight_layers(model)
    assert list(layers) == ["dense", "s", "dense#2"]
    names = [[kernel.name for kernel in probes.kernels(layer)] for layer in layers.values()]
    assert names == [["kernel"], ["depthwise_kernel", "pointwise_kernel"], ["kernel"]]


def test_bytes_kept_are_those_that_autograd_saves_once_each(backend: str) -> None:
    x, y = np.ones((5, 4), np.float32), np.array([0, 1, 2, 0, 1], np.int32)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), BatchNormalization()])
    before = weights(model)
    kept = KerasLearner(model, parse_arm("none"), Recipe(), 1e-3).bytes_kept(x, y)
    if backend != "torch":
        assert kept is None
        return
    assert kept is not None
    # The input, what is normalized and what is returned; not the weights; no more than a handful of copies.
    assert 4 * (5 * 4 + 5 * 3) <= kept <= 4 * (5 * 4 + 8 * 5 * 3)
    wider = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(3)])
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    more, less = (
        KerasLearner(one, parse_arm("none"), Recipe(), 1e-3).bytes_kept(x, y) for one in (wider, plain)
    )
    assert more is not None
    assert less is not None
    assert more - less == 4 * 5 * 3
    for value, old in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(value, old)


def test_evaluation_is_the_mean_over_all_examples(data: Dataset) -> None:
    model = small()
    output = keras.ops.convert_to_numpy(model(data.x_train, training=False)).astype(np.float64)
    share = np.exp(output - output.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    learner = KerasLearner(model, parse_arm("none"), Recipe(), 1e-3)
    loss, accuracy = training.evaluate(learner, data.x_train, data.y_train)
    assert loss == pytest.approx(-np.log(share[np.arange(60), data.y_train]).mean(), rel=1e-5)
    assert accuracy == (output.argmax(axis=1) == data.y_train).mean()


# Networks


@ON_ONE_BACKEND
@pytest.mark.parametrize(
    ("network", "shapes"),
    [
        ("mlp", [(784, 64), (64, 10)]),
        ("deep", [(784, 100), *[(100, 100)] * 7, (100, 10)]),
        ("cnn", [(3, 3, 1, 8), (3, 3, 8, 16), (3, 3, 16, 32), (288, 10)]),
    ],
)
def test_arms_of_a_seed_start_from_the_same_weights(network: str, shapes: list[tuple[int, ...]]) -> None:
    def start(arm: str, seed: int) -> list[Any]:
        model = build_network(network, parse_arm(arm), (28, 28), 10, seed)
        assert model.output_shape == (None, 10)
        layers = probes.weight_layers(model).values()
        return [keras.ops.convert_to_numpy(value).copy() for layer in layers for value in layer.weights]

    first = start("none", 4)
    assert [value.shape for value in first[::2]] == shapes
    for arm in ("batchnorm+dropout", "layernorm"):  # whatever an arm adds to a network
        for value, other in zip(first, start(arm, 4), strict=True):
            np.testing.assert_array_equal(value, other)
    another = start("none", 5)
    assert not any(np.array_equal(a, b) for a, b in zip(first[::2], another[::2], strict=True))
    fan_in = math.prod(shapes[0][:-1])
    limit = math.sqrt(6 / (784 + 100)) if network == "deep" else 1 / math.sqrt(fan_in)
    assert 0.9 * limit < np.abs(first[0]).max() <= limit
    assert first[1].any() == (network != "deep")  # biases start from 0 in deep alone


@ON_ONE_BACKEND
@pytest.mark.parametrize(
    ("arm", "spatial_dims", "expected"),
    [
        ("none", 0, ["Identity"]),
        ("l1", 2, ["Identity"]),
        ("batchnorm", 0, ["BatchNormalization"]),
        ("batchnorm+l2", 3, ["BatchNormalization"]),
        ("layernorm", 0, ["LayerNormalization"]),
        ("layernorm", 1, ["LayerNormalization"]),
        ("layernorm", 2, ["GroupNormalization"]),
        ("dropout", 0, ["Dropout"]),
        ("dropout", 1, ["SpatialDropout1D"]),
        ("dropout", 2, ["SpatialDropout2D"]),
        ("dropout", 3, ["SpatialDropout3D"]),
    ],
)
def test_each_arm_gives_its_own_layer_for_its_own_rank(
    arm: str, spatial_dims: int, expected: list[str]
) -> None:
    made = NormFactory(parse_arm(arm))(6, spatial_dims=spatial_dims)
    assert [type(made).__name__] == expected
    assert isinstance(made, BatchNormalization) == arm.startswith("batchnorm")
    x = np.random.default_rng(0).standard_normal((4, *[3] * spatial_dims, 6)).astype(np.float32)
    assert made(x).shape == x.shape


@ON_ONE_BACKEND
def test_normalization_comes_before_the_activation_and_dropout_after_it() -> None:
    norm = NormFactory(parse_arm("batchnorm+dropout"), seed=2)
    relu = keras.layers.ReLU()
    made = [norm(5, activation=relu), norm(5, 2, dropout=0.1)]
    assert isinstance(made[0].layers[0], BatchNormalization)
    assert made[0].layers[1] is relu
    rates = [one.layers[-1].rate for one in made] + [NormFactory(parse_arm("dropout"))(4, 2).rate]
    assert rates == [0.5, 0.1, 0.2]
    assert made[0].layers[-1].seed != made[1].layers[-1].seed
    with pytest.raises(OptionError, match="spatial_dims is 0, 1, 2 or 3"):
        norm(4, 4)


@ON_ONE_BACKEND
def test_cnn_takes_images_with_and_without_channels() -> None:
    model = build_network("cnn", parse_arm("batchnorm"), (16, 20, 3), 4, 0)
    assert (model.input_shape, model.output_shape) == ((None, 16, 20, 3), (None, 4))
    with pytest.raises(DataError, match=r"cnn needs images .* shape \(4,\)"):
        build_network("cnn", parse_arm("none"), (4,), 3, 0)


def test_the_mask_keeps_padding_out_of_a_prediction() -> None:
    moved = {}
    for arm in ("batchnorm", "batchnorm:unmasked"):
        with session():
            run = training.train(
                run_task("conv1d", arm, batch_size=10), sequences(), make_learner, lambda _: None
            )
        assert run.movements is not None
        assert run.movements.running == Movement(0, 0)
        moved[arm] = run.movements.batch
    assert moved["batchnorm"].by_padding == 0 < moved["batchnorm"].by_mates
    assert moved["batchnorm:unmasked"].by_padding > 0.001


def test_a_network_of_one_length_is_not_given_more_padding() -> None:
    with session():
        run = training.train(
            run_task("mlp", "batchnorm", batch_size=10), sequences(), make_learner, lambda _: None
        )
    assert run.movements is not None
    assert np.isnan([run.movements.running.by_padding, run.movements.batch.by_padding]).all()
    assert run.movements.running.by_mates == 0 < run.movements.batch.by_mates


@pytest.mark.parametrize(
    ("network", "arm"),
    [
        ("residual-mlp", "skipinit"),
        ("residual-mlp", "dropout+batchnorm:after-activation:Ghost(10)"),
        ("mlp", "batchnorm:Running(after=0.5)"),
        ("mlp", "stock"),
        ("mlp", "groupnorm+weightstandard"),
    ],
)
def test_every_kind_of_arm_trains(data: Dataset, network: str, arm: str) -> None:
    run = run_task(network, arm, seed=1, epochs=4, batch_size=BATCH, optimizer="sgd", momentum=0.9)
    losses = run_of(run, data)["step_loss"]
    assert all(map(math.isfinite, losses))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_standardized_kernels_are_those_of_torch() -> None:
    model = build_network("mlp", parse_arm("weightstandard"), (4,), 3, 0)
    layer, last = probes.weight_layers(model).values()
    kernel = keras.ops.convert_to_numpy(layer.kernel).astype(np.float64)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    mean, var = kernel.mean(axis=0), kernel.var(axis=0)
    standardized = WS_GAIN * (kernel - mean) / np.sqrt(4 * var + WS_EPS)
    bias = keras.ops.convert_to_numpy(layer.bias)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(layer(x)), x @ standardized + bias, rtol=1e-4, atol=1e-5
    )
    assert type(last) is keras.layers.Dense


@ON_ONE_BACKEND
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weights_alone_decay_as_in_torch(optimizer: str) -> None:
    import torch

    kernel, bias = (keras.Variable(np.ones((2, 2)), dtype="float32") for _ in range(2))
    recipe = Recipe(optimizer=optimizer, momentum=0.5 if optimizer == "sgd" else 0.0, weight_decay=0.1)
    ours = make_optimizer(recipe, 0.1, parse_arm("none"), [[kernel]], noting=False)
    ours.build([kernel, bias])
    expected = [torch.ones(2, 2, requires_grad=True) for _ in range(2)]
    groups = [{"params": [expected[0]], "weight_decay": 0.1}, {"params": [expected[1]], "weight_decay": 0.0}]
    theirs = {
        "sgd": lambda: torch.optim.SGD(groups, 0.1, momentum=0.5),
        "adam": lambda: torch.optim.Adam(groups, 0.1),
        "adamw": lambda: torch.optim.AdamW(groups, 0.1),
    }[optimizer]()
    random = np.random.default_rng(0)
    for _ in range(3):
        gradients = [random.standard_normal((2, 2)).astype(np.float32) for _ in range(2)]
        ours.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], [kernel, bias])
        for value, gradient in zip(expected, gradients, strict=True):
            value.grad = torch.from_numpy(gradient)
        theirs.step()
    for variable, value in zip((kernel, bias), expected, strict=True):
        found = keras.ops.convert_to_numpy(variable)
        np.testing.assert_allclose(found, value.detach().numpy(), rtol=1e-4, atol=1e-5)
