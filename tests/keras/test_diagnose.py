"""`keras.diagnose`: planted faults are found by name, healthy models have none, nothing changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import batchnorm
from batchnorm.doctor import remedies
from batchnorm.doctor.findings import Diagnosis, Finding
from batchnorm.errors import DataError, OptionError


def _samples(count: int = 512) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    centres = 1.5 * np.random.default_rng(0).standard_normal((4, 8))
    y = random.integers(0, 4, count)
    return (centres[y] + random.standard_normal((count, 8))).astype("float32"), y


def _network(norm: Callable[..., Any] = keras.layers.BatchNormalization) -> keras.Model:
    return keras.Sequential([
        keras.Input((8,)), keras.layers.Dense(16, use_bias=False, name="first"), norm(name="one"),
        keras.layers.ReLU(), keras.layers.Dense(16, use_bias=False, name="second"), norm(name="two"),
        keras.layers.ReLU(), keras.layers.Dense(4, name="last"),
    ])  # fmt: skip


@functools.cache
def _weights() -> list[np.ndarray]:
    keras.utils.set_random_seed(0)
    model = _network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    model.fit(*_samples(), epochs=4, verbose=0)
    batchnorm.keras.calibrate(model, _samples(), verbose=0)
    return model.get_weights()


def _trained(norm: Callable[..., Any] = keras.layers.BatchNormalization) -> keras.Model:
    model = _network(norm)
    model.set_weights(_weights())
    return model


def _only(diagnosis: Diagnosis, check: str) -> Finding:
    found = [finding for finding in diagnosis.findings if finding.check == check]
    assert found, f"no {check}: {diagnosis}"
    return found[0]


def _applied(finding: Finding, **names: object) -> dict[str, object]:
    scope: dict[str, object] = {"batchnorm": batchnorm, "keras": keras, **names}
    exec(compile(finding.remedy, finding.check, "exec"), scope)
    return scope


def _accuracy(model: keras.Model) -> float:
    x, y = _samples()
    return float((ops.convert_to_numpy(model(x, training=False)).argmax(1) == y).mean())


def test_a_healthy_model_has_no_finding_and_nothing_changes() -> None:
    model = _trained()
    before = [values.copy() for values in model.get_weights()]
    found = batchnorm.keras.diagnose(model, _samples())
    assert found.findings == (), found
    assert found.measure == "accuracy"
    assert found.scores["running"] == pytest.approx(_accuracy(model), abs=0.003)
    assert [layer.layer for layer in found.layers] == ["one", "two"]
    assert found.layers[0].mean_off < 1e-3
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not any("call" in layer.__dict__ for layer in model._flatten_layers())


def _assign(name: str, value: float, count: int) -> Callable[[keras.Model], None]:
    def plant(model: keras.Model) -> None:
        variable = getattr(model.get_layer("two"), name)
        values = ops.convert_to_numpy(variable.value).copy()
        values[:count] = value
        variable.assign(values)

    return plant


def _initial(model: keras.Model) -> None:
    _assign("moving_mean", 0.0, 16)(model)
    _assign("moving_variance", 1.0, 16)(model)


@pytest.mark.parametrize(
    ("plant", "severity", "check"),
    [
        *[(_assign("moving_mean", np.nan, n), "serious", "nonfinite-statistics") for n in (1, 8, 16)],
        *[(_assign("moving_variance", v, 1), "serious", "negative-variance") for v in (-1e-9, -1.0, -1e6)],
        *[(_assign("moving_variance", v, 1), "likely", "huge-variance") for v in (1e13, 1e20, 1e30)],
        *[
            (_assign("gamma", 0.0, n), s, "dead-channels")
            for n, s in ((1, "note"), (8, "likely"), (16, "likely"))
        ],
        (_assign("gamma", np.nan, 1), "serious", "nonfinite-parameters"),
        (_initial, "serious", "never-updated"),
    ],
)
def test_faults_of_a_state_are_found(plant: Callable[[keras.Model], None], severity: str, check: str) -> None:
    """Row 36 and row 62, in Keras."""
    model = _trained()
    assert batchnorm.keras.diagnose(model).findings == ()
    plant(model)
    found = batchnorm.keras.diagnose(model)
    finding = _only(found, check)
    assert (finding.severity, finding.layer) == (severity, "two")
    if check != "dead-channels":
        _applied(finding, model=model, data=iter([_samples()[0]]))
        assert check not in {of.check for of in batchnorm.keras.diagnose(model).findings}


@pytest.mark.parametrize("momentum", [0.5, 0.1, 0.003])
def test_momentum_of_the_other_convention(momentum: float) -> None:
    model = _trained()
    model.get_layer("two").momentum = momentum
    finding = _only(batchnorm.keras.diagnose(model), "momentum")
    assert (finding.severity, finding.layer) == ("likely", "two")
    _applied(finding, model=model)
    assert batchnorm.keras.diagnose(model).findings == ()
    assert batchnorm.keras.diagnose(_network(batchnorm.keras.BatchNormalization)).norms == 2


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
def test_statistics_that_are_off_are_measured(strength: float) -> None:
    """Row 44, in Keras."""
    model = _trained()
    whole = _accuracy(model)
    norm = model.get_layer("two")
    shift = strength * np.sqrt(ops.convert_to_numpy(norm.moving_variance.value))
    norm.moving_mean.assign(norm.moving_mean + shift * np.random.default_rng(0).standard_normal(16))
    lost = whole - _accuracy(model)
    found = batchnorm.keras.diagnose(model, _samples())
    off = _only(found, "statistics-off")
    assert off.layer == "two"
    assert off.evidence["gain"] == pytest.approx(lost, abs=0.01)
    if lost >= 0.03:
        assert _only(found, "gap").evidence["gain"] == pytest.approx(lost, abs=0.01)
    assert strength < 3 or lost >= 0.03
    _applied(off, model=model, data=_samples())
    assert batchnorm.keras.diagnose(model, _samples()).findings == ()


@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_the_gain_of_adapting_is_that_of_an_adapted_model(strength: float) -> None:
    x, y = _samples()
    other = x * (1 + strength) + strength
    found = batchnorm.keras.diagnose(_trained(), (other, y), batch_size=64)
    adapting = functools.partial(batchnorm.keras.BatchNormalization, statistics=batchnorm.Adapted())
    model = _trained(adapting)
    right = [
        ops.convert_to_numpy(model(other[i : i + 64], training=False)).argmax(1) == y[i : i + 64]
        for i in range(0, 512, 64)
    ]
    assert found.scores["adapted"] == pytest.approx(float(np.mean(right)), abs=2e-3)
    gap = _only(found, "gap")
    assert gap.evidence["adapted"] > gap.evidence["running"]


class _InTraining(keras.layers.Layer):
    """Calls its norm in training, whatever it is called with itself."""

    def __init__(self, norm: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norms = [norm]

    def build(self, shape: Any) -> None:
        self.norms[0].build(shape)

    def call(self, x: Any) -> Any:
        return self.norms[0](x, training=True)


def _spread(model: keras.Model, **training: bool) -> float:
    """Return how much a prediction changes with its neighbours."""
    x = _samples()[0][:16]
    other = x.copy()
    other[8:] *= 2
    first, second = (ops.convert_to_numpy(model(batch, **training))[:8] for batch in (x, other))
    return float(np.abs(first - second).max())


def test_a_norm_that_a_layer_calls_in_training() -> None:
    """Row 33 and row 45, in Keras: whatever the model is told, and so in what is exported."""
    inputs = keras.Input((8,))
    own = _InTraining(keras.layers.BatchNormalization(name="inner"), name="own")
    model = keras.Model(inputs, keras.layers.Dense(2)(own(inputs)))
    batchnorm.keras.calibrate(model, _samples(), verbose=0)
    assert "training-graph" not in {of.check for of in batchnorm.keras.diagnose(model).findings}
    found = batchnorm.keras.diagnose(model, _samples())  # what a layer does in its call, samples show
    for finding in (_only(found, "training-graph"), _only(found, "batch-mates")):
        assert (finding.severity, finding.layer) == ("serious", "own/inner")
    assert _spread(model, training=False) > 0.01
    _applied(_only(found, "training-graph"), model=model)
    assert _spread(model, training=False) < 1e-5
    found = batchnorm.keras.diagnose(model, _samples())
    assert {of.check for of in found.findings} <= {"frozen-statistics"}


@pytest.mark.parametrize("kind", [keras.layers.BatchNormalization, batchnorm.keras.BatchNormalization])
def test_a_norm_that_the_graph_calls_in_training(kind: type[keras.layers.Layer]) -> None:
    """Row 53, in Keras: what the model is told comes first; told nothing, it mixes samples."""
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(2)(kind(name="norm")(inputs, training=True)))
    batchnorm.keras.calibrate(model, _samples(), verbose=0)
    found = batchnorm.keras.diagnose(model, _samples())
    finding = _only(found, "mixed-modes")
    assert (finding.severity, finding.layer) == ("likely", "norm")
    assert {of.check for of in found.findings} == {"mixed-modes"}
    assert _spread(model) > 0.01
    scope = _applied(finding, model=model, x=_samples()[0])
    assert _spread(model, training=False) < 1e-5
    predicted = model.predict(_samples()[0], verbose=0)
    np.testing.assert_allclose(ops.convert_to_numpy(scope["y"]), predicted, atol=1e-4)


def test_frozen_parameters_whose_statistics_move() -> None:
    """Row 37, in Keras: flags that freeze gamma and beta, and not the moving statistics."""
    model = _trained()
    norm = model.get_layer("one")
    norm.gamma.trainable = norm.beta.trainable = False
    before = [ops.convert_to_numpy(of.value).copy() for of in (norm.moving_mean, norm.gamma)]
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(*(part[:64] for part in _samples()))
    np.testing.assert_array_equal(ops.convert_to_numpy(norm.gamma.value), before[1])
    assert np.abs(ops.convert_to_numpy(norm.moving_mean.value) - before[0]).max() > 1e-4
    finding = _only(batchnorm.keras.diagnose(model), "frozen-parameters")
    assert (finding.severity, finding.layer) == ("likely", "one")
    _applied(finding, model=model)
    assert "frozen-parameters" not in {of.check for of in batchnorm.keras.diagnose(model).findings}


@pytest.mark.parametrize("where", ["wrapper", "model", "layer"])
def test_remedies_reach_a_norm_wherever_it_is(where: str) -> None:
    norm = keras.layers.BatchNormalization(name="norm")
    if where == "wrapper":
        model = keras.Sequential([keras.Input((3, 8)), keras.layers.TimeDistributed(norm, name="each")])
    elif where == "model":
        inner = keras.Sequential([keras.Input((8,)), norm], name="inner")
        model = keras.Sequential([keras.Input((8,)), inner])
    else:
        model = keras.Sequential([keras.Input((8,)), _InTraining(norm, name="own")])
    norm.momentum = 0.01
    finding = _only(batchnorm.keras.diagnose(model), "momentum")
    _applied(finding, model=model)
    assert norm.momentum == pytest.approx(0.99)


def _sequences(is_masked: bool, length: int | None = None) -> keras.Model:
    inputs = keras.Input((length, 3))
    x = keras.layers.Masking(name="masking")(inputs) if is_masked else inputs
    x = keras.layers.Dense(4, name="dense")(x)
    x = batchnorm.keras.BatchNormalization(name="norm")(x)
    x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="last")(x))
    model.get_layer("norm").beta.assign([0.5, 1.0, -1.0, 2.0])
    model.get_layer("norm").moving_mean.assign([0.1, 0.0, 0.2, 0.0])
    return model


def _padded(lengths: list[int], size: int) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((len(lengths), size, 3)).astype("float32")
    x[np.arange(size) >= np.array(lengths)[:, None]] = 0
    return x


@pytest.mark.parametrize("longest", [20, 14])
def test_padding_that_is_read(longest: int) -> None:
    """Row 54, in Keras: a pooling that no mask reaches counts the padding."""
    x = _padded([longest, 12, 7, 10], 20)
    finding = _only(batchnorm.keras.diagnose(_sequences(False), x), "padding")
    assert (finding.severity, finding.layer) == ("likely", "pool")
    found = batchnorm.keras.diagnose(_sequences(True), x)
    assert "padding" not in {of.check for of in found.findings}
    fixed = batchnorm.keras.diagnose(_sequences(False, 20), x)
    assert any(told.startswith("padding: the model raises ValueError") for told in fixed.unchecked)
    scope = _applied(finding)
    assert isinstance(scope["masking"], keras.layers.Masking)


def test_lengths_are_a_second_input() -> None:
    frames, lengths = keras.Input((None, 3)), keras.Input(())
    x = keras.layers.Dense(4)(frames)
    total = keras.layers.Lambda(lambda v: ops.sum(v[0], 1) / ops.expand_dims(v[1], 1), name="total")
    norm = batchnorm.keras.BatchNormalization()
    model = keras.Model([frames, lengths], total([norm(x), lengths]))
    norm.beta.assign([0.5, 1.0, -1.0, 2.0])
    sizes = [20, 12, 7, 10]
    found = batchnorm.keras.diagnose(model, iter([([_padded(sizes, 20), np.array(sizes)],)]))
    finding = _only(found, "padding")
    assert finding.layer == "total"
    assert "taken for padding" not in finding.message


def test_every_remedy_is_a_layer_that_can_be_built() -> None:
    """Where Keras cannot change a layer's class, the remedy is the layer to build."""
    code = remedies.remedies_of("keras")
    for remedy in (code.widen(), code.small_batch(), code.synchronize(), code.renorm(), code.adapt(),
                   code.first_not_finite()):  # fmt: skip
        scope: dict[str, object] = {"batchnorm": batchnorm, "keras": keras}
        exec(remedy, scope)
        norm = scope["norm"]
        assert isinstance(norm, batchnorm.keras.BatchNormalization)
        x = _samples()[0][:16]
        assert np.isfinite(ops.convert_to_numpy(norm(x, training=True))).all()
    scope = {"batchnorm": batchnorm}
    exec(code.domains(3), scope)
    assert len(scope["norms"]) == 3  # type: ignore[arg-type]
    x, y = _samples()
    model = _trained()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    exec(
        code.shuffle().replace("shuffle=True", "shuffle=True, verbose=0"),
        {"model": model, "x": x[:64], "y": y[:64]},
    )
    exec(code.fold(), scope := {"batchnorm": batchnorm, "model": _trained()})
    np.testing.assert_allclose(
        *(ops.convert_to_numpy(m(x[:8])) for m in (scope["folded"], _trained())), atol=1e-4
    )
    exec(code.evaluate(), {"model": model, "x": x[:8]})


