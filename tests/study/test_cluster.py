"""A study on a Dask cluster: a real scheduler and real workers, all on 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distributed
import pytest
import torch

from batchnorm.errors import OptionError
from batchnorm.studies import StudyOptions, cluster, cluster_worker, run_study
from batchnorm.studies.cluster import DaskPool
from batchnorm.studies.data import load_data
from batchnorm.studies.errors import StudyError
from batchnorm.studies.frameworks import find_framework
from batchnorm.studies.json_files import json_safe
from batchnorm.studies.worker import Engine
from tests.support.programs import run_python

from .own_code import write_own_code
from .tasks import run_task
from .test_cli import PATIENCE, wait_until
from .test_runner import Listening

pytestmark = pytest.mark.xdist_group("cluster")

# Training says which Dask worker it is on, and waits while it is told to.
WAITS = """
import os, time
from pathlib import Path
from torch import nn

class Waits(nn.Module):
    def forward(self, x):
        here = Path(os.environ["MARKS"])
        if self.training and (here / "wait").exists():
            (here / f"on-{os.getppid()}").write_text(str(os.getpid()))
            while (here / "wait").exists():
                time.sleep(0.05)
        return x

def waits(norm):
    return nn.Sequential(Waits(), nn.Linear(4, 8), norm(8, activation=nn.ReLU()), nn.Linear(8, 3))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_code(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[distributed.LocalCluster]:
    """A scheduler and a worker in threads of this process, which starts quickly, and talks TCP."""
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address=":0",
        local_directory=str(tmp_path_factory.mktemp("dask")),
    ) as there:
        yield there


@contextlib.contextmanager
def pool_on(
    there: distributed.LocalCluster, own: Path, display: Listening | None = None
) -> Iterator[DaskPool]:
    data = {"data": load_data(f"{own}:data")}
    framework = find_framework("torch")
    with DaskPool(there.scheduler_address, None, data, framework, display or Listening()) as pool:
        yield pool


class Counting(Listening):
    """Keeps how much work each report is about."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[float] = []

    def advance(self, work: float) -> None:
        super().advance(work)
        self.reports.extend(filter(None, [work]))


def test_records_and_errors_are_those_of_a_local_run(
    own: Path, local_cluster: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; and the user's file reaches workers that have no such folder."""
    monkeypatch.chdir(own.parent)
    good, wrong = run_task("own.py:net", epochs=20), run_task("own.py:raises")
    data, threads = {"data": load_data("own.py:data")}, torch.get_num_threads()
    at_home = Engine(find_framework("torch"), data).do(good, lambda _: None)
    torch.set_num_threads(threads)

    monkeypatch.setattr(cluster_worker, "_SECONDS_BETWEEN_REPORTS", 0.0)
    display = Counting()
    display.left = 30.0  # for 60 steps
    with pool_on(local_cluster, own, display) as pool:
        ((done, run),) = pool.run([good], {good: 0.5})
        assert (done, display.left, display.notices) == (good, 0, [])
        assert display.reports == [12.5, 12.5, 5.0]  # as they are taken
        assert json_safe(run) == json_safe(at_home)
        with pytest.raises(StudyError, match=r"^network own\.py:raises, .*no such layer here \(own\.py, l"):
            list(pool.run([wrong]))
        with pytest.raises(
            StudyError, match=r"OptionError: own\.py:missing: own\.py has no function 'missing'$"
        ):
            list(pool.run([run_task("own.py:missing")]))
        folder = Path(local_cluster.workers[0].local_directory)
        assert [path.name for path in folder.rglob("own.py")] == ["own.py"]
    wait_until(lambda: not list(folder.rglob("own.py")))  # its files end with the study


def test_workers_of_other_versions_do_not_take_part(
    own: Path, local_cluster: distributed.LocalCluster
) -> None:
    display = Listening()
    with pool_on(local_cluster, own, display) as pool:
        assert pool.size == 1
        pool._versions["torch"] = "0.4"
        local_cluster.scale(2)
        wait_until(lambda: len(local_cluster.scheduler_info["workers"]) == 2)
        pool._looked = 0.0
        pool._look_for_workers()
        assert pool.size == 1
        assert re.fullmatch(r"worker tcp:\S+ is left out: it has torch \S+, not 0\.4: .*", *display.notices)
    with pool_on(local_cluster, own) as pool:
        pool._versions["batchnorm"] = "9.9"
        with pytest.raises(StudyError, match=r"worker \S+ cannot take part: it has batchnorm \S+, not 9\.9"):
            list(pool.run([run_task("own.py:net")]))
    local_cluster.scale(1)


