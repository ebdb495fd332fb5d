"""A user's own data and networks as source text, for tests that write them to a file."""

from __future__ import annotations

from pathlib import Path

_OWN = """
import os, stat, time
from pathlib import Path
import numpy as np
from torch import nn


def data():
    random = np.random.default_rng(0)
    centres = 3 * random.standard_normal((3, 4))
    y = np.arange(90) % 3
    x = centres[y] + random.standard_normal((90, 4))
    return x[:60], y[:60], x[60:], y[60:]


def net(norm):
    return nn.Sequential(nn.Linear(4, 8), norm(8, activation=nn.ReLU()), nn.Linear(8, 3))


class Slow(nn.Module):
    # Files tell that training has begun, and that it hangs, which it does once HANG_AFTER runs are finished.
    def forward(self, x):
        here = Path(__file__).parent
        if any(here.glob("runs/*/timing/*.json")):
            (here / "trains").touch()
        if len(list(here.glob("runs/*/runs/*.json"))) >= int(os.environ.get("HANG_AFTER", "1000")):
            (here / "hangs").touch()
            time.sleep(3600)
        return x


def slow(norm):
    return nn.Sequential(Slow(), *net(norm))


def dies_once(norm):
    marker = os.environ["DEATH_MARKER"]
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), 9)
    return net(norm)


def dies(norm):
    os._exit(3)


def forks(norm):
    os.fork()  # what comes back in the child goes on with the study
    return net(norm)


class Forking(nn.Module):
    forked = False

    def forward(self, x):
        if self.training and not self.forked:
            self.forked = True
            os.fork()
        return x


def forks_in_training(norm):
    return nn.Sequential(*net(norm), Forking())


def forks_and_exits(norm):
    if os.fork() == 0:
        raise SystemExit
    return net(norm)


def exits(norm):
    raise SystemExit(0)


def presses(norm):
    raise KeyboardInterrupt


def closes(norm):
    raise GeneratorExit


def writes_on_the_pipe(norm):
    for descriptor in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"\\0\\0\\0\\4text")
        except OSError:
            pass
    return net(norm)


def raises(norm):
    if norm.arm.norm == "batchnorm":
        raise RuntimeError("no such layer here")
    return net(norm)


def five_outputs(norm):
    return nn.Linear(4, 5)


class TwoResults(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def two_results(norm):
    return TwoResults(4, 3)


def no_module(norm):
    return 3
"""


def write_own_code(folder: Path) -> Path:
    """Write `own.py` with `data` (3 classes, 4 features, 60 + 30 examples) and networks for it."""
    path = folder / "own.py"
    path.write_text(_OWN)
    return path
