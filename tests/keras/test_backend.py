"""The backend that KERAS_BACKEND names is there: a missing one is an error in CI, a skip elsewhere."""

from __future__ import annotations

import importlib.util
import os

import pytest


def test_the_backend_is_the_one_asked_for(backend: str) -> None:
    if importlib.util.find_spec(backend) is None:
        reason = f"backend {backend} is not installed, so nothing of tests/keras ran: pip install {backend}"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    import keras

    assert keras.backend.backend() == backend
