"""What else went on while something was timed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fakes import FakeDevice, chat_lengths, make_data, make_job, make_row

from planner import meter
from planner.conditions import beside_ours, summarise, throttle_reasons
from planner.doctor import look
from planner.estimate import estimate
from planner.measure import measure
from planner.measurement import Conditions, GpuConditions
from planner.meter import ConditionsMeter
from trainer.company import Company, MachineSeconds, machine_seconds, own_cpu_seconds, runnable_threads

LENGTHS = chat_lengths(2000)
DATA = make_data(LENGTHS)
QUIET = Conditions(seconds=1.0, load=1.0, steal=0.0, others=0.01)


def test_a_quiet_machine_gets_no_warning() -> None:
    found = summarise([QUIET] * 5, on_cpu=True)
    assert found.warnings == ()
    assert found.is_calibrated


def test_steal_and_other_programs_are_warned_of_with_number_and_threshold() -> None:
    found = summarise([replace(QUIET, steal=0.08), replace(QUIET, seconds=3.0, others=0.30)], on_cpu=True)
    assert found.steal == pytest.approx(0.02)
    assert found.others == pytest.approx((0.01 + 3 * 0.30) / 4)
    assert len(found.warnings) == 1
    assert "other programs used 23%" in found.warnings[0]
    assert "more than 10%" in found.warnings[0]
    assert not found.is_calibrated
    assert "the host took 8%" in summarise([replace(QUIET, steal=0.08)], on_cpu=True).warnings[0]


def test_other_programs_on_the_cpu_do_not_matter_beside_a_gpu() -> None:
    assert summarise([replace(QUIET, others=0.9)], on_cpu=False).warnings == ()


def test_a_gpu_that_throttles_drops_its_clock_or_is_shared_is_warned_of() -> None:
    cool = GpuConditions(sm_clock_mhz=1900, temperature_c=60, other_processes=0)
    hot = GpuConditions(
        sm_clock_mhz=1500,
        temperature_c=89,
        throttle=("power cap", "thermal limit (hardware)"),
        other_processes=2,
        other_memory_bytes=3 << 30,
    )
    readings = [replace(QUIET, seconds=1.0 + i / 10, gpu=gpu) for i, gpu in enumerate((cool, cool, hot, cool))]
    slowed, clock, shared = summarise(readings, on_cpu=False).warnings
    assert "thermal limit (hardware)) at up to 89 °C" in slowed
    assert "1500 and 1900 MHz" in clock
    assert "2 other process(es)" in shared
    assert "3.0 GiB" in shared
    assert summarise([replace(QUIET, gpu=replace(cool, throttle=("power cap",)))], on_cpu=False).warnings == ()


@pytest.mark.parametrize(
    ("gpu", "fastest", "slowest"),
    [
        ({}, 1.0, 1.0),
        ({"throttle": ("power cap",)}, 1.0, 1.0),
        ({"throttle": ("thermal limit (hardware)",)}, 0.9, 1 / 0.9),
        ({"throttle": ("hardware slowdown",), "sm_clock_mhz": 900, "max_sm_clock_mhz": 1800}, 0.5, 2.0),
        ({"other_processes": 1, "other_share": 0.0, "other_memory_bytes": 1 << 30}, 1.0, 1.0),  # an idle notebook
        ({"other_processes": 2, "other_share": 0.4}, 0.6, 1 / 0.6),
        ({"other_processes": 1}, 0.5, 2.0),  # nobody tells what it did
    ],
)
def test_what_spoils_a_gpu_s_timings_widens_the_range(gpu: dict[str, Any], fastest: float, slowest: float) -> None:
    now = replace(QUIET, gpu=GpuConditions(**gpu))
    found = summarise([replace(now, seconds=1 + i / 10) for i in range(4)], on_cpu=False)
    assert (found.fastest, found.slowest) == (pytest.approx(fastest), pytest.approx(slowest))
    assert found.is_calibrated is (slowest == 1.0)
    lengths = chat_lengths(2000)
    device, row = FakeDevice(lengths, noise=0.02), make_row(make_job(device="cuda"), DATA)
    count = itertools.count(1000)
    measured = measure(
        [row], DATA, device.factory, clock=device.clock, meter=lambda: replace(now, seconds=next(count) / 1000)
    )
    one = estimate(row, DATA, measured)
    assert one.train_seconds
    assert one.train_seconds_low
    assert one.train_seconds_high
    assert one.calibrated is (slowest == 1.0)
    assert one.train_seconds_low <= one.train_seconds * fastest * (1 + 1e-9)
    assert one.train_seconds_high >= one.train_seconds * slowest * (1 - 1e-9)
    assert one.train_seconds_high < one.train_seconds * slowest * 1.1


def test_a_clock_that_moves_reaches_from_its_lowest_to_its_highest() -> None:
    clocks = (300, 1500, 1800, 1800)  # the first is of a GPU that idles
    readings = [replace(QUIET, seconds=1.0 + i / 10, gpu=GpuConditions(sm_clock_mhz=c)) for i, c in enumerate(clocks)]
    found = summarise(readings, on_cpu=False)
    assert (found.fastest, found.slowest) == (pytest.approx(1700 / 1800), pytest.approx(1700 / 1500))
    assert not found.is_calibrated
    assert (
        summarise([replace(one, gpu=GpuConditions(sm_clock_mhz=1800)) for one in readings], on_cpu=False).warnings == ()
    )


def test_nvml_s_bits_become_words() -> None:
    assert throttle_reasons(0x01) == ()  # idle
    assert throttle_reasons(0x44) == ("power cap", "thermal limit (hardware)")


def test_the_conditions_are_kept_with_each_round_and_widen_the_range() -> None:
    device = FakeDevice(LENGTHS, noise=0.02)
    row = make_row(make_job(), DATA)
    quiet = estimate(row, DATA, measure([row], DATA, device.factory, clock=device.clock, meter=lambda: QUIET))
    found = measure([row], DATA, device.factory, clock=device.clock, meter=lambda: replace(QUIET, others=0.25))
    assert all(one.conditions is not None for one in found.measurements[0].rounds)
    busy = estimate(row, DATA, found)
    assert quiet.calibrated
    assert not busy.calibrated
    assert busy.train_seconds
    assert busy.train_seconds_low
    assert busy.train_seconds_high
    assert busy.train_seconds_low == pytest.approx(0.75 * busy.train_seconds)
    assert busy.train_seconds_high == pytest.approx(busy.train_seconds / 0.75)
    assert any("other programs used 25%" in warning for warning in busy.warnings)


def test_a_stranger_s_process_counts_as_other_and_a_child_of_ours_does_not() -> None:
    burn = "import time\nend = time.time() + 2.5\nwhile time.time() < end: pass"
    read = ConditionsMeter(is_gpu=False)
    begun = time.process_time()
    child = subprocess.Popen([sys.executable, "-c", burn])
    time.sleep(1.5)
    ours = read()
    used = own_cpu_seconds() - begun
    child.kill()
    child.wait()
    assert used > 0.1  # the child's seconds are ours
    assert ours.others is not None
    assert ours.load is None or ours.load >= 0
    # A process of another family: started by a shell that has gone.
    read, company = ConditionsMeter(is_gpu=False), Company()
    subprocess.run(["sh", "-c", f"'{sys.executable}' -c '{burn}' >/dev/null 2>&1 &"], check=True)
    time.sleep(1.5)
    strangers = read()
    assert strangers.others is not None
    assert strangers.others > 0.05
    share = company.share()
    assert share is not None
    assert share > 0.05


def test_only_the_cores_that_we_may_use_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of 64 cores, others may be busy on 60 without taking anything from the four of this process."""
    times = namedtuple("times", "user idle steal")  # as psutil's, of which there is no class to import
    busy, idle = times(90.0, 8.0, 2.0), times(10.0, 90.0, 0.0)
    cores = [busy, idle, busy, idle]
    monkeypatch.setattr(os, "cpu_count", lambda: len(cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3}, raising=False)
    whole = times(*map(sum, zip(*cores, strict=True)))
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu=False: cores if percpu else whole)
    monkeypatch.setattr("trainer.company.PROC_STAT", str(tmp_path / "stat"))
    (tmp_path / "stat").write_text("cpu  1 2 3\ncpu0 1\ncpu1 1\ncpu2 1\ncpu3 1\nintr 1 2\nprocs_running 7\n")
    assert machine_seconds() == MachineSeconds(busy=20.0, steal=0.0, total=200.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert machine_seconds() == MachineSeconds(busy=200.0, steal=4.0, total=400.0)
    assert runnable_threads() == 7
    (tmp_path / "stat").write_text("cpu  1\ncpu0 1\ncpu1 1\ncpu3 1\ncpu4 1\n")  # the third is switched off
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3}, raising=False)
    assert machine_seconds() == MachineSeconds(
        busy=100.0, steal=2.0, total=200.0
    )  # the second and the third in the list
    assert runnable_threads() is None  # of other cores too
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 9}, raising=False)  # numbered otherwise in a container
    assert machine_seconds() == MachineSeconds(busy=200.0, steal=4.0, total=400.0)


