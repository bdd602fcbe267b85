"""The command line: parse -> call -> print. No numbers are made here, and nothing imports torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.options import OPTIONS
from presets.errors import PlanError, RunError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from planner.history import History
    from planner.resolve import Options
    from presets.env import Settings
    from trainer.record import RunRecord

F = TypeVar("F", bound=Callable[..., Any])

EXAMPLES = """\b
Two lines to start with:
  plan --dataset messages.jsonl              compare all configurations, measured here
  plan --run recommended --dataset messages.jsonl     train the one you choose

\b
More:
  plan --dataset 63000                       no data yet: assumed lengths
  plan --dataset 63000 --step-time 30        the published table, nothing measured
  plan --model ./my-model --dataset data.csv --columns prompt=q,completion=a
  plan --resume runs/recommended-20260101-120000
"""


class _Group(click.Group):
    """A group whose options stand before its subcommands, and which says what an unknown word may have meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            from presets.schema import preset_names

            command = did_you_mean(args[0], self.list_commands(ctx))
            preset = did_you_mean(args[0], preset_names()).replace("'", "'--run ", 1) if not command else ""
            raise click.UsageError(f"no command '{args[0]}'.{command or preset} See 'plan --help'.", ctx)
        return super().resolve_command(ctx, args)


def _with_options(function: F) -> F:
    for _, names, settings in reversed(OPTIONS):
        function = click.option(*names, **settings)(function)
    return function


