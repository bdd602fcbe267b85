"""`plan history`, `check`, `merge`, `chat`: what can be asked of runs that were. Parse -> call -> print."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import click

from planner.options import Number, Valued
from planner.terminal import open_history, open_trusted, out, out_json, say, width
from presets.rules import MOST_TOKENS


@click.command(short_help="Past runs: predicted beside actual.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=20, show_default=True, metavar="N", help="The newest N."
)
@click.option("--accuracy", is_flag=True, help="How far all predictions were off, and how often the range held.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def history(limit: int, accuracy: bool, as_json: bool) -> None:
    """Past runs on this machine, newest first: predicted beside actual.

    \b
    Examples:
      plan history
      plan history --accuracy
    """
    from planner import past
    from planner.remember import as_they_stand

    if accuracy:
        found = past.accuracy(as_they_stand(open_history(say).runs()))
        out_json(past.accuracy_json(found)) if as_json else out(past.accuracy_text(found))
        return
    runs = as_they_stand(open_history(say).runs(limit))
    out_json(past.runs_json(runs)) if as_json else out(past.runs_text(runs, datetime.now().astimezone(), width=width()))


@click.command(short_help="Watch a run from another terminal.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Say how it stands and leave.")
def watch(run: Path, once: bool) -> None:
    """Watch a RUN from another terminal, also after a lost connection. Ctrl-C ends the watching, not the run.

    \b
    Examples:
      plan watch runs/recommended-20260101-120000
      plan watch runs/recommended-20260101-120000 --once
    """
    import contextlib

    from planner.watch import watch as watch_run

    with contextlib.suppress(KeyboardInterrupt):
        watch_run(run, once=once)


@click.command(short_help="One HTML page about a run.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output", cls=Valued, type=click.Path(path_type=Path), metavar="FILE", help="The page [RUN/report.html]."
)
def report(run: Path, output: Path | None) -> None:
    """Write one HTML page about a RUN: predicted and actual, curves, where the time went, settings.

    \b
    Example:
      plan report runs/recommended-20260101-120000
    """
    from planner.run_report import write_report

    out(f"report: {write_report(run, output)}")


RUN = click.argument("run", type=click.Path(path_type=Path))
TRUST = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")


@click.command(short_help="Quality before and after a run.")
@RUN
@TRUST
def check(run: Path, trust_remote_code: bool) -> None:
    """Check the quality of a finished RUN: held-out loss and sample answers, before and after.

    \b
    Example:
      plan check runs/recommended-20260101-120000
    """
    from planner.outcome import check_text

    job = open_trusted(run, trusted=trust_remote_code)
    from trainer.batching import BatchPlan
    from trainer.finished import check as check_run

    out(check_text(check_run(run), job, num_steps=BatchPlan.load(run / "batch_plan.npz").num_steps))


@click.command(short_help="Base model and adapter as one model.")
@RUN
@TRUST
@click.option(
    "--output", cls=Valued, type=click.Path(path_type=Path), metavar="FOLDER", help="The merged model [RUN/merged]."
)
def merge(run: Path, trust_remote_code: bool, output: Path | None) -> None:
    """Write the base model and the adapter of a finished RUN as one model (safetensors).

    \b
    Example:
      plan merge runs/recommended-20260101-120000 --output my-model
    """
    open_trusted(run, trusted=trust_remote_code)
    from trainer.finished import merge as merge_run

    out(f"merged model: {merge_run(run, output or run / 'merged')}")


@click.command(short_help="Talk to the result of a run.")
@RUN
@TRUST
@click.option("--max-new-tokens", type=click.IntRange(1, MOST_TOKENS), default=256, show_default=True, metavar="N")
@click.option(
    "--temperature", type=Number(min=0, max=10), default=0.0, show_default=True, help="0: the likeliest word."
)
@click.option("--system", cls=Valued, metavar="TEXT", help="A system message to start with.")
def chat(run: Path, trust_remote_code: bool, max_new_tokens: int, temperature: float, system: str | None) -> None:
    """Talk to the result of a finished RUN in the terminal. An empty line or Ctrl-D ends it.

    \b
    Example:
      plan chat runs/recommended-20260101-120000
    """
    open_trusted(run, trusted=trust_remote_code)
    from trainer.finished import open_finished, reply

    finished = open_finished(run)
    messages = [("system", system)] if system else []
    say("An empty line or Ctrl-D ends it.")
    while True:
        click.echo("you> ", nl=False)
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append(("user", line))
        click.echo("model> ", nl=False)
        pieces = []
        for piece in reply(finished, messages, max_new_tokens=max_new_tokens, temperature=temperature):
            pieces.append(piece)
            # A model may write anything; only text and line ends reach the terminal.
            out(piece, nl=False)
        click.echo()
        messages.append(("assistant", "".join(pieces).strip() or "..."))