def test_a_machine_that_tells_nothing_of_its_processors_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", closed)
    monkeypatch.setattr("trainer.company.PROC_STAT", "/nowhere/stat")
    company = Company()
    assert (company.share(), company.demand(0.01), runnable_threads()) == (None, None, None)
    read = ConditionsMeter(is_gpu=False, clock=itertools.count(0, 10).__next__)
    assert (read().others, read().steal) == (None, None)
    assert look().taken is None


@pytest.mark.parametrize(("demand", "seen"), [(0.0, 0.0), (0.5, 0.47), (1.0, 0.63), (2.0, 0.76)])
def test_what_others_get_beside_a_training_is_as_was_seen(demand: float, seen: float) -> None:
    assert beside_ours(demand) == pytest.approx(seen, abs=0.04)


def test_readings_closer_than_half_a_second_are_one() -> None:
    now = [100.0]
    read = ConditionsMeter(is_gpu=False, clock=lambda: now[0])
    now[0] += 1.0
    first = read()
    now[0] += 0.1
    assert read() is first
    now[0] += 1.0
    assert read() is not first


def test_a_gpu_that_answers_only_in_part_is_read_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def unsupported(*_: Any) -> None:
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1410,
        nvmlDeviceGetMaxClockInfo=unsupported,
        nvmlDeviceGetTemperature=lambda handle, kind: 71,
        nvmlDeviceGetPowerUsage=lambda handle: 250_000,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x40,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=1, usedGpuMemory=5)],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(meter, "LEAST_SECONDS", 0.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    time.sleep(0.02)
    found = ConditionsMeter(is_gpu=True)().gpu
    assert found == GpuConditions(
        sm_clock_mhz=1410,
        temperature_c=71,
        power_watts=250.0,
        throttle=("thermal limit (hardware)",),
        other_processes=1,
        other_memory_bytes=5,
        other_share=None,
    )


def test_what_others_ran_on_the_gpu_is_told_apart_from_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        value = 6

    asked: list[int] = []
    samples = [
        SimpleNamespace(pid=1, timeStamp=70, smUtil=20),
        SimpleNamespace(pid=1, timeStamp=90, smUtil=40),
        SimpleNamespace(pid=os.getpid(), timeStamp=80, smUtil=60),
        SimpleNamespace(pid=2**22 + 1, timeStamp=85, smUtil=95),  # it has left since: a worker of ours may have
    ]

    def used(handle: int, since: int) -> list[SimpleNamespace]:
        asked.append(since)
        if found := [one for one in samples if one.timeStamp > since]:
            return found
        raise NVMLError  # not found

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_ERROR_NOT_FOUND=6,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=1, usedGpuMemory=5)],
        nvmlDeviceGetProcessUtilization=used,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(meter.time, "time", lambda: 50e-6)  # what was there before is not ours to tell
    samples.insert(0, SimpleNamespace(pid=1, timeStamp=40, smUtil=100))
    gpu = meter.NvmlGpu()
    first, second = gpu.read({os.getpid()}), gpu.read({os.getpid()})
    assert first is not None
    assert first.other_share == pytest.approx(0.30)
    assert second is not None
    assert second.other_share == 0.0
    assert asked == [50, 90]
    NVMLError.value = 3  # not supported
    third = gpu.read({os.getpid()})
    assert third is not None
    assert third.other_share is None
