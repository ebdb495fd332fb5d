"""Resolves what users and developers install, for every platform, from the registry's metadata alone.

    python scripts/resolves.py

pip resolves for the machine that it runs on, and takes a build of torch that happens to lie there. uv
resolves for any platform and Python, and downloads nothing but metadata. A resolution that fails prints uv's
explanation, which names the requirements that contradict each other, and the exit code is 1.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux arm64": "aarch64-manylinux_2_28",
    "macOS 14 arm64": "aarch64-apple-darwin",
    "Windows x86-64": "x86_64-pc-windows-msvc",
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
EXTRAS = ("study", "torch", "keras", "cluster", "dev")


class Resolution(NamedTuple):
    """One extra of pyproject.toml on one platform: by constraints.txt, or by its lower bounds."""

    platform: str
    python: str
    extra: str
    lowest: bool

    def __str__(self) -> str:
        by = "lower bounds" if self.lowest else "constraints.txt"
        return f"[{self.extra}] on {self.platform}, Python {self.python}, by {by}"


def every_resolution() -> list[Resolution]:
    """Every extra on every platform and Python; the lower bounds on Linux, by the oldest Python."""
    pinned = [Resolution(*cell, lowest=False) for cell in itertools.product(PLATFORMS, PYTHONS, EXTRAS)]
    lowest = [Resolution("Linux x86-64", PYTHONS[0], extra, lowest=True) for extra in EXTRAS]
    return pinned + lowest


def explain_failure(resolution: Resolution) -> str | None:
    """Return why the resolution fails, in uv's words, or None if it succeeds.

    Only wheels count, as a newcomer may have no compiler.
    """
    how = ["--resolution", "lowest-direct"] if resolution.lowest else ["--constraint", "constraints.txt"]
    where = ["--python-platform", PLATFORMS[resolution.platform], "--python-version", resolution.python]
    options = ["--only-binary", ":all:", "--no-python-downloads", "--no-header", "--quiet"]
    what = ["pyproject.toml", "--extra", resolution.extra]
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", *what, *how, *where, *options],
        cwd=ROOT,
        env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip() or f"uv ended with {done.returncode}" if done.returncode else None


def main() -> int:
    """Resolve everything, four at a time; print each failure once, and a line that counts."""
    resolutions = every_resolution()
    with ThreadPoolExecutor(4) as threads:
        failures = list(threads.map(explain_failure, resolutions))
    failed: dict[str, list[Resolution]] = {}
    for resolution, failure in zip(resolutions, failures, strict=True):
        if failure is not None:
            failed.setdefault(failure, []).append(resolution)
    for failure, where in failed.items():
        print("These cannot be installed:", *where, failure, "", sep="\n", file=sys.stderr)
    print(f"{failures.count(None)} of {len(failures)} resolutions succeed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
