"""Policies from plain data: what files and compiled programs hold of them; `Policy.config` makes it."""

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


def from_config(config: object) -> Policy:
    """Return the policy of such a dict.

    Raises:
        OptionError: (a ValueError) it is no such dict, or has an unknown policy or field.
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
    """Return the policy of such JSON."""
    return from_config(json.loads(text))
