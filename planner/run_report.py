"""`plan report RUN`: one page about a run that needs nothing else. Charts by matplotlib, as SVG inside the page."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from planner.figures import DOUBT, UNKNOWN, duration, gib, promised_range
from planner.formats import bullets, definitions, document, escaped
from planner.run_view import RunView, look_at
from presets import jsonio
from presets.errors import RunError

# Grey is readable on white and on black; the page's own colours cannot reach into the drawing.
AXES, LINE, SOFT, MARK = "#7d8590", "#2f81f7", "#9ec5fe", "#e8790a"
NO_ANSWER = "(an empty answer)"
NO_CHARTS = "Charts need matplotlib: pip install matplotlib."


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run folder, finished or not; returns its path, RUN/report.html where none is given.

    Raises:
        RunError: it is not a run folder, or the page cannot be written, or would be written over something else.
    """
    path = output or folder / "report.html"
    if output is not None and os.path.exists(output) and not (os.path.isfile(output) or os.path.isdir(output)):
        # A pipe or a device: reading from it, to see what it is, could wait for ever.
        raise RunError(f"'{output}' is no file that a page can be written to. Choose another --output.")
    if output is not None and _is_something_else(output):
        raise RunError(f"'{output}' exists and is no report of a run. Choose another --output, or remove it first.")
    text = run_page(look_at(folder), now=datetime.now().astimezone())
    try:
        jsonio.write_atomically(path, text)
    except OSError as reason:
        raise RunError(f"'{path}' cannot be written ({reason.strerror or reason}). Choose another --output.") from None
    return path


def _is_something_else(path: Path) -> bool:
    """Whether a file is there that is neither empty nor an earlier page, as where data is named by a slip."""
    try:
        with open(path, "rb") as file:
            begin = file.read(4096)
    except PermissionError:  # it cannot be told, but it could be replaced
        return path.is_file()
    except OSError:  # not there, or a folder: writing says what is wrong
        return False
    return bool(begin) and not (begin.startswith(b"<!doctype html>") and b"<title>Run " in begin)


def run_page(view: RunView, *, now: datetime) -> str:
    """The page: what was promised and what happened, curves, where the time went, settings, versions."""
    record = view.record
    body = [
        f"<h1>{escaped(view.job.name)}</h1>",
        f'<p class="dim">{escaped(view.folder.name)}: {view.state}, seen {now:%Y-%m-%d %H:%M}</p>',
        "<h2>Predicted and actual</h2>",
        _outcome_table(view),
    ]
    if importlib.util.find_spec("matplotlib") is None:
        body.append(f"<p>{escaped(NO_CHARTS)}</p>")
    else:
        body += [f"<h2>{title}</h2><figure>{chart}</figure>" for title, chart in _charts(view)]
    if record is not None and record.actual.breakdown is not None:
        body += ["<h2>Where the time went</h2>", _breakdown_table(view)]
    body += _answers(view.folder)
    body += ["<h2>Settings</h2>", definitions(_settings(view))]
    if record is not None:
        body += ["<h2>Versions</h2>", definitions(sorted(record.versions.items()))]
        if record.notes or record.error:
            body += ["<h2>Notes</h2>", bullets((*([record.error] if record.error else []), *record.notes))]
    return document(f"Run {view.folder.name}", body)


def _outcome_table(view: RunView) -> str:
    predicted, actual = view.predicted, view.record.actual if view.record is not None else None
    span = promised_range(predicted.seconds_low, predicted.seconds_high, predicted.calibrated)
    rows = [
        ("whole run", duration(predicted.seconds), span, duration(actual.seconds) if actual else UNKNOWN),
        ("training loop", duration(predicted.train_seconds), "", duration(actual.train_seconds) if actual else UNKNOWN),
        ("peak memory", gib(predicted.peak_memory_bytes), "", gib(actual.peak_memory_bytes) if actual else UNKNOWN),
    ]
    table = _table(("", "predicted", "range", "actual"), rows)
    if span.endswith("?"):
        table += f"<p>{escaped(DOUBT)}.</p>"
    if actual is None or not actual.eval_loss_before or actual.eval_loss_after is None:
        return table
    change = actual.eval_loss_after / actual.eval_loss_before - 1
    return f"{table}<p>Held-out loss {actual.eval_loss_before:.4f} → {actual.eval_loss_after:.4f} ({change:+.0%}).</p>"


def _breakdown_table(view: RunView) -> str:
    assert view.record is not None
    parts = view.record.actual.breakdown
    assert parts is not None
    plain = _merged(jsonio.to_plain(parts))
    promised = None if view.predicted.parts is None else _merged(jsonio.to_plain(view.predicted.parts))
    total = sum(plain.values()) or 1.0
    rows = [
        (
            name,
            UNKNOWN if promised is None else duration(promised[name]),
            duration(seconds),
            f"{seconds / total:.1%}",
        )
        for name, seconds in plain.items()
        if seconds > 0
    ]
    return _table(("part", "predicted", "actual", "share"), rows)


def _answers(folder: Path) -> list[str]:
    """Sample answers on held-out examples, before training and, where the run got so far, after it."""
    before, after = (_samples(folder / f"samples-{when}.json") for when in ("before", "after"))
    if not before:
        return []
    later = {one["example"]: one["answer"] for one in after}
    found = ["<h2>Sample answers</h2>"]
    for one in before:
        said = [("prompt", one["prompt"]), ("before", one["answer"]), ("after", later.get(one["example"]))]
        facts = definitions(
            [
                (name, None if text is None else text.strip() or NO_ANSWER)
                for name, text in (*said, ("expected", one["expected"]))
            ]
        )
        found.append(f'<h3>Example {escaped(one["example"])}</h3><div class="said">{facts}</div>')
    return found


