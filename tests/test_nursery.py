"""Workers forked from a process that has the libraries: they answer, end and fail as those that start from nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fakes import make_job
from test_worker import folder  # noqa: F401  # the module's fixture: a small model and data

from planner.nursery import Nursery, nursery
from planner.prober import DoesNotFit, ProcessProber, worker_environment
from presets.errors import MeasurementError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only"),
]


@pytest.fixture(scope="module")
def nearby() -> Iterator[Nursery]:
    with nursery(worker_environment()) as made:
        assert made is not None
        yield made
        pid = made._process.pid
    assert not psutil.pid_exists(pid)


def test_a_forked_worker_times_what_one_from_nothing_times(folder: Path, nearby: Nursery) -> None:  # noqa: F811
    job = make_job(model=str(folder / "model"), num_threads=1)
    make = ProcessProber.factory(folder / "data", folder, nursery=nearby)
    prober = make(job)
    assert prober.pid != nearby._process.pid  # type: ignore[attr-defined]
    assert psutil.Process(prober.pid).ppid() == nearby._process.pid  # type: ignore[attr-defined]
    loaded = prober.load()
    assert loaded.num_threads == 1
    assert loaded.import_seconds < 2  # from nothing it is 7 s and more; only the fork's own search for modules is left
    assert prober.memory([[[[0]], [[1]]]], [], 0.0).reserved_bytes > 50 << 20
    assert len(prober.run([[[0]], [[1, 2]]], [], [0, 0])) == 2
    with pytest.raises(MeasurementError, match="out of bounds"):
        prober.run([[[10_000_000]]], [], [0])
    assert len(prober.run([[[0]]], [], [0])) == 1
    second = make(job)  # beside the first
    assert second.load().num_parameters == loaded.num_parameters
    for one in (prober, second):
        pid = one.pid  # type: ignore[attr-defined]
        one.stop()
        one.stop()
        assert not psutil.pid_exists(pid)


def test_ends_are_told_as_those_of_any_worker(folder: Path, nearby: Nursery) -> None:  # noqa: F811
    job = make_job(model=str(folder / "model"))
    missing = ProcessProber(job, folder / "nothing", nursery=nearby)
    with pytest.raises(MeasurementError, match="cannot be read"):
        missing.load()
    missing.stop()
    killed = ProcessProber(job, folder / "data", nursery=nearby)
    psutil.Process(killed.pid).kill()
    with pytest.raises(DoesNotFit, match="killed"):
        killed.load()
    assert killed._process.poll() == -9
    killed.stop()
    left = ProcessProber(job, folder / "data", nursery=nearby)
    with pytest.raises(subprocess.TimeoutExpired):
        left._process.wait(timeout=0.01)
    left._process.stdin.close()  # what the end of the planner looks like from inside
    assert left._process.wait(timeout=20) == 0
    left.stop()


def test_where_the_nursery_is_gone_workers_start_from_nothing(folder: Path) -> None:  # noqa: F811
    gone = Nursery(worker_environment())
    gone._process.kill()
    gone._process.wait()
    prober = ProcessProber(make_job(model=str(folder / "model")), folder / "data", nursery=gone)
    assert psutil.Process(prober.pid).ppid() == os.getpid()
    prober.stop()
    gone.stop()


def test_nothing_is_left_when_the_planner_is_killed(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    script = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from pathlib import Path
from fakes import make_job
from planner.nursery import Nursery
from planner.prober import ProcessProber, worker_environment
nearby = Nursery(worker_environment())
prober = ProcessProber(make_job(model={str(folder / "model")!r}), Path({str(folder / "data")!r}), nursery=nearby)
print(nearby._process.pid, prober.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as planner:
        assert planner.stdout is not None
        pids = [int(one) for one in planner.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        planner.kill()
    until = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
