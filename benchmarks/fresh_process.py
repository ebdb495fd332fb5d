"""Measurements in a process of their own, of which the last line that it prints is the result, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def json_of(module: str, *words: str, **environment: str) -> Any:
    """Return what `python -m module words` prints last; its environment is this one and what is given."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
