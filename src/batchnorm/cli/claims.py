"""Defines `batchnorm claims`: experiments that test claims of the literature."""

from __future__ import annotations

from . import options
from .errors import one_clear_line


def claims(
    names: options.ClaimNames = None,
    seeds: options.ClaimSeeds = 5,
    out: options.ClaimsOut = None,
    list_claims: options.ListClaims = False,
    debug: options.Debug = False,
) -> None:
    """Which claims of the literature about batch normalization hold on small experiments here?

    Runs the experiment of each claim with each seed, judges it by a rule that was fixed before, and writes
    report.html and claims.json. Ctrl-C keeps every finished seed; the same command goes on from there.
    """
    with one_clear_line(debug, "every finished seed is kept"):
        from batchnorm.claims import ClaimsOptions, run_claims
        from batchnorm.claims.terminal import TerminalProgress, print_list, print_verdicts

        if list_claims:
            print_list()
            return
        folder = {} if out is None else {"out": out}
        chosen = ClaimsOptions(names=tuple(names or ()), seeds=seeds, **folder)
        with TerminalProgress() as progress:
            result = run_claims(chosen, progress)
        print_verdicts(result.results)
        print(f"report: {result.report}")
