"""Verdicts: one per claim, in plain words with numbers, and only for what a study measured."""

from .internals import drift, gradients
from .results import Network, Study, read
from .serving import cost, padding, statistics_at_test_time
from .significance import RULE, Claim, Comparison, Grade
from .summary import in_short
from .training import faster, generalizes, larger_rates

__all__ = ["RULE", "Claim", "Comparison", "Grade", "Network", "Study", "in_short", "judge", "read"]

# Those of batch normalization against the plain network take the runs of both, each at its best rate.
_OF_PAIR = (faster, larger_rates, gradients, drift, cost)
_ALONE = (generalizes, padding, statistics_at_test_time)


def judge(network: Network) -> tuple[Claim, ...]:
    """Returns the claims that this network's runs measured, graded."""
    claims = [make(network, *network.pair) for make in _OF_PAIR] if network.pair else []
    claims += [make(network) for make in _ALONE]
    return tuple(claim for claim in claims if claim is not None)
