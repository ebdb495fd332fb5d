"""Converts the settings and state of a layer between torch and Keras, which disagree about them.

    torch   running = (1 - momentum) * running + momentum * batch    var unbiased, ÷ (n - 1)
    Keras   moving  = momentum * moving + (1 - momentum) * batch     var biased, ÷ n

n is the number of values per channel in a batch. The defaults differ too: momentum 0.1 and eps 1e-5 in torch,
momentum 0.99 (0.01 to torch) and epsilon 1e-3 in Keras.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from decimal import Decimal
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    import keras
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.nn.modules.batchnorm import _BatchNorm

# torch's name -> Keras's, where both compute the same. leaky_relu is not here: its slope is 0.01 in torch,
# 0.2 in Keras.
ACTIVATIONS = {
    "relu": "relu",
    "relu6": "relu6",
    "silu": "silu",
    "gelu": "gelu",
    "hardswish": "hard_silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "elu": "elu",
}
# Option of our layers -> the value that both frameworks have; each has a default of its own besides.
_SHARED = {"nonfinite": "skip", "small_batch": "running", "warm_start": True}


def opposite_momentum(momentum: float) -> float:
    """Return torch's momentum for Keras's, and Keras's for torch's: 1 - momentum.

    Computed in decimal, so that 0.99 gives 0.01 and not 0.010000000000000009; twice is the same number again
    for any of up to 15 decimals.
    """
    return float(1 - Decimal(repr(float(momentum))))


def keras_to_torch(
    layer: keras.layers.BatchNormalization, *, samples: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and state of the torch layer that computes what a Keras layer computes.

        momentum_torch = 1 - momentum_keras,    eps = epsilon,    running_var = moving_variance * s
        s = n / (n - 1) with samples=n, otherwise 1

    Args:
        layer: a built `keras.layers.BatchNormalization`, stock or ours, on any backend; channels on any axis.
        samples: n, the values per channel of a training batch (examples × spatial positions), 2 or more:
            rescales the variance from the biased to the unbiased one, for a layer that goes on training.
            None copies it unchanged: both layers give equal outputs in evaluation.

    Returns:
        settings: arguments of `batchnorm.BatchNorm1d/2d/3d`, and of the stock layers where the layer has no
            activation and statistics is `Batch()`. `dtype` is that of the layer's variables.
        state: for a strict `load_state_dict`: tensors `[C]` on the CPU that share no memory with the layer,
            and num_batches_tracked: 0, but for `Renorm(...)`, with which a Keras layer counts batches.

    Raises:
        OptionError: (a ValueError) no such layer, or not built; renorm, synchronized, a regularizer, a
            constraint, or an activation that torch's layer lacks; samples below 2.
        MissingExtraError: (an ImportError) torch is not installed.

    Example:
        >>> keras_layer = keras.layers.BatchNormalization()
        >>> keras_layer.build((None, 28, 28, 3))
        >>> settings, state = batchnorm.conventions.keras_to_torch(keras_layer)
        >>> batchnorm.BatchNorm2d(**settings).load_state_dict(state)
        <All keys matched successfully>

    Differs from Keras: channels are on axis 1. torch has no bias without a weight, so center=True with
    scale=False becomes a weight of ones, which torch would train. Not carried over: initializers, and
    `trainable`, for which torch has `.eval()` and `.requires_grad_(False)`.

    Source: PyTorch issues 4253, 19902, 19916 (biased or unbiased variance).
    """
    _check_samples(samples)
    _check_keras_layer(layer)
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtraError("batchnorm.conventions.keras_to_torch", "torch", "torch") from missing
    return _torch_settings(layer), _torch_state(layer, samples)


