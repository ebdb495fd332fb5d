"""Which statistics policies a Keras layer takes, and what they mean for it."""

from __future__ import annotations

from typing import Any

from batchnorm.errors import OptionError
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.policies import check_policy, from_config
from batchnorm.statistics.policy import Policy
from batchnorm.statistics.synced import Synced


def checked_policy(policy: object, *, renorm: bool, synchronized: bool) -> Policy:
    """Return the policy, or that of such a config.

    Args:
        policy: what was given as `statistics`.
        renorm, synchronized: of the layer.

    Raises:
        OptionError: no policy, one that Keras cannot keep to, or one that contradicts the layer's options.
    """
    if isinstance(policy, dict):
        policy = from_config(policy)
    policy = check_policy(policy)
    if renorm and policy != Batch():
        raise OptionError(
            f"renorm=True and statistics={policy} are two policies: leave one of them out; "
            "statistics=batchnorm.Renorm(...) renormalizes by the moving statistics"
        )
    if isinstance(policy, Synced):
        _check_synced(policy, synchronized)
    return policy


def _check_synced(policy: Synced, synchronized: bool) -> None:
    if synchronized:
        raise OptionError(
            f"synchronized=True and statistics={policy} say the same thing twice: leave one out"
        )
    if policy.group is not None:
        raise OptionError(
            f"Synced: group={policy.group} is for torch layers; in Keras all replicas share: leave group out"
        )
    if policy.timeout != Synced().timeout:
        raise OptionError(
            f"Synced: timeout={policy.timeout:g} is for torch layers; in Keras the backend's strategy or "
            "process group has its own: leave timeout out"
        )


def is_frozen(layer: Any) -> bool:
    """Whether a batch normalization, stock or ours, uses and keeps its moving statistics in training."""
    return not (layer.trainable and measures(layer, training=True))


def measures(layer: Any, training: bool) -> bool:
    """Whether a batch normalization, stock or ours, takes the moments of its batch in this mode."""
    policy: Policy = getattr(layer, "statistics", None) or Batch()  # a stock layer has none
    return policy.measures(training)


def checked_nonfinite(value: object) -> str:
    """Return what a batch with inf or NaN does to the moving statistics, or raise OptionError."""
    if value == "raise":
        raise OptionError(
            'nonfinite="raise" would have to wait for the device in every step, which a compiled one cannot: '
            'use nonfinite="skip" and look at layer.skipped, or keras.callbacks.TerminateOnNaN'
        )
    return _checked("nonfinite", value, ("propagate", "skip"))


def checked_small_batch(value: object) -> str:
    """Return what one value per channel is normalized by, or raise OptionError."""
    if value == "raise":
        raise OptionError(
            'small_batch="raise" would need the size of the batch, which a compiled step does not have on '
            'every backend: use small_batch="running", or leave it out'
        )
    return _checked("small_batch", value, ("allow", "running"))


def _checked(name: str, value: object, known: tuple[str, ...]) -> str:
    if value not in known:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
    return str(value)
