"""Facts and settings of this process: its age, its peak memory, how its threads wait. No torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def quiet_waiting() -> None:
    """Let OpenMP threads spin only shortly while they wait; called before torch is imported, in worker and trainer.

    By default they spin for milliseconds. Where another process wants the same cores, each spins away the time that the
    other needs to arrive: on two shared cores a micro-step of 0.12 s took 9 s. Never spinning (OMP_WAIT_POLICY=PASSIVE)
    made the bundled model's micro-step 2.8 times slower on quiet cores, 1,000 turns about 1.1 times, and they kept the
    step at 0.08 s on average on busy ones (2026-11-23, two cores). What the user has set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def growing_segments() -> None:
    """Let torch grow its blocks of GPU memory in place; called before torch is imported, in worker and trainer.

    Micro-batches come in hundreds of shapes, and blocks of fixed size that one shape leaves seldom fit the next.
    Without this an 8 B model at micro-batch 8 held 117 GB in the run where its longest micro-batches alone had held
    81 GB (H200); with it four runs of 1 to 8 B held what theirs did, within 1.1 % (H100; torch 2.11, 2026-11-26).
    Linux only; what the user has set stays.
    """
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def cores() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads_of_a_process(asked: int | None, num_processes: int) -> int | None:
    """CPU threads of each process of a run; None: torch's own choice, where one has the machine to itself.

    What starts a run's processes and what times one of them both ask here: a step timed on all cores would be too fast
    for a run in which each process has its share of them.

    Args:
        asked: what the user has set, for each process.
    """
    if asked is not None or num_processes == 1:
        return asked
    return max(1, cores() // num_processes)


def stop_signals() -> tuple[int, ...]:
    """Signals that ask a run to stop; a closed terminal's hang-up only where it is not ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, hangup


def settle_garbage() -> None:
    """Keep Python's garbage collector from walking over what will stay to the end; called when the model is loaded."""
    import gc

    gc.collect()
    gc.freeze()


def seconds_since_process_start() -> float:
    """Age of this process in seconds, interpreter start included."""
    try:
        # psutil derives the start from a boot time in whole seconds; /proc with the boot clock is good to 10 ms.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        import psutil

        return max(0.0, time.time() - psutil.Process().create_time())


def suspended_seconds() -> float:
    """Seconds that the machine has slept since it was started; 0 where the system does not say."""
    try:
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC))
    except AttributeError:
        return 0.0


def peak_resident_bytes() -> int:
    """Most physical memory that this process has held.

    Linux: VmHWM. Not getrusage's ru_maxrss, which a child takes over from the process that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """Physical memory that this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device: str) -> int:
    """Most memory held at once: what torch reserved on the GPU; on the CPU the process's resident memory."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_reserved())
    return peak_resident_bytes()