def torch_to_keras(
    layer: _BatchNorm, *, axis: int = -1, samples: int | None = None
) -> tuple[dict[str, Any], list[NDArray[np.floating]]]:
    """Return the settings and weights of the Keras layer that computes what a torch layer computes.

        momentum_keras = 1 - momentum_torch,    epsilon = eps,    moving_variance = running_var * s
        s = (n - 1) / n with samples=n, otherwise 1

    Args:
        layer: a `torch.nn.BatchNorm1d/2d/3d` or `SyncBatchNorm`, stock or ours, on any device.
        axis: where the Keras layer finds the channels: -1, or 1 for channels-first data.
        samples: n, the values per channel of a training batch (examples × spatial positions), 2 or more:
            rescales the variance from the unbiased to the biased one, for a layer that goes on training.
            None copies it unchanged: both layers give equal outputs in evaluation.

    Returns:
        settings: arguments of `batchnorm.keras.BatchNormalization`, and of the stock layer where the layer
            has no activation and statistics is `Batch()`. `dtype` is that of weight and bias; where those are
            16-bit and the running statistics wider, Keras's mixed policy, which keeps all variables float32.
        weights: for `set_weights`, in Keras's order gamma, beta, moving_mean, moving_variance, those that
            the layer has: NumPy arrays `[C]`, float32 or float64, that share no memory with the layer; and
            the number of batches for `Renorm(...)` with bounds that open by it.

    Raises:
        OptionError: (a ValueError) no such layer, or one without values (lazy, or on the meta device);
            momentum=None, track_running_stats=False, a process group, or an activation that Keras lacks;
            nonfinite="raise"; several domains outside of `batchnorm.domain`; samples below 2.

    Example:
        >>> settings, weights = batchnorm.conventions.torch_to_keras(batchnorm.BatchNorm2d(3))
        >>> keras_layer = keras.layers.BatchNormalization(**settings)
        >>> keras_layer.build((None, 28, 28, 3))
        >>> keras_layer.set_weights(weights)

    Differs from torch: num_batches_tracked has no place in Keras but for `Renorm(...)`. Whether the layer
    trains (`.train()`, `requires_grad`) is not carried over: Keras has `trainable`.

    Source: PyTorch issues 4253, 19902, 19916 (biased or unbiased variance).
    """
    _check_samples(samples)
    _check_torch_layer(layer)
    settings = {"axis": axis} | _keras_settings(layer)
    return settings, _keras_weights(layer, samples, settings["dtype"])


def _torch_settings(layer: keras.layers.BatchNormalization) -> dict[str, Any]:
    import torch

    settings: dict[str, Any] = {
        "num_features": layer.moving_mean.shape[0],
        "eps": layer.epsilon,
        "momentum": opposite_momentum(layer.momentum),
        "affine": bool(layer.scale or layer.center),
        "dtype": getattr(torch, layer.variable_dtype),
    }
    # Only where they are not the default: `activation` is an argument of our layers alone.
    if layer.scale and not layer.center:
        settings["bias"] = False
    if (activation := _torch_activations()[getattr(layer, "activation", None)]) is not None:
        settings["activation"] = activation
    return settings | _shared_options(layer)


def _torch_state(layer: keras.layers.BatchNormalization, samples: int | None) -> dict[str, Tensor]:
    import torch

    variables = {"running_mean": layer.moving_mean, "running_var": layer.moving_variance}
    variables |= {"weight": layer.gamma} if layer.scale else {}
    variables |= {"bias": layer.beta} if layer.center else {}
    values = {name: _float64(variable) for name, variable in variables.items()}
    if samples is not None:
        values["running_var"] = values["running_var"] * samples / (samples - 1)
    # Each in its own dtype: statistics of our 16-bit layers are float32.
    state = {
        name: torch.tensor(value, dtype=getattr(torch, str(variables[name].dtype)))
        for name, value in values.items()
    }
    if layer.center and not layer.scale:
        state["weight"] = torch.ones_like(state["bias"])
    batches = getattr(layer, "batches", None)  # ours alone has it, if its policy depends on it
    counted = 0 if batches is None else int(_float64(batches))
    return state | {"num_batches_tracked": torch.tensor(counted)}


