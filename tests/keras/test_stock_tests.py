"""Keras's own tests of its layer, as they ship in its wheel, run against ours."""

from __future__ import annotations

from types import SimpleNamespace

import keras
import pytest
from keras.src.layers.normalization import batch_normalization_test as stock

from batchnorm.keras import BatchNormalization

# Keras's own test helper passes a generator to fit, and models with nothing to learn.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:The model does not have any trainable weights:UserWarning"),
]


class TestBatchNormalization(stock.BatchNormalizationTest):
    """Every test of the file; `layers.BatchNormalization` in it is our class."""

    def setUp(self) -> None:
        super().setUp()
        self._stock_layers = stock.layers
        stock.layers = SimpleNamespace(**{**vars(stock.layers), "BatchNormalization": BatchNormalization})

    def tearDown(self) -> None:
        stock.layers = self._stock_layers
        super().tearDown()

    def test_it_is_our_class_that_is_tested(self) -> None:
        assert stock.layers.BatchNormalization is BatchNormalization
        assert BatchNormalization is not keras.layers.BatchNormalization
        assert stock.layers.Masking is keras.layers.Masking


def test_all_of_the_file_is_there() -> None:
    names = [name for name in dir(stock.BatchNormalizationTest) if name.startswith("test_")]
    assert len(names) >= 20, names
