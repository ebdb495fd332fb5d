from __future__ import annotations

import json
import math
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.errors import DataError, FileError, OptionError
from batchnorm.studies import StudyOptions, run_study
from batchnorm.studies.data import load_data
from batchnorm.studies.errors import StudyError
from batchnorm.studies.frameworks import find_framework
from batchnorm.studies.options import parse_numbers, split_list
from batchnorm.studies.pool import WorkerPool, interrupt_held
from batchnorm.studies.records import Run, Timing
from batchnorm.studies.runner import _alone_in
from batchnorm.studies.settings import setting_names
from batchnorm.studies.tasks import RunTask, plan
from batchnorm.studies.terminal import Display
from batchnorm.studies.verdicts import formatting
from batchnorm.studies.worker import Engine

from .own_code import write_own_code
from .tasks import run_task, timing_task

pytestmark = pytest.mark.xdist_group("runner")  # one pool of processes


class Listening(Display):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.left = self.work = 0.0
        self.ended: list[str] = []
        self.diverged: list[str] = []
        self.started: tuple[int, int] | None = None
        self.notices: list[str] = []
        self.verdicts: list[tuple[str, str]] = []
        self.parts: list[tuple[int, int]] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def training(self, runs: int, finished: int, work: float, workers: int) -> None:
        assert workers == 1
        self.started = (runs, finished)
        self.left = self.work = work

    def advance(self, work: float) -> None:
        self.left -= work

    def run_ended(self, name: str, setting: str, run: Run) -> None:
        assert setting.startswith("own.py:")
        (self.diverged if run.diverged else self.ended).append(name)

    def setting_ended(self, setting: str, verdict: str) -> None:
        self.verdicts.append((setting, verdict))

    def published(self, report: Path) -> None:
        results = json.loads((report.parent / "results.json").read_text())
        assert len(results["runs"]) == results["provenance"]["runs_finished"]
        self.parts.append((len(results["runs"]), results["provenance"]["runs_planned"]))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_own_code(tmp_path)


def options(own: Path, **changes: Any) -> StudyOptions:
    settings: dict[str, Any] = {
        "networks": (f"{own}:net",),
        "data": (f"{own}:data",),
        "arms": ("none", "batchnorm"),
        "learning_rates": (1e-2,),
        "seeds": 2,
        "epochs": 2,
        "batch_sizes": (20,),
        "jobs": 1,
        "out": own.parent / "out",
    }
    return StudyOptions(**{**settings, **changes})


def task(network: object) -> RunTask:
    return run_task(str(network))


