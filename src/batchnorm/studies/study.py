"""The study as a function: what `batchnorm study` does, from Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from batchnorm.errors import OptionError

from .data import Dataset, own_data
from .display import Display
from .objectives import targets_of
from .options import AUTO, StudyOptions
from .runner import StudyResult, run_study
from .settings import display_name
from .user_code import naming_the_line, source_of

Named = str | Callable[..., object]
T = TypeVar("T")


def study(
    data: object = ("digits", "vowels", "languages"),
    network: Named | Sequence[Named] = "auto",
    *,
    arms: str | Sequence[str] = AUTO,
    learning_rate: float | Sequence[float] | None = None,
    batch_size: int | Sequence[int] = (),
    depth: int | Sequence[int] = (),
    seeds: int = 5,
    epochs: int | None = None,
    optimizer: str = "adam",
    momentum: float | None = None,
    weight_decay: float = 0.0,
    loss: Named = "cross_entropy",
    metric: Named | None = None,
    target: float = 0.85,
    framework: str = "torch",
    data_dir: Path | str | None = None,
    jobs: int | None = None,
    executor: str | None = None,
    out: Path | str | None = None,
    progress: bool = True,
) -> StudyResult:
    """Trains networks with and without batch normalization and writes a report, as `batchnorm study` does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arms, given = ["none", "batchnorm"], {"seeds": 1, "epochs": 1, "progress": False, "out": folder}
    ...     result = batchnorm.study("vowels", arms=arms, learning_rate=1e-2, **given)
    >>> list(result.results["arms"])
    ['none', 'batchnorm']

    With data and a network of your own, in a file: training runs in processes that import the file, so the
    call stands under `if __name__ == "__main__":`::

        def build(norm):
            return nn.Sequential(nn.Linear(20, 64), norm(64, activation=nn.ReLU()), nn.Linear(64, 3))

        if __name__ == "__main__":
            result = batchnorm.study((train_loader, test_loader), build, arms=["none", "batchnorm"])
            print(result.report, result.results["arms"]["batchnorm"]["test_accuracy"]["mean"])

    Args:
        data: a name that `batchnorm study --list` prints, or several; `"file.py:function"`; or the data, or a
            function that returns it: `(x_train, y_train, x_test, y_test)`, or `(train, test)` of data sets,
            loaders or pairs of arrays (see `loaders.read`).
        network: a name, `"file.py:function"` or a function at the top level of a file, or several; it takes
            the arm's `norm` and returns a module; `"auto"`: those that go with the data.
        arms: names of arms; `"auto"`: those that go with the data.
        learning_rate: one or several; None for three that go with the optimizer.
        batch_size: examples per step, one or several; none for the data's own.
        depth: hidden layers or blocks of the network, one or several; none for its own.
        seeds: how many runs differ by initial weights and order alone.
        epochs: passes over the training data; None for the data's own.
        optimizer: `"sgd"`, `"adam"` or `"adamw"`.
        momentum: of SGD; None for 0.9.
        weight_decay: of the weights of dense and convolution layers.
        loss: `"cross_entropy"`, `"mse"`, or your own function of outputs and targets, which returns a scalar
            tensor.
        metric: `"accuracy"`, `"r2"`, or your own function of outputs and targets, NumPy arrays, which returns
            a fraction of which more is better; None for accuracy with cross_entropy, else r2.
        target: the held-out metric, up to 1, that "steps to target" counts up to.
        framework: `"torch"` or `"keras"`.
        data_dir: where `mnist` is looked for.
        jobs: training runs at a time; None for one per core, or per thread of the executor.
        executor: where they run: `"dask:tcp://host:8786"`, the scheduler of a Dask cluster; None for here.
        out: the folder of results, where the same call goes on; None for `runs/study-<data>`.
        progress: whether progress and notices are shown on stderr.

    Returns:
        The folder, the content of its `results.json`, and the path of the report.

    Raises:
        OptionError, DataError: an option or the data is wrong, or the folder holds another study's runs.
        StudyError: the network, the loss or the metric raised, or another study is at work in the folder.
        StudyInterrupted: Ctrl-C; every finished run is kept, and the same call goes on from there.
    """
    names, loaded = _data(data, loss if isinstance(loss, str) else "")
    options = StudyOptions(
        networks=tuple(map(_spec, network if isinstance(network, list | tuple) else (network,))),
        data=names,
        data_dir=None if data_dir is None else Path(data_dir),
        arms=tuple(_several(arms)),
        learning_rates=None if learning_rate is None else tuple(_several(learning_rate)),
        seeds=seeds,
        epochs=epochs,
        batch_sizes=tuple(_several(batch_size)),
        depths=tuple(_several(depth)),
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        loss=_spec(loss),
        metric=None if metric is None else _spec(metric),
        target_accuracy=target,
        jobs=jobs,
        executor=executor,
        out=None if out is None else Path(out),
        framework=framework,
    )
    if not progress:
        return run_study(options, Display(), loaded)
    from .terminal import TerminalDisplay

    with TerminalDisplay() as display:
        return run_study(options, display, loaded)


def _data(data: object, loss: str) -> tuple[tuple[str, ...], Mapping[str, Dataset]]:
    """Returns the names of data sets, and those among them that were passed as objects."""
    if isinstance(data, str):
        return (data,), {}
    if isinstance(data, list | tuple) and data and all(isinstance(name, str) for name in data):
        return tuple(data), {}
    if not callable(data):
        return ("data",), {"data": own_data("data", "data", data, targets_of(loss))}
    name = f"{getattr(data, '__module__', 'data')}:{getattr(data, '__name__', 'data')}"
    with naming_the_line(f"data {name}", source_of(name), kept=OptionError):
        returned = data()
    return (name,), {name: own_data(f"data {name}", display_name(name), returned, targets_of(loss))}


def _several(value: T | Sequence[T]) -> Sequence[T]:
    return value if isinstance(value, list | tuple) else (value,)


def _spec(function: Named) -> str:
    """Returns `file.py:function` for a function, by which worker processes find it.

    Raises:
        OptionError: it is not at the top level of a file.
    """
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        path = None
    if path is None or not Path(path).is_file() or not name.isidentifier():
        raise OptionError(
            f"{name} is not a function at the top level of a file, where worker processes could find it: put "
            f"it into one, or pass 'file.py:{name.rpartition('.')[2] if name.isidentifier() else 'function'}'"
        )
    return f"{path}:{name}"
