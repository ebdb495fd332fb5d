"""Finds what is wrong with the batch normalizations of a Keras model, where, by how much, and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterable

import keras

from batchnorm.doctor.data_checks import check_data
from batchnorm.doctor.findings import Diagnosis, LayerGap
from batchnorm.doctor.measurements import Measured
from batchnorm.doctor.model_checks import check_model
from batchnorm.doctor.selection import check_ignored, concluded
from batchnorm.errors import DataError, OptionError

from .calibration.batches import Data, labelled
from .diagnosis.passes import measure
from .diagnosis.state import model_state


def diagnose(
    model: keras.Model,
    data: Data | None = None,
    *,
    optimizer: keras.optimizers.Optimizer | None = None,
    samples: int = 512,
    batch_size: int = 32,
    ignore: Iterable[str] = (),
) -> Diagnosis:
    """Find what is wrong with the batch normalizations of `model`, which stays as it is.

    Without data it looks at the norms and what surrounds them. With data it also measures, as at inference:
    what the moving statistics cost against those of the samples, layer by layer; whether a prediction depends
    on its neighbours; how noisy and how different the batches are; magnitudes. It takes three forwards of the
    samples, one for each layer that is off (16 at most), and parts of one, all run eagerly.

    Args:
        model: with layers of Keras's or ours at any nesting; the first batch builds one that is not.
        data: as `calibrate` takes it; y is classes, one-hot classes or targets.
        optimizer: of the model, for its weight decay; None = the one that it is compiled with.
        samples: number of samples that are taken of the data.
        batch_size: samples per batch, for arrays.
        ignore: checks to leave out, "bias-before", or "bias-before:conv_1" for one layer.

    Returns:
        A report: `findings`, each with severity, layer, numbers, reason and remedy; `layers`, `scores` and
        `cost`.

    Raises:
        OptionError: (a ValueError) no Keras model, an option's value, or an unknown check in `ignore`.
        DataError: (a ValueError) no batch, or data of unknown form.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
        >>> [(found.check, found.layer) for found in batchnorm.keras.diagnose(model).findings]
        [('never-updated', 'norm')]
    """
    started = time.perf_counter()
    ignored = check_ignored(ignore)
    if not isinstance(model, keras.layers.Layer):
        kind = type(model)
        raise OptionError(f"diagnose takes a Keras model or layer; got a {kind.__module__}.{kind.__name__}")
    for name, value, least in (("samples", samples, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} is a number of {least} or more; got {value!r}")
    measured = Measured()
    layers: tuple[LayerGap, ...] = ()
    taken = None if data is None else list(labelled(model, data, batch_size, samples))
    if taken is not None:
        if not taken:
            raise DataError(
                "diagnose received no batch: data is empty, used up, or of batches above samples="
            )
        if not all(layer.built for layer in model._flatten_layers()):
            model(taken[0][0], training=False)
        measured = measure(model, taken)
    given = getattr(model, "optimizer", None) if optimizer is None else optimizer
    state, unchecked = model_state(model, given)
    found = check_model(state)
    if taken is not None:
        more, layers = check_data(state, measured)
        found += more
    seconds = time.perf_counter() - started
    return concluded(state, measured, found, layers, ignored, seconds, unchecked)


class Doctor(keras.callbacks.Callback):
    """Diagnoses the model when `fit` starts, and prints what it finds: see `batchnorm.keras.diagnose`.

    Args:
        data: training samples, as `diagnose` takes them; None = the state of the model only, which is built.
        samples: number of samples that are taken of the data.
        batch_size: samples per batch, for arrays.
        ignore: checks to leave out.

    Attributes:
        diagnosis: what was found; None before `fit`.

    Raises:
        OptionError, DataError: (a ValueError) as `diagnose`, at the start of training.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
        >>> model.compile("sgd", "mse")
        >>> x, doctor = numpy.random.rand(64, 3), batchnorm.keras.Doctor()
        >>> history = model.fit(x, x, verbose=0, callbacks=[doctor])  # doctest: +ELLIPSIS
        Sequential: 1 batch normalization, 0 serious, ...
        >>> doctor.diagnosis.findings[0].check
        'never-updated'
    """

    def __init__(
        self,
        data: Data | None = None,
        *,
        samples: int = 512,
        batch_size: int = 32,
        ignore: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.data = data
        self.samples, self.batch_size = samples, batch_size
        self.ignore = tuple(ignore)
        self.diagnosis: Diagnosis | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:  # noqa: ARG002
        """Diagnose the model, by the optimizer that it is compiled with."""
        self.diagnosis = diagnose(
            self.model, self.data, samples=self.samples, batch_size=self.batch_size, ignore=self.ignore
        )
        print(self.diagnosis)
