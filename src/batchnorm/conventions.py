"""Where torch and Keras disagree about batch normalization, once: one layer's settings and state, converted.

    torch   running = (1 - momentum) * running + momentum * batch    var unbiased, ÷ (n - 1)
    Keras   moving  = momentum * moving + (1 - momentum) * batch     var biased, ÷ n

n is the number of values per channel in a batch. The defaults differ too: momentum 0.1 and eps 1e-5 in torch,
momentum 0.99 (0.01 to torch) and epsilon 1e-3 in Keras.
"""

from __future__ import annotations

import dataclasses
import sys
from decimal import Decimal
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

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
# Options of our layers, with the values that both frameworks have; others are each framework's usual way.
_SHARED = {"nonfinite": "skip", "small_batch": "running"}
_PENALTIES = ("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint")


def opposite_momentum(momentum: float) -> float:
    """Return torch's momentum for Keras's, and Keras's for torch's: 1 - momentum.

    Computed in decimal, so that 0.99 gives 0.01 and not 0.010000000000000009; twice is the same number again
    for any of up to 15 decimals.
    """
    return float(1 - Decimal(repr(float(momentum))))


def keras_to_torch(layer: Any, *, samples: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and state of the torch layer that computes what a Keras layer computes.

        momentum_torch = 1 - momentum_keras,    eps = epsilon,    running_var = moving_variance * s
        s = n / (n - 1) with samples=n, otherwise 1

        settings, state = conventions.keras_to_torch(keras_layer)
        torch_layer = batchnorm.BatchNorm2d(**settings)
        torch_layer.load_state_dict(state)

    Args:
        layer: a built `keras.layers.BatchNormalization`, stock or ours, on any backend; channels on any axis.
        samples: n, the values per channel of a training batch (examples × spatial positions), 2 or more:
            rescales the variance from the biased to the unbiased one, for a layer that goes on training.
            None copies it unchanged: both layers give equal outputs in evaluation.

    Returns:
        settings: arguments of `batchnorm.BatchNorm1d/2d/3d`, and of the stock layers where the layer has no
            activation and statistics is `Batch()`. `dtype` is that of the layer's variables.
        state: for a strict `load_state_dict`: tensors `[C]` on the CPU that share no memory with the layer,
            and num_batches_tracked, which is 0 where the layer does not count: it does for `Renorm(...)`.

    Raises:
        OptionError: (a ValueError) no such layer, or not built; renorm, synchronized, a regularizer, a
            constraint, or an activation that torch's layer lacks; samples below 2.
        MissingExtraError: (an ImportError) torch is not installed.

    Differs from Keras: channels are on axis 1. torch has no bias without a weight, so center=True with
    scale=False becomes a weight of ones, which torch would train. Not carried over: initializers, and
    `trainable`, for which torch has `.eval()` and `.requires_grad_(False)`.

    Source: PyTorch issues 4253, 19902, 19916 (biased or unbiased variance).
    """
    _check_samples(samples)
    _check_keras_layer(layer)
    activation = _torch_name(layer)
    try:
        import torch
    except ModuleNotFoundError as missing:
        raise MissingExtraError("batchnorm.conventions.keras_to_torch", "torch", "torch") from missing

    mean = _float64(layer.moving_mean)
    dtype: torch.dtype = getattr(torch, layer.variable_dtype)
    affine = bool(layer.scale or layer.center)
    settings: dict[str, Any] = {
        "num_features": len(mean),
        "eps": layer.epsilon,
        "momentum": opposite_momentum(layer.momentum),
        "affine": affine,
        "dtype": dtype,
    }
    # Only where they are not the default: `activation` is an argument of our layers alone.
    if layer.scale and not layer.center:
        settings["bias"] = False
    if activation is not None:
        settings["activation"] = activation
    if (policy := _policy(layer)) is not None:
        settings["statistics"] = policy
    settings |= _shared_options(layer)

    var = _float64(layer.moving_variance)
    var = var if samples is None else var * samples / (samples - 1)
    of_statistics: torch.dtype = getattr(
        torch, str(layer.moving_mean.dtype)
    )  # 16-bit layers of ours: float32
    running = {"running_mean": mean, "running_var": var}
    values = {}
    if layer.scale:
        values["weight"] = _float64(layer.gamma)
    if layer.center:
        values["bias"] = _float64(layer.beta)
    state = {name: torch.tensor(value, dtype=of_statistics) for name, value in running.items()}
    state |= {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}
    if layer.center and not layer.scale:
        state["weight"] = torch.ones_like(state["bias"])
    batches = getattr(layer, "batches", None)  # ours alone has it, if its policy goes by it
    counted = 0 if batches is None else int(_float64(batches))
    return settings, state | {"num_batches_tracked": torch.tensor(counted)}


def torch_to_keras(
    layer: Any, *, axis: int = -1, samples: int | None = None
) -> tuple[dict[str, Any], list[NDArray[np.floating]]]:
    """Return the settings and weights of the Keras layer that computes what a torch layer computes.

        momentum_keras = 1 - momentum_torch,    epsilon = eps,    moving_variance = running_var * s
        s = (n - 1) / n with samples=n, otherwise 1

        settings, weights = conventions.torch_to_keras(torch_layer)
        keras_layer = BatchNormalization(**settings)
        keras_layer.build((None, 28, 28, torch_layer.num_features))
        keras_layer.set_weights(weights)

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

    Differs from torch: num_batches_tracked has no place in Keras but for `Renorm(...)`. Whether the layer
    trains (`.train()`, `requires_grad`) is not carried over: Keras has `trainable`.

    Source: PyTorch issues 4253, 19902, 19916 (biased or unbiased variance).
    """
    _check_samples(samples)
    _check_torch_layer(layer)
    settings: dict[str, Any] = {
        "axis": axis,
        "momentum": opposite_momentum(layer.momentum),
        "epsilon": layer.eps,
        "center": layer.bias is not None,
        "scale": layer.weight is not None,
        "dtype": _keras_dtype(layer),
    }
    # Only where they are not the default: these are arguments of our layer, or of some backends, alone.
    if getattr(layer, "activation", None) is not None:
        settings["activation"] = ACTIVATIONS[layer.activation]
    policy = _policy(layer)
    if policy is not None:
        settings["statistics"] = policy
    elif _is_synchronized(layer):
        settings["synchronized"] = True
    settings |= _shared_options(layer)

    values = {
        name: tensor.detach().cpu().double().numpy()
        for name in ("weight", "bias", "running_mean", "running_var")
        if (tensor := getattr(layer, name)) is not None
    }
    if samples is not None:
        values["running_var"] = values["running_var"] * (samples - 1) / samples
    wide = "float64" if settings["dtype"] == "float64" else "float32"  # NumPy has no bfloat16
    weights = [value.astype(wide) for value in values.values()]
    if policy is not None and policy.counts_batches:
        weights.append(layer.num_batches_tracked.cpu().numpy().astype("int32"))
    return settings, weights


def _check_samples(samples: object) -> None:
    if samples is not None and (not isinstance(samples, Integral) or samples < 2):
        raise OptionError(
            f"samples is the values per channel of a batch, a whole number of 2 or more; got {samples!r}"
        )


def _check_keras_layer(layer: Any) -> None:
    keras = sys.modules.get("keras")  # a layer of Keras exists only after keras was imported
    if keras is None or not isinstance(layer, keras.layers.BatchNormalization):
        raise OptionError(
            f"keras_to_torch takes a keras.layers.BatchNormalization of Keras 3; got {_type_name(layer)}"
        )
    where = _keras_name(layer)
    if not layer.built:
        raise OptionError(
            "the layer is not built and has no state yet: call .build(input_shape) first", where
        )
    if layer.renorm:
        raise OptionError(
            "renorm=True is a way of training that torch's layer lacks: set layer.renorm = False and convert "
            "again; evaluation is the same",
            where,
        )
    if layer.synchronized:
        raise OptionError(
            "synchronized=True is no setting of torch's BatchNorm layers: set layer.synchronized = False, "
            "convert again, and pass the torch model to torch.nn.SyncBatchNorm.convert_sync_batchnorm",
            where,
        )
    for name in _PENALTIES:
        if getattr(layer, name) is not None:
            raise OptionError(
                f"{name} is no setting of torch's layer: set layer.{name} = None and convert again, and give "
                "the torch training loop its own (evaluation needs none)",
                where,
            )


def _check_torch_layer(layer: Any) -> None:
    torch = sys.modules.get("torch")  # a layer of torch exists only after torch was imported
    if torch is None or not isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
        raise OptionError(
            "torch_to_keras takes a BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm of torch; "
            f"got {_type_name(layer)}"
        )
    where = type(layer).__name__
    if layer.running_mean is None or layer.running_var is None:
        raise OptionError(
            "track_running_stats=False leaves no statistics, and Keras's layer always has some: build the "
            "layer with track_running_stats=True and run batchnorm.calibrate(model, data)",
            where,
        )
    if torch.nn.parameter.is_lazy(layer.running_mean) or layer.running_mean.is_meta:
        raise OptionError("the layer has no values yet: load its state or call it on a batch first", where)
    if layer.momentum is None:
        raise OptionError(
            "momentum=None averages all batches alike, which Keras cannot: set layer.momentum to a fraction, "
            "such as 0.1, and convert again; evaluation is the same",
            where,
        )
    if getattr(layer, "process_group", None) is not None:
        raise OptionError(
            "Keras synchronizes over all replicas, not over a process group: set layer.process_group = None "
            "and convert again",
            where,
        )
    if getattr(layer, "nonfinite", None) == "raise":
        raise OptionError(
            'nonfinite="raise" is not for compiled steps, as Keras has: set layer.nonfinite = "skip" and '
            "convert again",
            where,
        )
    if getattr(layer, "domains", 1) > 1 and getattr(layer, "_domain", None) is None:
        raise OptionError(
            f"domains={layer.domains}, and Keras's layer has one: convert within batchnorm.domain(layer, k), "
            "which converts the statistics of domain k",
            where,
        )
    policy = _policy(layer)
    if policy is not None and policy.name == "synced":
        plain = dataclasses.replace(policy, group=None, timeout=type(policy).timeout)
        if policy != plain:
            raise OptionError(
                "Keras synchronizes over all replicas, with a timeout of the backend's: set layer.statistics "
                f"= {plain} in place of {policy} and convert again",
                where,
            )
    activation = getattr(layer, "activation", None)  # the stock layer has none
    if activation is not None and activation not in ACTIVATIONS:
        slope = " (keras.layers.LeakyReLU(0.01))" if activation == "leaky_relu" else ""
        raise OptionError(
            f"activation={activation!r} has no equal among Keras's: set layer.activation = None, convert "
            f"again, and put the activation behind the layer{slope}",
            where,
        )


def _torch_name(layer: Any) -> str | None:
    """torch's name of a Keras layer's activation; None for none."""
    activation = getattr(layer, "activation", None)  # the stock layer has none
    activations = sys.modules["keras"].activations
    if activation is None or activation is activations.linear:
        return None
    for torch_name, keras_name in ACTIVATIONS.items():
        if activation is getattr(activations, keras_name):
            return torch_name
    shown = getattr(activation, "__name__", repr(activation))
    raise OptionError(
        f"activation={shown} has no equal in torch's layer, which takes {', '.join(ACTIVATIONS)}: set "
        "layer.activation = keras.activations.linear, convert again, and put the activation behind the layer",
        _keras_name(layer),
    )


def _shared_options(layer: Any) -> dict[str, Any]:
    """The options of a layer of either framework that the other one has too, where they are set."""
    return {name: value for name, value in _SHARED.items() if getattr(layer, name, None) == value}


def _policy(layer: Any) -> Any:
    """The statistics policy of a layer of either framework; None for the batch's, as of a stock layer."""
    policy = getattr(layer, "statistics", None)
    return None if policy is None or policy.name == "batch" else policy


def _is_synchronized(layer: Any) -> bool:
    return isinstance(layer, sys.modules["torch"].nn.SyncBatchNorm)


def _keras_dtype(layer: Any) -> str:
    """Name of the Keras dtype policy whose variables hold all of a torch layer's values."""
    statistics = layer.running_mean.dtype
    parameter = next((p.dtype for p in (layer.weight, layer.bias) if p is not None), statistics)
    name = str(parameter).removeprefix("torch.")
    return f"mixed_{name}" if parameter.itemsize == 2 < statistics.itemsize else name


def _float64(variable: Any) -> NDArray[np.float64]:
    """A Keras variable's values; exact, and torch cannot read NumPy's bfloat16."""
    values: NDArray[np.float64] = sys.modules["keras"].ops.convert_to_numpy(variable).astype("float64")
    return values


def _keras_name(layer: Any) -> str:
    return f"{layer.name} ({type(layer).__name__})"


def _type_name(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
