"""Keras has one backend per process, named by KERAS_BACKEND: see `make test`, test-jax, test-tensorflow."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

BACKEND = os.environ.setdefault("KERAS_BACKEND", "torch")
INSTALLED = importlib.util.find_spec(BACKEND) is not None

if BACKEND == "jax":  # two devices, for the distribution API
    flags = "--xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
if BACKEND == "tensorflow" and INSTALLED:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # It imports Triton where that is installed, which ends the process if TensorFlow was imported before it:
    # "LLVM ERROR: inconsistency in registered CommandLine options" (triton 3.9, tensorflow 2.21).
    importlib.import_module("torch._dynamo")
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without the backend nothing here can be imported; test_backend.py stays, and says why."""
    missing = not INSTALLED and collection_path.suffix == ".py" and collection_path.name != "test_backend.py"
    return missing or None


@pytest.fixture(autouse=True)
def _seeded_keras() -> None:
    if INSTALLED:
        import keras

        keras.utils.set_random_seed(0)


@pytest.fixture
def backend() -> str:
    """Name of the Keras backend of this process."""
    return BACKEND


@pytest.fixture(scope="session")
def strategy() -> Any:
    """Two replicas on one CPU; a test that asks for it is one of the TensorFlow backend.

    One per process: a second strategy over the same devices numbers its collectives from the start again, and
    TensorFlow then pairs them with the first one's ("Shape mismatch in the collective instance").
    """
    if BACKEND != "tensorflow":
        pytest.skip("strategies are TensorFlow's")
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
