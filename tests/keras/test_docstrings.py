"""The examples in docstrings of the public face of Keras run, and show what they print."""

from __future__ import annotations

import doctest

import keras
import numpy
import pytest

import batchnorm
import batchnorm.keras

PUBLIC = {
    **{name: getattr(batchnorm.keras, name) for name in batchnorm.keras.__all__},
    "keras_to_torch": batchnorm.conventions.keras_to_torch,
    "torch_to_keras": batchnorm.conventions.torch_to_keras,
}
NAMES = {"batchnorm": batchnorm, "keras": keras, "numpy": numpy}


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {"FoldError", "fold", "fold_table"}))
def test_docstring_example(name: str) -> None:
    example = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__, dict(NAMES), name, None, 0)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