class _Mixing(keras.layers.Layer):
    def call(self, x: Any) -> Any:
        return x - ops.mean(x, axis=0, keepdims=True)


def test_predictions_that_depend_on_neighbours() -> None:
    """Row 33 and row 60, in Keras: a norm that is called in training for good, and another layer."""
    inputs = keras.Input((8,))
    mixed = keras.Model(inputs, keras.layers.Dense(2)(_Mixing(name="mixing")(inputs)))
    finding = _only(batchnorm.keras.diagnose(mixed, _samples()), "batch-mates")
    assert (finding.severity, finding.layer) == ("serious", "mixing")
    norm = batchnorm.keras.BatchNormalization(name="norm", statistics=batchnorm.Adapted())
    adapting = keras.Sequential([keras.Input((8,)), norm])
    finding = _only(batchnorm.keras.diagnose(adapting, _samples()), "batch-mates")
    assert (finding.severity, finding.layer) == ("note", "norm")


@pytest.mark.parametrize("size", [2, 4, 8])
def test_small_and_ordered_batches(size: int) -> None:
    finding = _only(batchnorm.keras.diagnose(_trained(), _samples(), batch_size=size), "small-batches")
    assert finding.evidence["noise"] == pytest.approx(size**-0.5, rel=0.25)
    x, y = _samples()
    order = np.argsort(y)
    found = batchnorm.keras.diagnose(_trained(), (x[order], y[order]))
    assert _only(found, "ordered-batches").severity == "likely"


