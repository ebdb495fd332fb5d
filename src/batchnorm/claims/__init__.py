"""Claims of the literature about batch normalization, each with the experiment that tests it."""

from .claim import Claim, Findings
from .registry import CLAIMS
from .runner import ClaimsOptions, ClaimsResult, measure, run_claims

__all__ = ["CLAIMS", "Claim", "ClaimsOptions", "ClaimsResult", "Findings", "measure", "run_claims"]
