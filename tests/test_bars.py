"""What a terminal shows while something is measured and while it trains, seen through a pseudo-terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer import bar, nvml

pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")

TRAINING = """
import sys, time
from pathlib import Path
import numpy as np
from trainer import bar
from trainer.monitor import Monitor
bar.EVERY_SECONDS = 0.0
monitor = Monitor(Path(sys.argv[1]), "[red]mine", np.full(4, 10.0), is_time=True, done=0)
for step in range(1, 5):
    monitor.step(step, 10.4, {"loss": 5.0 - step, "tokens_per_second": 1234.0, "memory_bytes": 2.5 * 1024**3})
    if step == 2:
        time.sleep(1.2)  # the bar is drawn twice a second
        monitor.say("step 2: held-out loss 3.1")
        monitor.say("go on with: plan --resume " + sys.argv[2])
monitor.close()
"""

LONG_FOLDER = "/a/long/folder/of/a/run" * 5  # longer than the terminal is wide

MEASURING = """
import time
from planner.terminal import measuring_bar, say
with measuring_bar(say) as tell:
    tell("start: baseline", 0.0)
    tell("timing, round 1", 0.25)
    time.sleep(0.3)
    tell("timing, round 2", 0.75)
    time.sleep(0.3)
print("done")
"""


def seen(script: str, *arguments: str, terminal: bool = True) -> str:
    """Everything that the script writes; in a terminal of 100 columns, or into a pipe."""
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", script, *arguments]
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
        return done.stderr + done.stdout
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end was closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert child.wait(timeout=30) == 0, b"".join(parts)
    return b"".join(parts).decode("utf-8", errors="replace")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_while_it_trains_a_terminal_shows_the_loss_the_memory_and_the_plan(tmp_path: Path) -> None:
    raw = seen(TRAINING, str(tmp_path), LONG_FOLDER)
    text = plain(raw)
    assert "[red]mine" in text, "a name is text, not markup"
    assert "4/4" in text
    assert re.search(r"loss 1\.000 [█▁-▇]{4}", text)
    assert re.search(r"2\.50 of [\d.]+ GiB", text)
    assert "1,234 tok/s" in text
    assert re.search(r"21 s left, done \w{3} \d\d:\d\d", text)
    assert "4% behind plan" in text
    assert "step 2: held-out loss 3.1" in text
    assert f"plan --resume {LONG_FOLDER}" in text, "the terminal wraps, so that the command can be copied"
    assert "\x1b[?25h" in raw, "the cursor is given back"


def test_without_a_terminal_it_is_lines(tmp_path: Path) -> None:
    text = seen(TRAINING, str(tmp_path), LONG_FOLDER, terminal=False)
    assert "\x1b" not in text
    assert "step 4/4  loss 1.000  2.50 GiB  1,234 tok/s  4% behind plan" in text


def test_while_it_measures_a_terminal_shows_a_bar_and_leaves_nothing_behind() -> None:
    raw = seen(MEASURING)
    text = plain(raw)
    assert "timing, round 2" in text
    assert "━" in text
    assert raw.rstrip().endswith("done")
    assert "\x1b[2K" in raw, "the bar is wiped"


def test_without_a_terminal_measuring_is_one_line_a_kind() -> None:
    text = seen(MEASURING, terminal=False)
    assert text.splitlines() == ["start: baseline", "timing", "done"]


class NVMLError(Exception):
    pass


def unsupported(*_: Any) -> None:
    raise NVMLError


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        (
            {
                "nvmlDeviceGetTemperature": lambda handle, kind: 71,
                "nvmlDeviceGetPowerUsage": lambda handle: 240_400,
                "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=6 * 1024**3, total=11 * 1024**3),
            },
            ["5.00 of 11.0 GiB", "71 °C", "240 W"],
        ),
        (
            {
                "nvmlDeviceGetTemperature": unsupported,
                "nvmlDeviceGetPowerUsage": unsupported,
                "nvmlDeviceGetMemoryInfo": unsupported,
            },
            ["5.00 GiB"],
        ),
    ],
)
def test_a_cards_memory_heat_and_power_stand_beside_it(
    answers: dict[str, Any], line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        **answers,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert bar._Gauge("cuda").read(5 * 1024**3) == line


def test_where_no_gpu_is_visible_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 1)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu = nvml.VisibleGpu()
    assert (gpu.temperature_c(), gpu.power_watts(), gpu.memory_bytes()) == (None, None, None)