def test_neighbours_of_a_norm_in_the_graph() -> None:
    """Row 60, in Keras: a bias that a norm removes, dropout before it."""
    inputs = keras.Input((8,))
    x = keras.layers.Dense(4, name="dense")(inputs)
    x = keras.layers.BatchNormalization(name="one")(x)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="two")(x))
    model.get_layer("dense").bias.assign(np.arange(4.0))
    batchnorm.keras.calibrate(model, _samples(), verbose=0)
    found = batchnorm.keras.diagnose(model)
    bias, dropout = _only(found, "bias-before"), _only(found, "dropout-before")
    assert (bias.layer, bias.evidence["before"]) == ("one", "dense")
    assert (dropout.layer, dropout.evidence["rate"]) == ("two", 0.5)
    before = ops.convert_to_numpy(model(_samples()[0]))
    _applied(bias, model=model)
    np.testing.assert_allclose(ops.convert_to_numpy(model(_samples()[0])), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("decay", "severity"), [(1e-5, "note"), (5e-4, "note"), (1e-2, "likely")])
def test_weight_decay_is_taken_off(decay: float, severity: str) -> None:
    """Row 57, in Keras."""
    model = _trained()
    optimizer = keras.optimizers.AdamW(weight_decay=decay)
    finding = _only(batchnorm.keras.diagnose(model, optimizer=optimizer), "weight-decay")
    assert finding.severity == severity
    _applied(finding, optimizer=optimizer)
    assert batchnorm.keras.diagnose(model, optimizer=optimizer).findings == ()


def test_the_first_layer_that_is_not_finite() -> None:
    inputs = keras.Input((8,))
    log = keras.layers.Lambda(lambda x: ops.log(x * 0), name="log")
    model = keras.Model(inputs, keras.layers.BatchNormalization()(log(inputs)))
    assert _only(batchnorm.keras.diagnose(model, _samples()), "nonfinite-output").layer == "log"


def test_what_is_no_model_or_data_is_refused() -> None:
    with pytest.raises(OptionError, match="diagnose takes a Keras model"):
        batchnorm.keras.diagnose({})
    with pytest.raises(OptionError, match="samples is a number of 2"):
        batchnorm.keras.diagnose(_network(), samples=1)
    with pytest.raises(OptionError, match="there is no check 'bias'"):
        batchnorm.keras.diagnose(_network(), ignore=["bias"])
    with pytest.raises(DataError, match="received no batch"):
        batchnorm.keras.diagnose(_network(), iter([]))
