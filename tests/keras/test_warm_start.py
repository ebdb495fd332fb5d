"""Row 56: the first update of the moving statistics takes the batch's own, not mixed with 0 and 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch

import batchnorm
from batchnorm import reference
from batchnorm.errors import OptionError
from batchnorm.keras import BatchNormalization
from tests.support.compare import assert_close

from .gradients import Array

MOMENTUM = 0.8
POLICIES = {
    "batch": batchnorm.Batch(),
    "ghost": batchnorm.Ghost(4),
    "sequential": batchnorm.Ghost(4, sequential=True),
    "synced": batchnorm.Synced(),
    "renorm": batchnorm.Renorm(1.5, 0.5, (0, 9), (0, 0)),
}


def made(**options: Any) -> BatchNormalization:
    layer = BatchNormalization(momentum=MOMENTUM, warm_start=True, **options)
    layer.build((None, 5, 3))
    return layer


def batches(number: int = 3) -> list[Array]:
    random = np.random.default_rng(4)
    return [(random.standard_normal((10, 5, 3)) * (k + 1) + 3 - k).astype("float32") for k in range(number)]


def moving(layer: BatchNormalization) -> reference.Running:
    return reference.Running(layer.moving_mean.numpy(), layer.moving_variance.numpy())


def after(
    layer: BatchNormalization, x: Array, mask: Array | None, running: reference.Running | None
) -> reference.Running:
    """Return the reference's moving statistics after a batch `[N, S, C]`; None = no batch has come before."""
    size = 4 if layer.statistics.is_sequential else len(x)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        found = reference.moments(x[part].transpose(0, 2, 1), None if mask is None else mask[part])
        running = reference.update_running_keras(
            running or moving(layer),
            found.mean[0],
            found.var[0],
            found.count[0],
            momentum=MOMENTUM if running else 0.0,
        )
    assert running is not None
    return running


def assert_moved(layer: BatchNormalization, running: reference.Running) -> None:
    assert_close(moving(layer).mean, running.mean, dtype=torch.float32, what="moving_mean")
    assert_close(moving(layer).var, running.var, dtype=torch.float32, what="moving_variance")


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("policy", POLICIES)
def test_row_56_the_first_update_is_the_batch_and_later_ones_mix(policy: str, masked: bool) -> None:
    """Row 56: by every policy, with masks, on kernels and on `keras.ops`."""
    layer, running = made(statistics=POLICIES[policy]), None
    for x in batches():
        mask = np.random.default_rng(7).random((10, 5)) > 0.3 if masked else None
        running = after(layer, x, mask, running)
        layer(x, training=True, **({} if mask is None else {"mask": mask}))
        assert_moved(layer, running)
    assert [weight.name for weight in layer.weights][:4] == [
        "gamma",
        "beta",
        "moving_mean",
        "moving_variance",
    ]


def test_renorm_begins_all_of_its_statistics() -> None:
    layer = made(renorm=True)
    first, second, _ = batches()
    layer(first, training=True)
    std = np.sqrt(first.var((0, 1), dtype=float) + layer.epsilon)
    np.testing.assert_allclose(layer.renorm_mean.numpy(), first.mean((0, 1), dtype=float), rtol=1e-5)
    np.testing.assert_allclose(layer.renorm_stddev.numpy(), std, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), first.var((0, 1), dtype=float), rtol=1e-4)
    layer(second, training=True)
    mean = 0.99 * first.mean((0, 1), dtype=float) + 0.01 * second.mean((0, 1), dtype=float)
    np.testing.assert_allclose(layer.renorm_mean.numpy(), mean, rtol=1e-5)


def test_batches_that_move_nothing_begin_nothing() -> None:
    """A skipped batch, and ghost batches that a mask leaves empty."""
    x = batches(1)[0]
    bad = x.copy()
    bad[0, 0, 0] = np.inf
    for policy in (batchnorm.Batch(), batchnorm.Ghost(4, sequential=True)):
        layer = made(nonfinite="skip", statistics=policy)
        layer(bad, training=True)
        layer(x, training=True, mask=np.zeros((10, 5), bool))
        assert int(layer.skipped.numpy()) == 1
        mask = np.ones((10, 5), bool)
        mask[:4] = False  # all of the first ghost batch
        expected = after(layer, x[4:], None, None)
        layer(x, training=True, mask=mask)
        assert_moved(layer, expected)


def test_loaded_statistics_count_as_begun() -> None:
    stock = keras.layers.BatchNormalization(momentum=MOMENTUM)
    stock.build((None, 5, 3))
    stock.moving_mean.assign([1.0, 2.0, 3.0])
    layer, x = made(), batches(1)[0]
    layer.set_weights(stock.get_weights())
    expected = after(layer, x, None, moving(layer))
    layer(x, training=True)
    assert_moved(layer, expected)


def test_within_fit_and_through_files(tmp_path: Path) -> None:
    x = batches(1)[0]
    norm = BatchNormalization(momentum=MOMENTUM, warm_start=True)
    model = keras.Sequential([keras.Input((5, 3)), norm])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, x, batch_size=10, epochs=2, verbose=0)
    found = reference.moments(x.transpose(0, 2, 1))
    assert_moved(norm, reference.Running(found.mean[0], found.var[0]))
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").layers[0].warm_start is True


def test_wrong_values_are_refused() -> None:
    with pytest.raises(
        OptionError, match=r"^bn \(BatchNormalization\): warm_start must be True or False; got"
    ):
        BatchNormalization(name="bn", warm_start="yes")


def test_the_doctor_finds_no_initial_values_in_it() -> None:
    """A layer that counts its batches is known to have had few."""
    for warm_start in (True, False):
        norm = BatchNormalization(statistics=POLICIES["renorm"], warm_start=warm_start)
        model = keras.Sequential([keras.Input((5, 3)), norm])
        norm(2 * batches(1)[0], training=True)
        found = {finding.check for finding in batchnorm.keras.diagnose(model).findings}
        assert ("prior" in found) is not warm_start
        assert "never-updated" not in found