def _keras_settings(layer: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "momentum": opposite_momentum(layer.momentum),
        "epsilon": layer.eps,
        "center": layer.bias is not None,
        "scale": layer.weight is not None,
        "dtype": _keras_dtype(layer),
    }
    # Only where they are not the default: these are arguments of our layer, or of some backends, alone.
    if (activation := getattr(layer, "activation", None)) is not None:
        settings["activation"] = ACTIVATIONS[activation]
    settings |= _shared_options(layer)
    if "statistics" not in settings and isinstance(layer, sys.modules["torch"].nn.SyncBatchNorm):
        settings["synchronized"] = True
    return settings


def _keras_weights(layer: Any, samples: int | None, dtype: str) -> list[NDArray[np.floating]]:
    k = getattr(layer, "_domain", None) if getattr(layer, "domain_affine", False) else None
    affine = ("weight", "bias") if not k else (f"weight_{k}", f"bias_{k}")  # of the domain in use
    values = {
        name.removesuffix(f"_{k}"): tensor.detach().cpu().double().numpy()
        for name in (*affine, "running_mean", "running_var")
        if (tensor := getattr(layer, name)) is not None
    }
    if samples is not None:
        values["running_var"] = values["running_var"] * (samples - 1) / samples
    wide = "float64" if dtype == "float64" else "float32"  # NumPy has no bfloat16
    weights = [value.astype(wide) for value in values.values()]
    policy = _policy(layer)
    if policy is not None and policy.counts_batches:
        weights.append(layer.num_batches_tracked.cpu().numpy().astype("int32"))
    return weights


def _check_samples(samples: object) -> None:
    if samples is not None and (not isinstance(samples, Integral) or samples < 2):
        raise OptionError(
            f"samples is the values per channel of a batch, a whole number of 2 or more; got {samples!r}"
        )


def _check_keras_layer(layer: object) -> None:
    keras = sys.modules.get("keras")  # a layer of Keras exists only after keras was imported
    if keras is None or not isinstance(layer, keras.layers.BatchNormalization):
        raise OptionError(
            f"keras_to_torch takes a keras.layers.BatchNormalization of Keras 3; got {_type_name(layer)}"
        )
    for refusal in _refusals_by_torch(layer):
        raise OptionError(refusal, f"{layer.name} ({type(layer).__name__})")


def _refusals_by_torch(layer: keras.layers.BatchNormalization) -> Iterator[str]:
    """Yield what keeps a Keras layer from being one of torch's, and the remedy."""
    if not layer.built:
        yield "the layer is not built and has no state yet: call .build(input_shape) first"
    if layer.renorm:
        yield (
            "renorm=True is a way of training that torch's layer lacks: set layer.renorm = False and convert "
            "again; evaluation is the same"
        )
    if layer.synchronized:
        yield (
            "synchronized=True is no setting of torch's BatchNorm layers: set layer.synchronized = False, "
            "convert again, and pass the torch model to torch.nn.SyncBatchNorm.convert_sync_batchnorm"
        )
    for name in ("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint"):
        if getattr(layer, name) is not None:
            yield (
                f"{name} is no setting of torch's layer: set layer.{name} = None and convert again, and give "
                "the torch training loop its own (evaluation needs none)"
            )
    activation = getattr(layer, "activation", None)  # the stock layer has none
    if activation not in _torch_activations():
        shown = getattr(activation, "__name__", repr(activation))
        yield (
            f"activation={shown} has no equal in torch's layer, which takes {', '.join(ACTIVATIONS)}: set "
            "layer.activation = keras.activations.linear, convert again, and put the activation behind the "
            "layer"
        )


def _check_torch_layer(layer: object) -> None:
    torch = sys.modules.get("torch")  # a layer of torch exists only after torch was imported
    if torch is None or not isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
        raise OptionError(
            "torch_to_keras takes a BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm of torch; "
            f"got {_type_name(layer)}"
        )
    for refusal in _refusals_by_keras(layer):
        raise OptionError(refusal, type(layer).__name__)