def test_a_study_runs_grows_and_goes_on(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.studies.report.write_report", lambda folder: folder / "results.json")
    monkeypatch.setattr("batchnorm.studies.schedule._SECONDS", 0.0)
    monkeypatch.setattr("batchnorm.studies.schedule._TIMES", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = Listening()
    result = run_study(options(own), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert (first.started, len(first.ended)) == ((4, 0), 4)
    assert first.left == pytest.approx(0, abs=1e-9 * first.work)
    assert [setting for setting, _ in first.verdicts] == ["own.py:net"]
    assert first.verdicts[0][1].startswith("batch normalization ")
    assert first.parts == [(1, 4), (2, 4), (3, 4)]
    assert "runs_planned" not in result.results["provenance"]
    assert result.report.is_file()
    assert result.results == json.loads((result.folder / "results.json").read_text())
    assert (result.folder / "curves.csv").read_text().count("\n") == 1 + 4 * 2
    old = {path: path.stat().st_mtime_ns for path in (result.folder / "runs").iterdir()}

    # A rate more, with which one run diverges: a result, not an error; what is there stays.
    second = Listening()
    grown = run_study(options(own, seeds=1, learning_rates=(1e-2, 1e30), arms=("none",)), second)
    assert (second.started, second.ended, len(second.diverged)) == ((2, 1), [], 1)
    assert second.left == pytest.approx(0, abs=1e-9 * second.work)
    assert 0 < second.work < first.work
    assert [run["status"] for run in grown.results["runs"]] == ["finished", "diverged"]
    assert grown.results["arms"]["none"]["test_accuracy"]["values"] == [
        result.results["arms"]["none"]["test_accuracy"]["values"][0]
    ]
    assert {path: path.stat().st_mtime_ns for path in old} == old

    with pytest.raises(DataError, match=r"epochs 2 \(now 3\)"):
        run_study(options(own, epochs=3))
    own.write_text(own.read_text() + "\n# changed")
    with pytest.raises(DataError, match="network_source"):
        run_study(options(own))


def test_the_plan_finishes_one_setting_before_the_next_and_in_it_one_seed(own: Path) -> None:
    tasks = plan(options(own, networks=("mlp", "deep"), learning_rates=(1e-2, 1e-3), seeds=2))
    assert [task.setting.network for task in tasks] == ["mlp"] * 8 + ["deep"] * 8
    assert [task.seed for task in tasks] == 2 * ([0] * 4 + [1] * 4)
    assert len({task.name for task in tasks}) == 16


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, WorkerPool, Listening]]:
    """The user's file, and one pool for several tests: a worker takes seconds to start."""
    own = write_own_code(tmp_path_factory.mktemp("pool"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEATH_MARKER", str(own.parent / "died"))
        display = Listening()
        with WorkerPool(1, {"data": load_data(f"{own}:data")}, find_framework("torch"), display) as pool:
            yield own, pool, display


@pytest.fixture
def shared(running: tuple[Path, WorkerPool, Listening]) -> tuple[Path, WorkerPool]:
    return running[:2]


def test_a_killed_worker_is_reported_and_its_run_done_again(
    running: tuple[Path, WorkerPool, Listening],
) -> None:
    own, pool, display = running
    dies_once, fine = task(f"{own}:dies_once"), task(f"{own}:net")
    assert {done for done, _ in pool.run([dies_once, fine])} == {dies_once, fine}
    died = f"killed by signal 9 (SIGKILL), on {dies_once.describe()}"
    assert display.notices == [f"a worker process died, {died}; it is done again"]


def test_workers_leave_ctrl_c_to_their_parent(shared: tuple[Path, WorkerPool]) -> None:
    own, pool = shared
    fine = task(f"{own}:net")
    list(pool.run([fine]))
    worker = pool._members[0].process.pid
    assert worker is not None
    os.kill(worker, signal.SIGINT)
    assert [done for done, _ in pool.run([fine])] == [fine]
    assert pool._members[0].process.pid == worker


def test_ctrl_c_is_held_though_another_thread_takes_the_signal() -> None:
    """As those of OpenBLAS do, which every process that imports NumPy has."""
    begins = threading.Event()

    def take() -> None:
        begins.wait()
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=take)
    thread.start()  # before Ctrl-C is held: a thread that starts later inherits that it is
    done: list[str] = []

    def press() -> None:
        with interrupt_held():
            begins.set()
            thread.join()
            done.append("all of the block")

    with pytest.raises(KeyboardInterrupt):
        press()
    assert done


def test_a_network_that_raises_is_named_with_its_line(shared: tuple[Path, WorkerPool]) -> None:
    own, pool = shared
    with pytest.raises(
        StudyError, match=r"raises, arm batchnorm: RuntimeError: no such layer here \(own\.py"
    ):
        list(pool.run([task(f"{own}:raises")]))


@pytest.mark.parametrize(
    ("network", "error"),
    [("exits", "SystemExit: 0"), ("presses", "KeyboardInterrupt"), ("closes", "GeneratorExit")],
)
def test_a_network_that_would_end_its_process_is_named_with_its_line(
    shared: tuple[Path, WorkerPool], network: str, error: str
) -> None:
    own, pool = shared
    with pytest.raises(StudyError, match=rf"own\.py:{network}, arm batchnorm.*: {error}.* \(own\.py, line "):
        list(pool.run([task(f"{own}:{network}")]))


@pytest.mark.parametrize("network", ["forks", "forks_in_training", "forks_and_exits"])
def test_a_network_that_forks_is_trained_once_and_its_child_ended(
    running: tuple[Path, WorkerPool, Listening], network: str
) -> None:
    own, pool, display = running
    display.left = 15.0
    run = run_task(f"{own}:{network}", epochs=10)
    ((done, result),) = pool.run([run], {run: 0.5})
    assert (done, display.left) == (run, 0)
    assert result.network == f"own.py:{network}"
    assert len(list(pool.run([task(f"{own}:net")]))) == 1


@pytest.mark.slow
def test_what_a_network_writes_on_the_pipe_ends_its_worker(shared: tuple[Path, WorkerPool]) -> None:
    own, pool = shared
    with pytest.raises(StudyError, match=r"died again, .*writes_on_the_pipe"):
        list(pool.run([task(f"{own}:writes_on_the_pipe")]))


@pytest.mark.slow
def test_a_worker_that_dies_twice_on_a_run_ends_the_study(shared: tuple[Path, WorkerPool]) -> None:
    own, pool = shared
    with pytest.raises(StudyError, match=r"died again, with exit code 3, on .*dies"):
        list(pool.run([task(f"{own}:dies")]))


def test_networks_are_trained_and_timed_on_one_thread(own: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = Engine(find_framework("torch"), {"data": load_data(f"{own}:data")})
        timing = engine.do(timing_task(f"{own}:net", ("none",)), lambda _: None)
        assert isinstance(timing, Timing)
        assert timing.arms.keys() == {"none"}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arms": ("none", "batchnrom")}, "unknown arm 'batchnrom': known are none, batchnorm"),
        ({"networks": ("mpl",)}, "unknown network 'mpl': known are mlp, deep, residual-mlp"),
        ({"framework": "tensorflow"}, "unknown framework 'tensorflow': known are torch, keras"),
        ({"networks": ()}, "no network was given"),
        (
            {"networks": ("a/net.py:f", "b/net.py:f")},
            "a/net.py:f, none, .* and digits, b/net.py:f, none, .*; rename",
        ),
        ({"networks": ("net.py:f", "net.py:F")}, "share the file digits-net.py-F-32-none-0.001-0.json"),
        ({"networks": ("ä.py:f", "ö.py:f")}, "share the file"),
        ({"learning_rates": (0.0,)}, "learning rate 0.0"),
        ({"learning_rates": (float("nan"),)}, "learning rate nan"),
        ({"seeds": 0}, "--seeds 0 is below 1"),
        ({"epochs": 0}, "--epochs 0"),
        ({"batch_sizes": (0,)}, "--batch-size 0"),
        ({"jobs": 0}, "--jobs 0"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion': known are sgd, adam, adamw"),
        ({"momentum": 0.9}, "--momentum is of sgd; adam has betas"),
        ({"optimizer": "sgd", "momentum": 1.0}, "--momentum 1.0"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0"),
        ({"depths": (4,)}, "--depth needs --network with one of deep, residual-mlp"),
        ({"networks": ("mlp",), "depths": (4,)}, "network mlp has one depth"),
        ({"networks": ("deep",), "depths": (0,)}, "--depth 0 is below 1"),
        ({"arms": ("skipinit",)}, "skipinit is for residual networks, which .* is not"),
        ({"target_accuracy": 90.0}, "--target-accuracy 90.0"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        StudyOptions(**wrong)


def test_one_study_at_a_time_works_in_a_folder(own: Path) -> None:
    asked = options(own)
    with _alone_in(asked.folder):
        before = sorted(asked.folder.rglob("*"))
        with pytest.raises(StudyError, match=r"another study is at work in .*out: wait .*--out"):
            run_study(asked)
        assert sorted(asked.folder.rglob("*")) == before
    with _alone_in(asked.folder):
        pass


def test_a_lock_is_no_link_to_follow(own: Path) -> None:
    asked = options(own)
    asked.folder.mkdir()
    (asked.folder / ".lock").symlink_to(own)
    before = own.read_bytes()
    with pytest.raises(FileError, match=r"\.lock cannot be written"):
        run_study(asked)
    assert own.read_bytes() == before


@pytest.mark.slow
def test_what_another_study_wrote_meanwhile_is_not_written_over(own: Path) -> None:
    """As one does whose lock this one does not see, on another machine of a network's file system."""
    asked = options(own, seeds=1, arms=("none",))

    class Other(Display):
        def stage(self, text: str) -> None:
            if text.startswith("timing"):
                other = {"settings": {"batch_size": 7}}
                (asked.folder / name).write_text(json.dumps(other))

    for name, complaint in (
        (f"timing/{plan(asked)[0].setting.file_name}.json", "another study wrote"),
        (f"runs/{plan(asked)[0].name}.json", "7"),
    ):
        with pytest.raises((StudyError, DataError), match=complaint):
            run_study(asked, Other())
        assert json.loads((asked.folder / name).read_text()) == {"settings": {"batch_size": 7}}
        (asked.folder / name).unlink()


def test_a_batch_beyond_the_data_is_refused(own: Path) -> None:
    with pytest.raises(OptionError, match="--batch-size 61 is more than the 60"):
        run_study(options(own, batch_sizes=(61,)))


def test_lists_are_split_and_repeats_fall_out() -> None:
    assert split_list(" a, b,,c ") == ("a", "b", "c")
    assert parse_numbers(("1e-3", "0.001"), float, "rate") == (1e-3, 1e-3)
    assert StudyOptions(learning_rates=(1e-3, 1e-3)).learning_rates == (1e-3,)
    with pytest.raises(OptionError, match="learning rate 'fast' is not a number"):
        parse_numbers(("fast",), float, "learning rate")
    with pytest.raises(OptionError, match=r"depth '4\.5' is not a whole number"):
        parse_numbers(("4.5",), int, "depth")


def test_rates_that_differ_in_the_last_place_have_names_and_texts_of_their_own() -> None:
    rates = (1e-3, math.nextafter(1e-3, 1), 1.0000001e-3, 1.0, 3e-5, 1e30)
    study = StudyOptions(networks=("mlp",), data=("digits",), arms=("none",), learning_rates=rates, seeds=1)
    tasks = plan(study)
    assert len({task.name for task in tasks}) == len({task.describe() for task in tasks}) == len(rates)
    assert tasks[0].name == "digits-mlp-32-none-0.001-0"
    words = shlex.split(study.command())
    assert parse_numbers(split_list(words[words.index("--learning-rate") + 1]), float, "rate") == rates
    assert len({formatting.rate(rate) for rate in rates}) == len(rates)


def test_the_command_is_one_that_a_shell_reads() -> None:
    study = StudyOptions(networks=("a b;$(touch x).py:f",), data=("it's.py:g",))
    words = shlex.split(study.command())
    assert words[:6] == ["batchnorm", "study", "--data", "it's.py:g", "--network", "a b;$(touch x).py:f"]


def test_the_default_folder_is_the_same_for_the_same_study() -> None:
    assert StudyOptions().folder == Path("runs/study-digits-vowels-languages")
    own = StudyOptions(networks=("/x/my net.py:build",), data=("/y/d.py:load",))
    assert own.folder == Path("runs/study-d.py-load-my-net.py-build")


def test_settings_are_named_by_what_tells_them_apart() -> None:
    study = StudyOptions(networks=("deep",), depths=(2, 4), data=("digits", "icons"), batch_sizes=(8, 16))
    names = list(setting_names(study.settings()).values())
    assert (len(names), names[0]) == (8, "deep(2) on digits, batches of 8")
    assert list(setting_names(StudyOptions(networks=("mlp",), data=("digits",)).settings()).values()) == [
        "mlp"
    ]
    assert StudyOptions(optimizer="sgd", data=("digits",)).rates_on("digits") == (1e-2, 1e-1, 1.0)


def test_several_data_sets_are_a_first_look_at_each() -> None:
    study, one = StudyOptions(), StudyOptions(data=("languages",))
    assert [setting.data for setting in study.settings()] == ["digits", "digits", "vowels", "languages"]
    assert study.arms_on("digits") == ("none", "batchnorm", "layernorm")
    assert study.arms_on("languages") == ("none", "batchnorm", "batchnorm:unmasked")
    assert len(one.arms_on("languages")) == 7
    assert [study.rates_on(name) for name in study.data] == [(1e-3, 1e-2), (1e-3, 1e-2), (1e-2,)]
    assert one.rates_on("languages") == (1e-4, 1e-3, 1e-2)
    assert [study.recipe(name).epochs for name in study.data] == [5, 10, 1]
    assert [StudyOptions(data=(name,)).recipe(name).epochs for name in study.data] == [10, 10, 4]
    assert StudyOptions(epochs=2).recipe("languages").epochs == 2
    assert [setting.batch_size for setting in one.settings()] == [32]


@pytest.mark.slow
def test_batch_sizes_and_two_data_sets_are_one_study(own: Path) -> None:
    arms = ("none", "batchnorm:Ghost(4)", "batchnorm")
    data = (f"{own}:data", "digits")
    result = run_study(
        options(own, data=data, networks=("mlp",), batch_sizes=(20, 60), arms=arms, epochs=1, seeds=1)
    )
    assert list(result.results["networks"]) == [
        f"mlp on {data}, batches of {size}" for data in ("own.py:data", "digits") for size in (20, 60)
    ]
    page = result.report.read_text()
    assert "By batch size: mlp on digits" in page
    assert "Held-out accuracy, by batch size" in page