def _samples(path: Path) -> list[dict[str, str]]:
    """Its answers, every field a text; none where there is no such file, or it is not one of ours."""
    try:
        found = jsonio.loads(path.read_text(encoding="utf-8"))
        return [{name: str(one[name]) for name in ("example", "prompt", "answer", "expected")} for one in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _merged(parts: dict[str, float]) -> dict[str, float]:
    """Start and loading as one: what is imported when differs a little between the probe and the run."""
    merged = {"start and load": parts["start"] + parts["load"]}
    return merged | {name: seconds for name, seconds in parts.items() if name not in ("start", "load")}


def _settings(view: RunView) -> list[tuple[str, str | None]]:
    job, preset = view.job, view.job.preset
    rates = [phase.learning_rate for phase in preset.phases] or [preset.learning_rate]
    return [
        ("model", job.model),
        ("data", job.data.source),
        (
            "micro-batch x accumulation",
            f"{job.micro_batch_size} x {'/'.join(map(str, job.gradient_accumulation_steps))}",
        ),
        ("global batch", "/".join(map(str, job.global_batch_sizes))),
        ("learning rate", "/".join(f"{rate:g}" for rate in rates)),
        ("epochs", f"{preset.num_epochs:g}"),
        ("adapter", f"{preset.adapter}, rank {preset.lora_rank}" if preset.adapter == "lora" else preset.adapter),
        ("precision", f"{job.precision}, base in {job.base_precision}"),
        ("maximum length", f"{preset.max_length:,} tokens"),
        ("packing", f"rows of {job.packed_length or preset.max_length:,} tokens" if job.packing else "none"),
        ("loss", job.loss),
        ("attention", preset.attention),
        ("gradient checkpointing", "yes" if preset.gradient_checkpointing else "no"),
        ("device", f"{job.num_devices} x {job.device}"),
        ("seed", str(job.seed)),
    ]


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escaped(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# --- charts -----------------------------------------------------------------------------------------------------------


def _charts(view: RunView) -> list[tuple[str, str]]:
    """(title, SVG) of each chart that there is something to draw for."""
    steps = [int(one["step"]) for one in view.steps]
    if not steps:
        return []
    found = [("Loss", _draw(lambda axes: _loss(axes, view)))]
    seconds = [float(one.get("seconds") or 0.0) for one in view.steps]
    planned = [one.get("planned_seconds") for one in view.steps]
    if all(isinstance(one, (int, float)) for one in planned):
        hours = [value / 60 for value in itertools.accumulate(seconds)]
        promised = [value / 60 for value in itertools.accumulate(float(one or 0.0) for one in planned)]

        def time(axes: Any) -> None:
            axes.plot(steps, promised, color=MARK, linestyle="--", label="predicted")
            axes.plot(steps, hours, color=LINE, label="actual")
            axes.set_ylabel("minutes of training")

        found.append(("Time: predicted and actual", _draw(time)))
    memory = [one.get("memory_bytes") for one in view.steps]
    if all(isinstance(one, (int, float)) for one in memory):

        def held(axes: Any) -> None:
            axes.plot(steps, [float(one or 0.0) / 1024**3 for one in memory], color=LINE, label="held")
            if view.predicted.peak_memory_bytes is not None:
                peak = view.predicted.peak_memory_bytes / 1024**3
                axes.axhline(peak, color=MARK, linestyle="--", label="predicted peak")
            axes.set_ylim(bottom=0)
            axes.set_ylabel("GiB")

        found.append(("Memory", _draw(held)))
    return found


def _loss(axes: Any, view: RunView) -> None:
    known = [(int(one["step"]), float(one["loss"])) for one in view.steps if isinstance(one.get("loss"), (int, float))]
    steps, losses = [step for step, _ in known], [loss for _, loss in known]
    window = max(1, len(losses) // 50)
    if window > 1:
        axes.plot(steps, losses, color=SOFT, linewidth=0.8, label="each step")
        totals = list(itertools.accumulate(losses, initial=0.0))
        smooth = [
            (totals[place + 1] - totals[max(0, place + 1 - window)]) / (place + 1 - max(0, place + 1 - window))
            for place in range(len(losses))
        ]
        axes.plot(steps, smooth, color=LINE, label=f"mean of {window} steps")
    else:
        axes.plot(steps, losses, color=LINE, label="each step")
    if view.evaluations:
        axes.plot(*zip(*view.evaluations, strict=True), color=MARK, marker="o", markersize=4, label="held-out")
    axes.set_ylabel("loss")


def _draw(fill: Any) -> str:
    import matplotlib

    matplotlib.use("svg")  # draws into a file, wherever this runs
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan", "font.size": 11}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        fill(axes)
        for line in axes.get_lines():
            if len(line.get_path()) == 1:  # a line of one point is nothing
                line.set_marker("o")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(AXES)
        axes.tick_params(colors=AXES)
        axes.xaxis.label.set_color(AXES)
        axes.yaxis.label.set_color(AXES)
        legend = axes.legend(frameon=False)
        for text in legend.get_texts():
            text.set_color(AXES)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # The drawing's own size gives way to the page's width.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