@click.group(
    cls=_Group,
    invoke_without_command=True,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@_with_options
@click.version_option(package_name="training-planner", prog_name="plan")
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> None:
    """How long will each training configuration take on this machine, does it fit, and which one to choose?

    Measures real seconds per step with the code that trains, prints the comparison, and trains the one you choose.
    """
    if ctx.invoked_subcommand is not None:
        return
    if given["run"] and given["resume"]:
        raise click.UsageError("--run and --resume do not go together: --resume goes on with a run that exists.")
    if given["resume"]:
        ctx.exit(_resume(given["resume"], given["accelerate_config"]))
    from planner.resolve import Options, option_fields
    from presets.env import read_settings

    settings = read_settings(Path.cwd(), os.environ)
    for warning in settings.warnings:
        _say(warning)
    options = Options(**{name: given[name] for name in option_fields() if name in given})
    if given["step_time"] is not None:
        _published(options, settings, given)
    elif given["run"]:
        ctx.exit(_run(options, settings, given))
    else:
        _table(options, settings, given)


def _published(options: Options, settings: Settings, given: dict[str, Any]) -> None:
    from planner.report import published_report, published_text
    from planner.resolve import presets_to_compare, resolve_count

    presets = presets_to_compare(settings, given["preset_names"])
    try:
        report = published_report(resolve_count(options, settings), given["step_time"], presets)
    except ValueError as reason:
        raise SettingsError(f"{reason}") from None
    click.echo(report.to_json(), nl=False) if given["as_json"] else click.echo(
        published_text(report, width=_width(), ascii_only=_ascii_only())
    )


def _table(options: Options, settings: Settings, given: dict[str, Any]) -> None:
    from planner.compare import compare, run_command
    from planner.report import measured_text

    measuring, names = _measuring(given), given["preset_names"]
    history = _history()
    comparison = compare(options, settings, measuring, names=names, say=_say, history=history, tuned=given["tuned"])
    if given["as_json"]:
        click.echo(comparison.report.to_json(), nl=False)
        return
    now = datetime.now().astimezone()
    click.echo(measured_text(comparison.report, now=now, width=_width(), ascii_only=_ascii_only()))
    if given["explain"]:
        from planner.explain import explain_text

        click.echo("\n" + explain_text(comparison, width=_width(), ascii_only=_ascii_only()))
    command = run_command(comparison, _same_options(given))
    if command:
        click.echo(f"\nStart the recommended one:\n  {command}")


def _measuring(given: dict[str, Any]) -> Any:
    from planner.candidates import MeasureSettings

    text = given["precision_target"].strip()
    try:
        target = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        target = -1.0
    if not 0 < target < 1:
        raise SettingsError(
            f"--precision-target is '{text}'; it must be a share above 0 and below 1, such as 2% or 0.02."
        )
    return MeasureSettings(
        budget_seconds=given["budget"], precision_target=target, fresh=given["fresh"], quantized=given["quantized"]
    )


def _history() -> History:
    from planner.history import History

    return History(say=_say)


def _same_options(given: dict[str, Any]) -> str:
    """The options of this call that a run needs too, as text; a count is left out, since a run needs messages."""
    skipped = {"run", "resume", "output", "as_json", "budget", "precision_target", "preset_names", "debug", "step_time"}
    skipped |= {"fresh", "explain", "quantized"}  # what was measured just now will do
    words = []
    for _, names, settings in OPTIONS:
        flag = names[0].split("/")[0]
        name = names[1] if len(names) > 1 else flag.removeprefix("--").replace("-", "_")
        value = given[name]
        if name in skipped or value in (None, False) or value == settings.get("default"):
            continue
        if name == "tokens_per_example" or (name == "dataset" and value.replace(",", "").isdigit()):
            continue
        words += [flag] if value is True else [flag, shlex.quote(str(value))]
    return "".join(f" {word}" for word in words)


def _run(options: Options, settings: Settings, given: dict[str, Any]) -> int:
    from dataclasses import replace

    from planner.compare import compare, predicted_of
    from planner.launch import (
        check_accelerate_config,
        check_output,
        command,
        make_run_folder,
        start,
        with_checkpoint_interval,
    )
    from planner.report import measured_text
    from planner.resolve import presets_to_compare

    _check_tracker(options.tracker)
    output = given["output"] or (Path(settings.output) if settings.output else None)
    check_output(output)
    if given["accelerate_config"] is not None:
        check_accelerate_config(given["accelerate_config"])  # before minutes are spent on measuring
    presets_to_compare(settings, (given["run"],))
    comparison = compare(
        options,
        settings,
        _measuring(given),
        names=(given["run"],),
        running=True,
        say=_say,
        history=_history(),
        tuned=given["tuned"],
    )
    candidate = comparison.candidates[0]
    if candidate.planned is None:
        raise RunError(candidate.error or "this configuration cannot be planned.")
    found = comparison.estimates[candidate.name]
    now = datetime.now().astimezone()
    if not given["as_json"]:
        click.echo(measured_text(comparison.report, now=now, width=_width(), ascii_only=_ascii_only()))
    if found.fits is False:
        raise RunError(f"'{given['run']}' does not fit on this device: {found.error or 'out of memory'}.")
    job = with_checkpoint_interval(candidate.planned.job, found.num_steps, found.seconds_per_step)
    folder = make_run_folder(output, replace(job), candidate.planned.plan, predicted_of(comparison, candidate), now)
    _say(f"run folder: {folder}")
    code = start(command(folder, job, accelerate_config=given["accelerate_config"]))
    return _ended(folder, code, as_json=given["as_json"])


def _resume(folder: Path, accelerate_config: Path | None) -> int:
    from planner.launch import command, open_run, read_record, start

    job = open_run(folder)
    record = read_record(folder)
    if record is not None and record.status == "finished":
        _remember(record, folder)  # where this program was ended before the trainer was
        _say(f"'{folder}' is finished: there is nothing to resume.")
        return 0
    _check_tracker(job.tracker)
    return _ended(folder, start(command(folder.absolute(), job, resume=True, accelerate_config=accelerate_config)))


def _check_tracker(name: str | None) -> None:
    """Before minutes are spent on measuring: a tracker that is not installed is a wrong value of its option."""
    if name is None:
        return
    from trainer.trackers import check_tracker

    try:
        check_tracker(name)
    except SettingsError as reason:
        raise click.UsageError(f"--tracker: {reason}") from None


def _ended(folder: Path, code: int, *, as_json: bool = False) -> int:
    from planner.launch import read_record
    from planner.outcome import outcome_text

    record = read_record(folder)
    if record is not None:
        _remember(record, folder)
    if record is not None and record.status == "finished":
        click.echo((folder / "record.json").read_text(encoding="utf-8") if as_json else outcome_text(record, folder))
    elif code not in (0, 1, 130, 143):
        _say(
            f"Error: the trainer ended with code {code}. Its log: {folder / 'train.log'}. "
            f"Go on with: plan --resume {folder}"
        )
        return 1
    return code


def _remember(record: RunRecord, folder: Path) -> None:
    """The run in the history, as of when its record was written: told twice, it is the same entry."""
    from planner.history import PastRun

    ended_at = datetime.fromtimestamp((folder / "record.json").stat().st_mtime).astimezone()
    _history().add_run(PastRun.of(record, folder, ended_at))


@cli.command()
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, metavar="N", help="The newest N.")
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

    if accuracy:
        found = past.accuracy(_history().runs())
        click.echo(past.accuracy_json(found) if as_json else past.accuracy_text(found))
        return
    runs = _history().runs(limit)
    click.echo(past.runs_json(runs) if as_json else past.runs_text(runs, datetime.now().astimezone()))


