"""Number and seed of the cases: a few hundred, the same ones in every run; or as many as are asked for.

    HYPOTHESIS_PROFILE=fuzz FUZZ_CASES=20000 FUZZ_SEED=17 pytest -n auto tests/fuzz    (what `make fuzz` does)

tries 20,000 cases, other ones for another seed. Every test says its share of the seed, by which hypothesis
draws the same cases again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

CASES = int(os.environ.get("FUZZ_CASES", "0"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))

# Shares of the work, for as many processes; in the short mode there is one.
SHARDS = 8 if CASES else 1
shards = pytest.mark.parametrize("shard", range(SHARDS))

_CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def fuzz(check: Callable[..., None], shard: int, share: float, few: int, **strategies: Any) -> None:
    """Try a check on cases drawn from the strategies.

    Args:
        check: raises where a case is wrong.
        shard: which part of the work this is.
        share: of all cases, in the long mode.
        few: cases in the short mode.
    """
    number = max(1, round(CASES * share / SHARDS)) if CASES else few
    options: dict[str, Any] = {"max_examples": number, "deadline": None, "suppress_health_check": _CHECKS}
    if CASES:
        check = seed(SEED * SHARDS + shard)(given(**strategies)(check))
        print(f"seed {SEED}, shard {shard} of {SHARDS}: {number} cases")
    else:
        options |= {"phases": [Phase.explicit, Phase.generate, Phase.shrink]}
        check = given(**strategies)(check)
    settings(**options)(check)()
