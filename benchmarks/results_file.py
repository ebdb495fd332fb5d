"""Result files: rows, and where they come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import batchnorm

from .tables import Row, Rows

FOLDER = Path(__file__).parent / "results"
# What the list in a file is called where it is not "rows".
_LISTS = {"claims-cpu": "claims"}


def _commit() -> str:
    """Return the commit that is measured, with `-dirty` where its code was changed: results may change."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words], capture_output=True, text=True, check=False, cwd=FOLDER.parent.parent
            )
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def provenance(command: str) -> Row:
    """Return what a reader needs to judge and repeat a measurement."""
    return {
        "command": command,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "batchnorm": batchnorm.__version__,
    }


def save(name: str, command: str, rows: Rows, folder: Path = FOLDER) -> Path:
    """Write `rows` with their provenance to `folder/name.json`, whole or not at all."""
    return write(name, provenance(command), rows, folder)


def write(name: str, origin: Row, rows: Rows, folder: Path) -> Path:
    """Write `rows` and the provenance `origin` to `folder/name.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    draft = path.with_suffix(".tmp")
    content = {"provenance": origin, _LISTS.get(name, "rows"): rows}
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def load(name: str, folder: Path = FOLDER) -> Row:
    """Return a result file's provenance and rows."""
    found: Row = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return {"provenance": found["provenance"], "rows": found[_LISTS.get(name, "rows")]}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
