"""Policies in use: configs, files, small and damaged batches, and the verbs on models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import batchnorm
from batchnorm import conventions
from batchnorm.errors import OptionError
from batchnorm.keras import BatchNormalization, calibrate, fold, fold_table, freeze, unfreeze
from tests.support.compare import assert_close

from .gradients import Array
from .policy_cases import CASES, EPSILON, made_for

F32 = torch.float32
POLICIES = {name: case.policy for name, case in CASES.items() if case.training}
# A policy is plain data on every backend; three differ in weights, in folding and in what they are over.
ALIKE = POLICIES.keys() - {"renorm-half-open", "adapted", "synced-ghost"}
every_policy = pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, id=name, marks=[pytest.mark.one_backend] if name in ALIKE else [])
        for name, policy in POLICIES.items()
    ],
)


def draw(*shape: int, seed: int = 1) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * 1.5 + 2).astype("float32")


def network(policy: Any, **options: Any) -> Any:
    keras.utils.set_random_seed(3)
    norm = BatchNormalization(name="norm", momentum=0.9, statistics=policy, **options)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), norm, keras.layers.Dense(2)])


def trained(model: Any) -> Any:
    model.compile("sgd", "mse", jit_compile=keras.backend.backend() != "torch")
    model.fit(draw(11, 6), draw(11, 2, seed=2), batch_size=8, epochs=2, verbose=0)
    return model


@every_policy
def test_a_policy_goes_through_configs_and_files(policy: Any, tmp_path: Path) -> None:
    model = trained(network(policy))
    config = model.layers[1].get_config()
    assert json.loads(json.dumps(config))["statistics"]["policy"] == type(policy).__name__
    assert BatchNormalization.from_config(config).statistics == policy
    assert keras.models.clone_model(model).layers[1].statistics == policy
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    norm = again.layers[1]
    assert norm.statistics == policy
    assert [w.name for w in norm.weights] == [w.name for w in model.layers[1].weights]
    for one, other in zip(norm.get_weights(), model.layers[1].get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    x = draw(5, 6, seed=4)
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_only_bounds_that_open_by_batches_have_a_weight_more() -> None:
    stock = ["gamma", "beta", "moving_mean", "moving_variance"]
    for name, policy in POLICIES.items():
        counts = name == "renorm-half-open"
        layer = made_for(CASES[name], 4, -1, 2)
        assert [weight.name for weight in layer.weights] == stock + ["batches"] * counts, name
        assert policy.counts_batches == counts


def test_an_unknown_policy_in_a_file_is_an_error_that_names_it() -> None:
    config = BatchNormalization(name="one").get_config() | {"statistics": {"policy": "Ghostly", "size": 3}}
    with pytest.raises(
        (OptionError, TypeError), match=r"one \(BatchNormalization\): .*Ghostly.*known are Batch"
    ):
        BatchNormalization.from_config(config)


def test_a_built_layer_takes_another_policy_unless_its_weights_change() -> None:
    layer = made_for(CASES["batch"], 4, -1, 2)
    x = draw(6, 4)
    layer.statistics = batchnorm.Adapted(0.0)
    y = keras.ops.convert_to_numpy(layer(x, training=False)).astype(float)
    gamma, beta = (weight.numpy().astype(float) for weight in layer.weights[:2])
    own = (x - x.mean(0, dtype=float)) / np.sqrt(x.var(0, dtype=float) + EPSILON)
    assert_close(y, own * gamma + beta, dtype=F32, what="y")
    with pytest.raises(
        OptionError, match=r"\(BatchNormalization\): statistics=Renorm\(.* needs a count of batches"
    ):
        layer.statistics = batchnorm.Renorm()
    assert layer.statistics == batchnorm.Adapted(0.0)
    counting = made_for(CASES["renorm-half-open"], 4, -1, 2)
    with pytest.raises(OptionError, match="has no count of batches"):
        counting.statistics = batchnorm.Batch()


def test_a_compiled_model_adapts_after_compile_also_where_it_is_not_trainable() -> None:
    model, x = trained(network(batchnorm.Batch())), draw(8, 6, seed=4) + 5
    before = model.predict(x, verbose=0)
    norm = model.layers[1]
    norm.statistics = batchnorm.Adapted(0.0)
    model.compile()
    after = model.predict(x, verbose=0)
    assert np.abs(after - before).max() > 0.1
    norm.trainable = False
    x = draw(8, 4)
    for training in (True, False):
        y = keras.ops.convert_to_numpy(norm(x, training=training)).astype(float)
        gamma, beta, mean, var = norm.get_weights()
        own = (x - x.mean(0, dtype=float)) / np.sqrt(x.var(0, dtype=float) + norm.epsilon)
        assert_close(y, own * gamma + beta, dtype=F32, what="y")
    for one, other in zip(norm.get_weights(), (gamma, beta, mean, var), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(1, 4), (5, 4), (1, 1, 4)])
def test_row_19_one_value_per_channel(shape: tuple[int, ...]) -> None:
    """Row 19: a last ghost batch, or batch, of one value is normalized by the moving statistics, if asked."""
    keep = {
        name: made_for(CASES["ghost-even"], 4, -1, len(shape), small_batch=name)
        for name in ("allow", "running")
    }
    x, layer = draw(*shape), keep["running"]
    gamma, beta, mean, var = (weight.astype(float) for weight in layer.get_weights())
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    given = (x[-1:] - mean) / np.sqrt(var + EPSILON) * gamma + beta
    assert_close(y[-1:], given, dtype=F32, what="y")
    allowed = keras.ops.convert_to_numpy(keep["allow"](x, training=True))  # as Keras
    assert_close(allowed[-1:], np.broadcast_to(beta, x[-1:].shape), dtype=F32, what="y")
    if len(x) == 1:
        for old, new in zip((gamma, beta, mean, var), layer.get_weights(), strict=True):
            np.testing.assert_array_equal(new, old)
    else:
        np.testing.assert_allclose(y[:4], allowed[:4], rtol=1e-5, atol=1e-6)
        assert not np.array_equal(layer.moving_mean.numpy(), mean.astype("float32"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["batch", "ghost", "ghost-in-turn", "renorm-half-open"])
def test_a_batch_with_nan_is_skipped_and_counted(name: str, bad: float) -> None:
    layer = made_for(CASES[name], 4, -1, 2, nonfinite="skip")
    usual = made_for(CASES[name], 4, -1, 2)
    x = draw(8, 4)
    broken = np.where(np.arange(32).reshape(8, 4) == 21, np.float32(bad), x)
    before = layer.get_weights()
    layer(broken, training=True)
    assert int(layer.skipped.numpy()) == 1
    for weight, old in zip(layer.weights, before, strict=True):
        if weight is not layer.skipped:
            np.testing.assert_array_equal(weight.numpy(), old)
    layer(x, training=True)
    usual(x, training=True)
    assert int(layer.skipped.numpy()) == 1
    for one, other in zip(layer.weights, usual.weights, strict=False):  # the counter comes last
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    usual(broken, training=True)
    assert not np.isfinite(usual.moving_mean.numpy()).all()


def test_skipping_in_a_compiled_step() -> None:
    model = network(batchnorm.Batch(), nonfinite="skip")
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=keras.backend.backend() != "torch")
    x = draw(24, 6)
    x[20, 0] = np.nan  # in the last batch: what it does to other layers' weights is not the norm's to undo
    model.fit(x, draw(24, 2), batch_size=8, shuffle=False, verbose=0)
    norm = model.layers[1]
    assert int(norm.skipped.numpy()) == 1
    assert np.isfinite(norm.moving_mean.numpy()).all()


@pytest.mark.parametrize("name", ["ghost", "renorm-half-open", "adapted", "synced-ghost"])
def test_calibrate_sets_the_statistics_of_whole_batches(name: str) -> None:
    model = network(POLICIES[name])
    x = draw(16, 6)
    calibrate(model, x, batch_size=8, verbose=0)
    inner = keras.ops.convert_to_numpy(model.layers[0](x)).astype(float)
    norm = model.layers[1]
    assert_close(norm.moving_mean.numpy(), inner.mean(0), dtype=F32, what="moving_mean")
    assert_close(norm.moving_variance.numpy(), inner.var(0), dtype=F32, what="moving_variance")
    assert norm.batches is None or int(norm.batches.numpy()) == 0


def test_row_4_a_layer_with_running_statistics_counts_as_frozen() -> None:
    """Row 4: `calibrate` leaves it alone, and training moves its parameters only."""
    model = network(batchnorm.Running())
    with pytest.raises(OptionError, match=r"statistics=Running\(\)\), norm for one"):
        calibrate(model, draw(16, 6), verbose=0)
    gamma, beta, mean, var = model.layers[1].get_weights()
    trained(model)
    for old, new, moves in zip(
        (gamma, beta, mean, var), model.layers[1].get_weights(), (1, 1, 0, 0), strict=True
    ):
        assert np.array_equal(old, new) == (not moves)


def test_freeze_and_unfreeze_keep_the_policy() -> None:
    model = freeze(network(batchnorm.Ghost(3)))
    norm, x = model.layers[1], draw(8, 4)
    frozen, inference = (keras.ops.convert_to_numpy(norm(x, training=mode)) for mode in (True, False))
    np.testing.assert_array_equal(frozen, inference)
    unfreeze(model)
    assert norm.statistics == batchnorm.Ghost(3)
    assert not np.array_equal(keras.ops.convert_to_numpy(norm(x, training=True)), inference)


@every_policy
def test_fold_folds_all_but_what_looks_at_the_batch(policy: Any) -> None:
    model = trained(network(policy))
    (row,) = fold_table(model).rows
    adapts = isinstance(policy, batchnorm.Adapted)
    assert (row.into is None) == adapts
    assert ("it normalizes by the batch at inference too" in row.reason) == adapts
    x = draw(5, 6)
    copy = fold(model, x, verbose=0)
    np.testing.assert_allclose(copy.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    assert (len(copy.layers) == len(model.layers)) == adapts


@every_policy
def test_a_layer_keeps_its_policy_between_the_frameworks(policy: Any) -> None:
    layer = made_for(CASES["batch"]._replace(policy=policy, batches=12), 5, -1, 3)
    settings, state = conventions.keras_to_torch(layer)
    theirs = batchnorm.BatchNorm1d(**settings).eval()
    theirs.load_state_dict(state)
    assert theirs.statistics == policy
    assert theirs.num_batches_tracked == (12 if policy.counts_batches else 0)
    x = draw(7, 3, 5)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.moveaxis(x, -1, 1).copy())).numpy()
    ours = keras.ops.convert_to_numpy(layer(x, training=False))
    assert_close(np.moveaxis(ours, -1, 1), expected, dtype=F32, what="y")
    settings, weights = conventions.torch_to_keras(theirs)
    back = BatchNormalization(**settings)
    back.build((None, None, 5))
    back.set_weights(weights)
    assert back.statistics == policy
    for one, other in zip(back.get_weights(), layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_keras_cannot_keep_to_is_not_converted() -> None:
    theirs = batchnorm.BatchNorm1d(3, statistics=batchnorm.Synced((0, 1)))
    with pytest.raises(
        OptionError, match=r"^BatchNorm1d: Keras synchronizes over all replicas.*Synced\(group=None"
    ):
        conventions.torch_to_keras(theirs)
    theirs.statistics = batchnorm.Synced()
    assert conventions.torch_to_keras(theirs)[0]["statistics"] == batchnorm.Synced()
