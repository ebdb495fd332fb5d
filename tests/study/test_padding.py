"""Data with padding: the mask of the norm, and what moves a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.errors import OptionError
from batchnorm.studies import StudyOptions, run_study, training
from batchnorm.studies.data import Dataset, load_data
from batchnorm.studies.learner_torch import make_learner, session
from batchnorm.studies.records import Movement, Movements
from batchnorm.studies.verdicts import judge, read
from tests.study.results_fixture import each_seed, record, results, write
from tests.study.tasks import run_task

FINGERPRINTS = ["99fad1762f3835db", "80d3029cd18ffcf9"]


def sequences(*, tokens: bool = False) -> Dataset:
    """Sequences of 3 to 12 frames of 4 numbers, or of bytes, whose class is in every one of them."""
    random = np.random.default_rng(3)
    y = np.arange(90) % 3
    lengths = random.integers(3, 13, 90)
    x = np.zeros((90, 12) if tokens else (90, 12, 4), np.float32)
    for row, one, length in zip(x, y, lengths, strict=True):
        noise = random.integers(0, 9, length) if tokens else random.standard_normal((length, 4))
        row[:length] = 10 * one + 1 + noise
    return Dataset("sequences", "here", x[:60], y[:60], x[60:], y[60:], lengths[:60], lengths[60:])


def movements(arm: str, network: str = "conv1d") -> Movements:
    task = run_task(network, arm, batch_size=10)
    with session():
        run = training.train(task, sequences(tokens=network == "characters"), make_learner, lambda _: None)
    assert run.movements is not None
    return run.movements


@pytest.mark.parametrize("network", ["conv1d", "characters"])
def test_the_mask_keeps_padding_out_of_a_prediction(network: str) -> None:
    masked, unmasked = movements("batchnorm", network), movements("batchnorm:unmasked", network)
    assert masked.running == unmasked.running == Movement(0, 0)
    assert masked.batch.by_mates > 0.001
    assert masked.batch.by_padding == 0
    assert unmasked.batch.by_padding > 0.001


@pytest.mark.parametrize("arm", ["none", "layernorm", "dropout"])
def test_other_arms_see_neither_padding_nor_their_mates(arm: str) -> None:
    assert movements(arm) == Movements(Movement(0, 0), Movement(0, 0))


def test_a_network_of_one_length_is_not_given_more_padding() -> None:
    found = movements("batchnorm", "mlp")
    assert np.isnan([found.running.by_padding, found.batch.by_padding]).all()
    assert found.running.by_mates == 0 < found.batch.by_mates


def test_packaged_sequences_have_zeros_beyond_their_lengths() -> None:
    vowels, languages = load_data("vowels"), load_data("languages")
    assert (vowels.x_train.shape, vowels.x_test.shape, vowels.outputs) == ((270, 29, 12), (370, 29, 12), 9)
    assert (languages.x_train.shape, languages.x_test.shape) == ((9000, 116), (3000, 116))
    assert np.bincount(languages.y_test).tolist() == [50] * 60
    for data in (vowels, languages):
        assert data.lengths_test is not None
        beyond = np.arange(data.x_test.shape[1]) >= data.lengths_test[:, None]
        assert not data.x_test[beyond].any()
        assert data.x_test[~beyond].any()
    assert languages.lengths_test is not None
    for row, length in zip(languages.x_test[:50], languages.lengths_test, strict=False):
        assert 5 <= len(row[:length].astype(np.uint8).tobytes().decode()) <= 80
    assert [data.fingerprint() for data in (vowels, languages)] == FINGERPRINTS


def test_the_verdict_compares_the_norm_with_and_without_the_mask(tmp_path: Path) -> None:
    def runs(arm: str, accuracy: float, moved: float) -> list[dict[str, Any]]:
        served = {"by_mates": 0.0, "by_padding": 0.0}
        more = {"movements": {"running": served, "batch": {"by_mates": 0.1, "by_padding": moved}}}
        return each_seed(lambda seed: record(arm=arm, seed=seed, accuracy=accuracy + seed / 1000) | more)

    content = results([*runs("batchnorm", 0.9, 0.0), *runs("batchnorm:unmasked", 0.8, 0.123)])
    (network,) = read(write(tmp_path, content) / "results.json").networks
    (claim,) = (claim for claim in judge(network) if claim.key == "padding")
    assert claim.grade.value == "supported"
    assert claim.figure.startswith("+10.0")
    assert "batchnorm 0.0\N{NO-BREAK SPACE}%, batchnorm:unmasked 12.3\N{NO-BREAK SPACE}%" in claim.details[-1]


def test_the_unmasked_norm_is_for_padding_alone(tmp_path: Path) -> None:
    options = StudyOptions(data=("digits",), arms=("none", "batchnorm:unmasked"), out=tmp_path)
    with pytest.raises(OptionError, match="batchnorm:unmasked is for data with padding; digits has none"):
        run_study(options)
    assert "batchnorm:unmasked" in StudyOptions(data=("vowels",)).arms_on("vowels")