@cli.command("tune")
@click.argument("names", nargs=-1, metavar="[PRESET]...")
@_with_options
def tune_command(names: tuple[str, ...], **given: Any) -> None:
    """Find the fastest way to train on the same batches: split, packing, loss, attention, threads.

    Takes about three times --budget. What it finds is kept: plan shows the tuned twins from then on, and
    plan --run PRESET --tuned runs one. Every change leaves the gradient of a step as it is, up to rounding.

    \b
    Examples:
      plan tune --dataset messages.jsonl
      plan tune recommended --dataset messages.jsonl --budget 120
    """
    refused = [flag for flag in ("run", "resume", "output", "step_time") if given[flag]]
    if refused:
        raise click.UsageError(f"--{refused[0].replace('_', '-')} does not go with 'plan tune'.")
    from planner.resolve import Options, option_fields
    from presets.env import read_settings

    settings = read_settings(Path.cwd(), os.environ)
    for warning in settings.warnings:
        _say(warning)
    options = Options(**{name: given[name] for name in option_fields() if name in given})
    given["preset_names"] = (*names, *given["preset_names"])
    if given["preset_names"] and "baseline" not in given["preset_names"]:
        given["preset_names"] = ("baseline", *given["preset_names"])
    given |= {"tuned": True, "explain": True}
    _table(options, settings, given)


@cli.group()
def presets() -> None:
    """What can be run: list the presets, or show one.

    \b
    Examples:
      plan presets list
      plan presets show aggressive
    """


@presets.command("list")
def presets_list() -> None:
    """One line per preset."""
    from presets.schema import load_preset, preset_names

    for name in preset_names():
        click.echo(f"{name:<12} {load_preset(name).summary}")


@presets.command("show")
@click.argument("name")
def presets_show(name: str) -> None:
    """The preset's own file."""
    from importlib import resources

    from presets.schema import load_preset

    load_preset(name)
    click.echo((resources.files("presets") / f"{name}.toml").read_text(encoding="utf-8"), nl=False)


RUN = click.argument("run", type=click.Path(path_type=Path))


@cli.command()
@RUN
def check(run: Path) -> None:
    """Check the quality of a finished RUN: held-out loss and sample answers, before and after.

    \b
    Example:
      plan check runs/recommended-20260101-120000
    """
    from planner.launch import open_run
    from planner.outcome import check_text

    job = open_run(run)
    from trainer.finished import check as check_run

    click.echo(check_text(check_run(run), job))


@cli.command()
@RUN
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", help="The merged model [RUN/merged].")
def merge(run: Path, output: Path | None) -> None:
    """Write the base model and the adapter of a finished RUN as one model (safetensors).

    \b
    Example:
      plan merge runs/recommended-20260101-120000 --output my-model
    """
    from planner.launch import open_run

    open_run(run)
    from trainer.finished import merge as merge_run

    click.echo(f"merged model: {merge_run(run, output or run / 'merged')}")


@cli.command()
@RUN
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, metavar="N")
@click.option(
    "--temperature", type=click.FloatRange(min=0, max=10), default=0.0, show_default=True, help="0: the likeliest word."
)
@click.option("--system", metavar="TEXT", help="A system message to start with.")
def chat(run: Path, max_new_tokens: int, temperature: float, system: str | None) -> None:
    """Talk to the result of a finished RUN in the terminal. An empty line or Ctrl-D ends it.

    \b
    Example:
      plan chat runs/recommended-20260101-120000
    """
    from planner.launch import open_run
    from planner.report import printable

    open_run(run)
    from trainer.finished import open_finished, reply

    finished = open_finished(run)
    messages = [("system", system)] if system else []
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
            click.echo("\n".join(printable(part) for part in piece.split("\n")), nl=False)
        click.echo()
        messages.append(("assistant", "".join(pieces).strip() or "..."))


def _say(text: str) -> None:
    """Progress and warnings, on stderr, free of control sequences."""
    from planner.report import printable

    click.echo(printable(text), err=True)


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _ascii_only() -> bool:
    try:
        "┌–".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def main() -> None:
    """Entry point `plan`: the one place where errors become exit codes."""
    from trainer.process import quiet_waiting

    quiet_waiting()
    debug = "--debug" in sys.argv
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except click.ClickException as reason:
        reason.show()
        code = reason.exit_code
    except PlanError as reason:
        if debug:
            raise
        lines = str(reason).splitlines() or [type(reason).__name__]
        for line in lines:
            _say(f"Error: {line}")
        code = 1
    except BrokenPipeError:
        # The reader (head, say) has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as reason:
        if debug:
            raise
        _say(f"Error: {type(reason).__name__}: {reason}. This is a defect of plan itself; --debug shows where.")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
