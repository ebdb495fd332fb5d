"""Lists the policies, checks them as options, and makes them from the plain data of `Policy.config`."""

from __future__ import annotations

import dataclasses
import functools
import json

from batchnorm.errors import OptionError

from .adapted import Adapted
from .batch import Batch
from .ghost import Ghost
from .policy import Policy
from .renorm import Renorm
from .running import Running
from .synced import Synced

POLICIES: dict[str, type[Policy]] = {
    kind.__name__: kind for kind in (Batch, Ghost, Synced, Renorm, Running, Adapted)
}


def check_policy(policy: object, tracked: bool = True) -> Policy:
    """Return `policy`, or raise OptionError unless it is a statistics policy that the layer can have.

    Args:
        policy: the option.
        tracked: whether the layer has running statistics, which some policies need.
    """
    if not isinstance(policy, Policy):
        got = f"a {type(policy).__name__}" if hasattr(policy, "shape") else repr(policy)
        known = ", ".join(f"batchnorm.{name}(...)" for name in POLICIES)
        raise OptionError(f"statistics must be one of {known}; got {got}")
    if policy.needs_running and not tracked:
        raise OptionError(
            f"statistics={policy} uses running statistics, and this layer has none: "
            "make it with track_running_stats=True"
        )
    return policy


def from_config(config: object) -> Policy:
    """Return the policy of a dict from `Policy.config`.

    Raises:
        OptionError: (a ValueError) another value, or an unknown policy or field.
    """
    fields = dict(config) if isinstance(config, dict) else {}
    kind = POLICIES.get(str(fields.pop("policy", None)))
    if kind is None:
        raise OptionError(f"no statistics policy: {config!r}; known are {', '.join(POLICIES)}")
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(fields) - known)):
        raise OptionError(f"{kind.__name__} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    values = {n: from_config(v) if isinstance(v, dict) else v for n, v in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:  # a field without a default is missing
        raise OptionError(f"no statistics policy: {config!r}; {error}") from None


@functools.cache
def from_text(text: str) -> Policy:
    """Return the policy of a `Policy.text`."""
    return from_config(json.loads(text))
