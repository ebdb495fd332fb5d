"""Verdicts: one per claim, in plain words with numbers, and only for what a study measured."""

from batchnorm.study.verdicts.internals import drift, gradients
from batchnorm.study.verdicts.results import Network, Study, read
from batchnorm.study.verdicts.serving import cost, statistics_at_test_time
from batchnorm.study.verdicts.significance import RULE, Claim, Comparison, Grade
from batchnorm.study.verdicts.training import faster, generalizes, larger_rates

__all__ = ["RULE", "Claim", "Comparison", "Grade", "Network", "Study", "judge", "read"]

_CLAIMS = (faster, larger_rates, generalizes, gradients, drift, statistics_at_test_time, cost)


def judge(network: Network) -> tuple[Claim, ...]:
    """The claims that this network's runs measured, graded."""
    return tuple(claim for make in _CLAIMS if (claim := make(network)) is not None)
