"""`plan watch RUN`: a run seen from another terminal. It reads the run's files and changes nothing."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from planner.figures import UNKNOWN, clock, duration, duration_range, figure, gib
from planner.run_view import RunView, look_at
from planner.terminal import ascii_only, out
from presets.text import printable
from trainer.ahead import LONGEST
from trainer.sparkline import sparkline

EVERY_SECONDS = 1.0
PACE_STEPS = 20  # of which the speed is shown
ENDED = ("finished", "stopped", "failed")


def watch(folder: Path, *, once: bool = False, sleep: Callable[[float], None] = time.sleep) -> RunView:
    """Show a run until it ends; once, or where stdout is no terminal, only how it stands.

    Raises:
        RunError: as `planner.run_view.look_at`.
    """
    view = look_at(folder)
    if once or not sys.stdout.isatty():
        out("\n".join(lines_of(view, gpu=_gpu(view), now=datetime.now().astimezone(), blocks=not ascii_only())))
        return view
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            view = look_at(folder)
            live.update(_panel(view), refresh=True)
            if view.state in ENDED:
                return view
            sleep(EVERY_SECONDS)


def lines_of(view: RunView, *, gpu: str | None, now: datetime, blocks: bool = True) -> list[str]:
    """How a run stands, as plain lines; `blocks`: with the loss drawn in block characters."""
    job, last = view.job, view.steps[-1] if view.steps else {}
    done = int(last.get("step", 0))
    total = view.num_steps
    share = f", {done / total:.0%}" if total else ""
    lines = [
        f"{printable(view.folder.name)}: {view.state}, step {done:,} of {f'{total:,}' if total else UNKNOWN}{share}"
    ]
    losses = [float(one["loss"]) for one in view.steps if isinstance(one.get("loss"), (int, float))]
    if losses:
        lines.append(f"loss      {losses[-1]:.3f}" + (f"  {sparkline(losses)}" if blocks else ""))
    if view.evaluations:
        told = " -> ".join(f"{loss:.3f}" for _, loss in (view.evaluations[0], view.evaluations[-1]))
        lines.append(f"held-out  {told if len(view.evaluations) > 1 else f'{view.evaluations[0][1]:.3f}'}")
    if last:
        tokens, seconds = _pace(view)
        lines.append(f"speed     {figure(tokens)} tokens/s, {duration(seconds)} a step")
        lines.append(f"memory    {gib(last.get('memory_bytes'))}")
    if gpu:
        lines.append(f"GPU       {gpu}")
    lines += _time_lines(view, last, now)
    if view.state == "silent":
        lines.append(
            f"Nothing written for {duration(view.seconds_since_sign)}. If its process is gone: "
            f"plan --resume {printable(shlex.quote(str(view.folder)))}"
        )
    if view.record is not None and view.record.error and view.state == "failed":
        lines.append(f"Error: {printable(view.record.error)}")
    if view.is_gone and view.record is None:
        lines.append(
            "Its process is gone and wrote no record: it was killed, the memory ran out, or it ended with an error "
            "that its terminal showed."
        )
    if view.state == "stopped":
        lines.append(f"Go on with it: plan --resume {printable(shlex.quote(str(view.folder)))}")
    lines.append(f"settings  {printable(job.name)}, {_split(view)}, {job.precision} on {job.device}")
    return lines


def _pace(view: RunView) -> tuple[float | None, float | None]:
    """(tokens per second, seconds per step) over the latest steps: the very last of a run is often a partial one."""
    known = [
        (float(one["tokens_per_second"]), float(one["seconds"]))
        for one in view.steps[-PACE_STEPS:]
        if isinstance(one.get("tokens_per_second"), (int, float)) and isinstance(one.get("seconds"), (int, float))
    ]
    seconds = sum(each for _, each in known)
    if seconds <= 0:
        return None, None
    return sum(rate * each for rate, each in known) / seconds, seconds / len(known)


def _time_lines(view: RunView, last: dict[str, Any], now: datetime) -> list[str]:
    lines = []
    left, drift = last.get("seconds_left"), last.get("drift")
    if view.state in ("running", "starting") and isinstance(left, (int, float)):
        left = max(0.0, left - (view.seconds_since_step or 0.0))  # as the step ended; it may be evaluated since
        done_at = f", done {clock(now + timedelta(seconds=float(left)), now)}" if abs(left) < LONGEST else ""
        lines.append(f"time      {duration(float(left))} left{done_at}")
    record = view.record
    if record is not None and record.status == "finished" and record.actual.seconds is not None:
        promised = duration(view.predicted.seconds)
        if view.predicted.seconds_low is not None and view.predicted.seconds_high is not None:
            span = duration_range(view.predicted.seconds_low, view.predicted.seconds_high)
            doubt = ", not a 90 % range" if view.predicted.calibrated is False else ""
            promised += f" ({span}{doubt})"
        lines.append(f"time      {duration(record.actual.seconds)}, predicted {promised}")
    if isinstance(drift, (int, float)):
        word = "behind" if drift > 0 else "ahead of"
        lines.append(f"plan      {abs(drift):.0%} {word} plan" if abs(drift) >= 0.005 else "plan      on plan")
    return lines


def _split(view: RunView) -> str:
    steps = "/".join(str(one) for one in view.job.gradient_accumulation_steps)
    return f"micro {view.job.micro_batch_size} x GA {steps}{', packed' if view.job.packing else ''}"


def _panel(view: RunView) -> Any:
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    lines = lines_of(view, gpu=_gpu(view), now=datetime.now().astimezone())
    done = int(view.steps[-1]["step"]) if view.steps else 0
    bar = ProgressBar(total=view.num_steps or 1, completed=done if view.num_steps else 0)
    return Panel(
        # The bar alone ends no line: what follows would stand behind it, out of sight.
        Group(Text(lines[0], style="bold"), bar, Text(""), *(Text(line) for line in lines[1:])),
        width=None,
        expand=False,
    )


def _gpu(view: RunView) -> str | None:
    """Temperature, power and memory of the card that the run uses, as the driver tells; None where there is none."""
    if view.job.device != "cuda":
        return None
    from planner.hardware import detect_device
    from planner.meter import NvmlGpu
    from presets.errors import SettingsError

    found = NvmlGpu().read(set())
    if found is None:
        return None
    parts = []
    try:
        facts = detect_device("cuda")
        if facts.memory_bytes and facts.free_bytes is not None:
            parts.append(f"{gib(facts.memory_bytes - facts.free_bytes)} of {gib(facts.memory_bytes)} in use")
    except SettingsError:
        parts.append("not visible from here")
    if found.temperature_c is not None:
        parts.append(f"{found.temperature_c} °C")
    if found.power_watts is not None:
        parts.append(f"{found.power_watts:.0f} W")
    parts += found.throttle
    return ", ".join(parts)