def test_a_cluster_that_cannot_be_used_is_one_line(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_SECONDS_TO_CONNECT", 0.5)
    monkeypatch.setattr(cluster, "_SECONDS_FOR_WORKERS", 0.5)
    data, framework = {"data": load_data(f"{own}:data")}, find_framework("torch")

    def complaint(address: str) -> str:
        with (
            DaskPool(address, None, data, framework, Listening()) as pool,
            pytest.raises(StudyError) as raised,
        ):
            list(pool.run([run_task(f"{own}:net")]))
        return str(raised.value)

    unused = f"tcp://127.0.0.1:{free_port()}"
    assert complaint(unused).startswith(f"no Dask scheduler answers at {unused}: start one with `dask sche")
    assert "needs a certificate: name its files at tls in distributed.comm" in complaint(f"tls{unused[3:]}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer_as_a_web_server, args=(server,), daemon=True).start()
        other = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert complaint(other).startswith(
            f"what answers at {other} is no Dask scheduler: the port of one is"
        )
    with distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address=":0"
    ) as empty:
        address = empty.scheduler_address
        assert complaint(address) == (
            f"the Dask scheduler at {address} has no workers: start some with `dask worker {address}`"
        )


@pytest.mark.parametrize(
    "executor",
    ["", "dask", "dask:", "tcp://host:8786", "dask:host:8786", "dask:tcp://host", "dask:http://host:1",
     "dask:tcp://host:8786/x", "dask:tcp://:8786", "dask:tcp://a b:1",
     "dask:tcp://host:0", "dask:tcp://host:65536"],
)  # fmt: skip
def test_addresses_of_another_form_are_refused(executor: str) -> None:
    with pytest.raises(OptionError, match=r"--executor .* is no address .* dask:tcp://host:8786"):
        StudyOptions(executor=executor)


@pytest.mark.parametrize("host", ["host", "10.0.0.1", "[::1]", "a-b.example.org"])
def test_addresses_of_schedulers_are_taken(host: str) -> None:
    study = StudyOptions(executor=f"dask:tcp://{host}:8786", jobs=2)
    assert study.scheduler == f"tcp://{host}:8786"
    assert "dask" not in study.command()  # the same study, wherever it runs


def test_dask_is_imported_only_where_it_is_used_and_named_where_it_is_missing(tmp_path: Path) -> None:
    printed = run_python(
        "-c",
        "import sys\n"
        "from batchnorm.errors import MissingExtraError\n"
        "from batchnorm.studies import StudyOptions, cluster, run_study\n"
        "assert not {'dask', 'distributed'} & sys.modules.keys()\n"
        "sys.modules['distributed'] = None\n"
        "try:\n"
        "    run_study(StudyOptions(executor='dask:tcp://127.0.0.1:1'))\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n",
        cwd=tmp_path,
    )
    needs = "batchnorm study --executor needs distributed, which is not installed"
    assert printed == f"{needs}: pip install 'batchnorm[cluster]'\n"
    assert list(tmp_path.iterdir()) == []


def answer_as_a_web_server(server: socket.socket) -> None:
    with server.accept()[0] as connection:
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Processes:
    """`dask scheduler` and `dask worker`, each in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._started = folder, list[subprocess.Popen[bytes]]()
        self.address = f"tcp://127.0.0.1:{free_port()}"
        # The scheduler has no batchnorm.
        without = folder / "without"
        without.mkdir()
        (without / "sitecustomize.py").write_text("import sys\nsys.modules['batchnorm'] = None\n")
        host, _, port = self.address.removeprefix("tcp://").partition(":")
        self.scheduler = self._start("scheduler", "--host", host, "--port", port, PYTHONPATH=str(without))

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        return self._start(
            "worker", self.address, "--nthreads", "1", "--local-directory", "scratch", *options
        )

    def _start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"{words[0]}-{len(self._started)}.log"
        with log.open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *words, "--no-dashboard"],
                cwd=self.folder,
                env={**os.environ, "MARKS": str(self.folder), **environment},
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def end(self) -> None:
        for process in self._started:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a group of processes, as if its machine were switched off."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    (tmp_path / "cluster").mkdir()
    started = Processes(tmp_path / "cluster")
    try:
        yield started
    finally:
        started.end()


def marks(folder: Path) -> dict[int, int]:
    """The processes that train, by the Dask workers that started them."""
    found = {path.name.removeprefix("on-"): path.read_text() for path in folder.glob("on-*")}
    return {int(worker): int(text) for worker, text in found.items() if text}


def options(tmp_path: Path, executor: str | None, out: str) -> StudyOptions:
    own = write_own_code(tmp_path)
    own.write_text(own.read_text() + WAITS)
    return StudyOptions(
        networks=(f"{own}:waits",),
        data=(f"{own}:data",),
        arms=("none", "batchnorm"),
        learning_rates=(1e-2,),
        seeds=2,
        epochs=2,
        batch_sizes=(20,),
        out=tmp_path / out,
        executor=executor,
    )


def records(folder: Path) -> dict[str, object]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "runs").iterdir()}


class Holding(Listening):
    """Has training wait from its beginning on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def training(self, runs: int, finished: int, work: float, workers: int) -> None:
        (self._folder / "wait").touch()
        self.started, self.left, self.workers = (runs, finished), work, workers


@pytest.mark.slow
def test_a_process_that_dies_on_a_worker_is_reported_and_its_run_done_again(
    own: Path, local_cluster: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEATH_MARKER", str(own.parent / "died"))
    display, dies_once = Listening(), run_task(f"{own}:dies_once")
    with pool_on(local_cluster, own, display) as pool:
        assert [done for done, _ in pool.run([dies_once])] == [dies_once]
        died = f"killed by signal 9 (SIGKILL), on {dies_once.describe()}"
        assert display.notices == [f"a worker process died, {died}; it is done again"]
        with pytest.raises(StudyError, match=r"died again, with exit code 3, on .*own\.py:dies"):
            list(pool.run([run_task(f"{own}:dies")]))


@pytest.mark.slow
def test_a_worker_dies_another_joins_and_the_records_are_as_at_home(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = processes.folder
    monkeypatch.setenv("MARKS", str(tmp_path / "nowhere"))
    at_home = run_study(options(tmp_path, None, "local"))
    display = Holding(folder)
    first = processes.worker()

    def intervene() -> None:
        try:
            wait_until(lambda: len(marks(folder)) == 1)
            processes.worker()
            wait_until(lambda: len(marks(folder)) == 2)
            kill(first)
            processes.worker()
            wait_until(lambda: len(marks(folder)) == 3)
        finally:
            (folder / "wait").unlink()

    with ThreadPoolExecutor(1) as threads:
        intervention = threads.submit(intervene)
        result = run_study(options(tmp_path, f"dask:{processes.address}", "cluster-runs"), display)
        intervention.result()
    assert (display.started, display.workers, len(display.ended)) == ((4, 0), 1, 4)
    assert display.left == pytest.approx(0.0, abs=1e-6)
    assert records(result.folder) == records(at_home.folder)
    (notice,) = display.notices
    assert re.fullmatch(r"worker tcp://\S+ died or left, on .*waits.*; it is done again", notice)


@pytest.mark.slow
def test_ctrl_c_ends_what_runs_on_workers_and_the_same_command_goes_on(
    tmp_path: Path, processes: Processes
) -> None:
    folder = processes.folder
    study = options(tmp_path, None, "unused")
    command = [
        *(sys.executable, "-c", "from batchnorm.cli import main; main()", "study"),
        *("--network", *study.networks, "--data", *study.data, "--arms", "none,batchnorm", "--seeds", "4"),
        *("--learning-rate", "1e-2", "--epochs", "2", "--batch-size", "20", "--out", str(tmp_path / "out")),
        *("--executor", f"dask:{processes.address}"),
    ]
    processes.worker(), processes.worker()

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    interrupted = start()
    wait_until(lambda: bool(list(tmp_path.glob("out/runs/*.json"))))
    (folder / "wait").touch()
    wait_until(lambda: len(marks(folder)) == 2)
    os.killpg(interrupted.pid, signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=PATIENCE)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*.json")}
    assert interrupted.returncode == 130, stderr
    last = stderr.splitlines()[-1]
    assert last.startswith(f"stopped: {len(kept)} of 8 runs are finished and kept in"), stderr
    assert "Traceback" not in stderr
    # Though what they wait for has not come.
    wait_until(lambda: not any(map(is_alive, marks(folder).values())))
    (folder / "wait").unlink()

    on = start()
    _, stderr = on.communicate(timeout=PATIENCE)
    assert on.returncode == 0, stderr
    assert f"8 training runs, of which {len(kept)} are finished already, 2 at a time" in stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(records(tmp_path / "out")) == 8


@pytest.mark.slow
def test_a_client_that_is_killed_or_a_scheduler_that_ends_leaves_nothing_running(
    tmp_path: Path, processes: Processes
) -> None:
    folder = processes.folder
    processes.worker()
    study = options(tmp_path, f"dask:{processes.address}", "out")
    (folder / "wait").touch()
    program = f"from batchnorm.studies import StudyOptions, run_study\nrun_study({study!r})\n".replace(
        "PosixPath", "__import__('pathlib').Path"
    )
    client = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    wait_until(lambda: bool(marks(folder)))
    kill(client)
    wait_until(lambda: not any(map(is_alive, marks(folder).values())))

    for path in folder.glob("on-*"):
        path.unlink()

    def intervene() -> None:
        try:
            wait_until(lambda: bool(marks(folder)))
        finally:
            kill(processes.scheduler)

    with ThreadPoolExecutor(1) as threads:
        intervention = threads.submit(intervene)
        lost = r"the Dask scheduler at \S+ no longer answers; every finished run is kept"
        with pytest.raises(StudyError, match=lost):
            run_study(study)
        intervention.result()


def is_alive(process: int) -> bool:
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")