def _refusals_by_keras(layer: _BatchNorm) -> Iterator[str]:
    """Yield what keeps a torch layer from being Keras's, and the remedy."""
    if layer.running_mean is None or layer.running_var is None:
        yield (
            "track_running_stats=False leaves no statistics, and Keras's layer always has some: build the "
            "layer with track_running_stats=True and run batchnorm.calibrate(model, data)"
        )
    elif sys.modules["torch"].nn.parameter.is_lazy(layer.running_mean) or layer.running_mean.is_meta:
        yield "the layer has no values yet: load its state or call it on a batch first"
    if layer.momentum is None:
        yield (
            "momentum=None averages all batches alike, which Keras cannot: set layer.momentum to a fraction, "
            "such as 0.1, and convert again; evaluation is the same"
        )
    if getattr(layer, "process_group", None) is not None:
        yield (
            "Keras synchronizes over all replicas, not over a process group: set layer.process_group = None "
            "and convert again"
        )
    if getattr(layer, "nonfinite", None) == "raise":
        yield (
            'nonfinite="raise" is not for compiled steps, as Keras has: set layer.nonfinite = "skip" and '
            "convert again"
        )
    if getattr(layer, "domains", 1) > 1 and getattr(layer, "_domain", None) is None:
        yield (
            f"domains={layer.domains}, and Keras's layer has one: convert within batchnorm.domain(layer, k), "
            "which converts the statistics of domain k"
        )
    policy = _policy(layer)
    if policy is not None and policy.name == "synced":
        plain = dataclasses.replace(policy, group=None, timeout=type(policy).timeout)
        if policy != plain:
            yield (
                "Keras synchronizes over all replicas, with a timeout of the backend's: set layer.statistics "
                f"= {plain} in place of {policy} and convert again"
            )
    activation = getattr(layer, "activation", None)  # the stock layer has none
    if activation is not None and activation not in ACTIVATIONS:
        slope = " (keras.layers.LeakyReLU(0.01))" if activation == "leaky_relu" else ""
        yield (
            f"activation={activation!r} has no equal among Keras's: set layer.activation = None, convert "
            f"again, and put the activation behind the layer{slope}"
        )


def _torch_activations() -> dict[Any, str | None]:
    """Return Keras's activation -> torch's name; None for none."""
    functions = sys.modules["keras"].activations
    known = {getattr(functions, theirs): ours for ours, theirs in ACTIVATIONS.items()}
    return known | {functions.linear: None, None: None}


def _shared_options(layer: object) -> dict[str, Any]:
    """Return the options of a layer of either framework that the other has too, where they are set."""
    options = {name: value for name, value in _SHARED.items() if getattr(layer, name, None) == value}
    policy = _policy(layer)
    return options if policy is None else options | {"statistics": policy}


def _policy(layer: object) -> Any:
    """Return the statistics policy of a layer of either framework; None for `Batch()`."""
    policy = getattr(layer, "statistics", None)
    return None if policy is None or policy.name == "batch" else policy


def _keras_dtype(layer: Any) -> str:
    """Return the name of the Keras dtype policy whose variables hold all of a torch layer's values."""
    statistics = layer.running_mean.dtype
    parameter = next((p.dtype for p in (layer.weight, layer.bias) if p is not None), statistics)
    name = str(parameter).removeprefix("torch.")
    return f"mixed_{name}" if parameter.itemsize == 2 < statistics.itemsize else name


def _float64(variable: keras.Variable) -> NDArray[np.float64]:
    """Return a Keras variable's values; exact, and torch cannot read NumPy's bfloat16."""
    values: NDArray[np.float64] = sys.modules["keras"].ops.convert_to_numpy(variable).astype("float64")
    return values


def _type_name(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
