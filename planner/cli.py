"""The command line: parse -> call -> print. No numbers are made here, and nothing imports torch."""

from __future__ import annotations

import os
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.commands_choice import advise, doctor, presets
from planner.commands_runs import chat, check, history, merge, report, watch
from planner.options import BriefHelp, measure_settings, same_options, with_options
from planner.terminal import (
    ascii_only,
    measuring_bar,
    open_history,
    open_trusted,
    out,
    out_json,
    say,
    settings_of,
    width,
)
from presets import jsonio
from presets.errors import OptionError, PlanError, RunError, SettingsError, did_you_mean

if TYPE_CHECKING:
    from planner.candidates import Candidate
    from planner.hardware import DeviceFacts
    from planner.report import PlanReport
    from planner.resolve import Options
    from presets.env import Settings
    from trainer.job import Job
    from trainer.record import RunRecord

EXAMPLES = """\b
More:
  plan --dataset 63000                              no data yet: assumed lengths
  plan --dataset 63000 --step-time 30               the published table, nothing measured
  plan advise --deadline "tomorrow 09:00" --dataset messages.jsonl
  plan --model ./my-model --dataset data.csv --columns prompt=q,completion=a
"""


class _Group(BriefHelp, click.Group):
    """A group whose options stand before its subcommands, and which says what an unknown word may have meant."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            from presets.user import all_names

            command = did_you_mean(args[0], self.list_commands(ctx))
            if args[0] in ("run", "resume"):
                command = f" Did you mean '--{args[0]}'?"
            preset = did_you_mean(args[0], all_names()).replace("'", "'--run ", 1) if not command else ""
            raise click.UsageError(f"no command '{args[0]}'.{command or preset} See 'plan --help'.", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@with_options
@click.version_option(package_name="training-planner", prog_name="plan")
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> None:
    """
    \b
    plan --dataset messages.jsonl                     compare all configurations, measured here
    plan --run recommended --dataset messages.jsonl   train the one you choose

    How long each training configuration takes on this machine, whether it fits, and which one to choose: measured in
    real seconds per step, with the code that trains.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options_before(ctx)
        return
    if given["run"] and given["resume"]:
        raise click.UsageError("--run and --resume do not go together: --resume goes on with a run that exists.")
    if given["dry_run"] and not given["run"]:
        raise click.UsageError("--dry-run goes with --run PRESET.")
    if given["run"] and given["output_format"] not in ("table", "json"):
        raise click.UsageError("--format is for the table; a run prints its result as text, or with --json.")
    if given["as_json"] and given["output_format"] not in ("table", "json"):
        raise click.UsageError(f"--json does not go with --format {given['output_format']}.")
    if given["run"] and given["step_time"] is not None:
        raise click.UsageError("--step-time is for the published table; leave it out to train with --run.")
    if given["run"] and given["preset_names"]:
        raise click.UsageError("--preset is for the table; --run takes the one configuration that it names.")
    if given["resume"]:
        _refuse_options_beside_resume(ctx)
        trusted, as_json = given["trust_remote_code"], given["as_json"]
        ctx.exit(_resume(given["resume"], given["accelerate_config"], trusted=trusted, as_json=as_json))
    from planner.resolve import Options, option_fields

    options = Options(**{name: given[name] for name in option_fields() if name in given})
    named = (*((given["run"],) if given["run"] else ()), *given["preset_names"])
    settings = settings_of(options, named, running=bool(given["run"]))
    if given["step_time"] is not None:
        _published(options, settings, given)
    elif given["run"]:
        ctx.exit(_run(options, settings, given))
    else:
        _table(options, settings, given)


def _typed(ctx: click.Context, *without: str) -> str | None:
    """The first option that stands on the command line, other than these."""
    from click.core import ParameterSource

    for one in ctx.command.params:
        name = one.name or ""
        if name not in without and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            return one.opts[0]
    return None


def _refuse_options_beside_resume(ctx: click.Context) -> None:
    """A run goes on as its job.json says; another learning rate would be dropped without a word."""
    flag = _typed(ctx, "resume", "accelerate_config", "trust_remote_code", "as_json", "debug")
    if flag:
        raise click.UsageError(
            f"{flag} does not go with --resume: a run goes on as it was started. For other settings start another run."
        )


def _refuse_options_before(ctx: click.Context) -> None:
    """An option before a command's name would be dropped without a word."""
    flag = _typed(ctx, "debug")
    if flag:
        raise click.UsageError(
            f"{flag} stands before '{ctx.invoked_subcommand}'. Options of a command come after its name.", ctx
        )


def _published(options: Options, settings: Settings, given: dict[str, Any]) -> None:
    from planner.report import published_report
    from planner.resolve import presets_to_compare, resolve_count
    from planner.table import published_text

    presets = presets_to_compare(settings, given["preset_names"], say)
    try:
        found = published_report(resolve_count(options, settings), given["step_time"], presets)
    except ValueError as reason:
        raise SettingsError(f"{reason}") from None
    if _printed_as(found, given):
        return
    out(published_text(found, width=width(), ascii_only=ascii_only()))


def _printed_as(report: PlanReport, given: dict[str, Any]) -> bool:
    """Whether another form than the terminal's table was asked for, and is printed now."""
    kind = "json" if given["as_json"] else given["output_format"]
    if kind == "table":
        return False
    from planner.formats import as_text

    text = as_text(report, kind, now=datetime.now().astimezone())
    out_json(text) if kind == "json" else out(text, nl=False)
    return True


def _table(
    options: Options, settings: Settings, given: dict[str, Any], *, unsearched: frozenset[str] = frozenset()
) -> None:
    from planner.compare import compare, run_command
    from planner.table import measured_text

    measuring, names = measure_settings(given), given["preset_names"]
    history = open_history(say)
    comparison = compare(
        options,
        settings,
        measuring,
        names=names,
        say=say,
        shown=measuring_bar,
        history=history,
        tuned=given["tuned"],
        output=given["output"],
        unsearched=unsearched,
    )
    if _printed_as(comparison.report, given):
        return
    now = datetime.now().astimezone()
    out(measured_text(comparison.report, now=now, width=width(), ascii_only=ascii_only(), brief=not given["explain"]))
    if given["explain"]:
        from planner.explain import explain_text

        out("\n" + explain_text(comparison, width=width(), ascii_only=ascii_only()))
    command = run_command(comparison, same_options(given | {"tuned": False}), tuned=given["tuned"])
    if command:
        out(f"\nStart it:\n  {command}")


def _run(options: Options, settings: Settings, given: dict[str, Any]) -> int:
    from dataclasses import replace

    from planner.compare import compare, predicted_of
    from planner.launch import (
        check_accelerate_config,
        check_output,
        command,
        make_run_folder,
        start,
    )
    from planner.remember import begun
    from planner.resolve import presets_to_compare
    from planner.room import require_room_for
    from planner.table import measured_text

    _check_tracker(options.tracker)
    output = given["output"] or (Path(settings.output) if settings.output else None)
    check_output(output)
    if given["accelerate_config"] is not None:
        check_accelerate_config(given["accelerate_config"])  # before minutes are spent on measuring
    presets_to_compare(settings, (given["run"],))
    if given["dry_run"]:
        _dry_run(options, settings, given, output)
        return 0

    def check_room(found: tuple[Candidate, ...]) -> None:
        for one in found:
            if one.planned is not None:
                require_room_for(one.planned.job, output or Path("runs"))

    comparison = compare(
        options,
        settings,
        measure_settings(given),
        names=(given["run"],),
        running=True,
        say=say,
        shown=measuring_bar,
        history=open_history(say),
        tuned=given["tuned"],
        force=given["force"],
        before_measuring=check_room,
        output=output,
    )
    candidate = comparison.candidates[0]
    if candidate.planned is None:
        raise RunError(candidate.error or "this configuration cannot be planned.")
    found = comparison.estimates[candidate.name]
    now = datetime.now().astimezone()
    if not given["as_json"]:
        out(
            measured_text(
                comparison.report, now=now, width=width(), ascii_only=ascii_only(), brief=not given["explain"]
            )
        )
    if found.fits is False:
        raise RunError(f"'{given['run']}' does not fit on this device: {found.error or 'out of memory'}.")
    job = replace(candidate.planned.job, checkpoint_every=found.checkpoint_every)  # as often as the estimate counts it
    require_room_for(job, output or Path("runs"), comparison.report.model.num_trainable_parameters)
    folder = make_run_folder(output, job, candidate.planned.plan, predicted_of(comparison, candidate), now)
    say(f"run folder: {folder}")
    begun(folder, job)
    code = start(command(folder, job, accelerate_config=given["accelerate_config"]))
    return _ended(folder, job, code, as_json=given["as_json"])


def _dry_run(options: Options, settings: Settings, given: dict[str, Any], output: Path | None) -> None:
    """What `--run` would start: its command on stdout, remarks on stderr. Nothing is measured or written."""
    from planner.compare import prepare
    from planner.hardware import detect_device
    from planner.launch import command, run_folder_name
    from trainer.planning import with_checkpoint_interval

    facts = detect_device(options.device)
    force, name = given["force"], given["run"]
    _, _, candidates = prepare(options, settings, facts, names=(name,), running=True, say=say, force=force)
    candidate = candidates[0]
    if candidate.planned is None or candidate.data is None:
        raise RunError(candidate.error or "this configuration cannot be planned.")
    if given["tuned"]:
        candidate = _known_twin(candidate, facts, quantized=given["quantized"])
    assert candidate.planned is not None
    job, plan = (
        with_checkpoint_interval(candidate.planned.job, candidate.planned.plan.num_steps, None),
        candidate.planned.plan,
    )
    folder = run_folder_name(output, job, datetime.now().astimezone())
    for note in candidate.notes:
        say(f"note: {note}")
    rates = [phase.learning_rate for phase in job.preset.phases] or [job.preset.learning_rate]
    accumulation = "/".join(map(str, job.gradient_accumulation_steps))
    say(f"run folder: {folder}")
    say(
        f"micro {job.micro_batch_size} x GA {accumulation}{', packed' if job.packing else ''}, learning rate "
        f"{'/'.join(f'{rate:g}' for rate in rates)}, {job.preset.num_epochs:g} epoch(s), "
        f"{job.precision} on {job.device}"
    )
    say(f"{plan.num_steps:,} optimizer steps, {plan.num_examples:,} examples seen; nothing was measured or written")
    say("what --run would start, once it has made the run folder:")
    if given["as_json"]:
        out_json(job.to_json())
        return
    out(shlex.join(command(folder, job, accelerate_config=given["accelerate_config"], dry=True)))


def _known_twin(candidate: Candidate, facts: DeviceFacts, *, quantized: bool) -> Candidate:
    """The tuned twin of a configuration where the history has it; else itself, and a word about it."""
    from planner.candidates import twin_candidate
    from planner.keys import Keys
    from planner.twins import known_twin

    assert candidate.planned is not None
    assert candidate.data is not None
    twin = known_twin(open_history(say), Keys(facts), candidate.planned.job, candidate.data, quantized=quantized)
    found = None if twin is None else twin_candidate(candidate, twin) if twin.changes else candidate
    if found is None:
        say("note: no tuned twin is known yet: --run would search for it first; shown is the configuration as written")
    return found or candidate


def _resume(folder: Path, accelerate_config: Path | None, *, trusted: bool, as_json: bool) -> int:
    from planner.launch import command, open_to_write, start
    from planner.remember import begun, remember

    open_trusted(folder, trusted=trusted)
    record = _record_of(folder, "It is written anew.")  # the run needs none to go on; it writes its own
    if record is not None and record.status == "finished":
        remember(record, folder)  # where this program was ended before the trainer was
        say(f"'{folder}' is finished: there is nothing to resume.")
        return 0
    job = open_to_write(folder)
    _check_tracker(job.tracker)
    begun(folder, job)
    code = start(command(folder.absolute(), job, resume=True, accelerate_config=accelerate_config))
    return _ended(folder, job, code, as_json=as_json)


def _record_of(folder: Path, what_then: str) -> RunRecord | None:
    """The record of a run; None where there is none, or it is damaged, which is said."""
    from planner.launch import read_record

    try:
        return read_record(folder)
    except RunError as reason:
        say(f"note: {reason} {what_then}")
        return None


def _check_tracker(name: str | None) -> None:
    """Before minutes are spent on measuring: a tracker that is not installed is a wrong value of its option."""
    if name is None:
        return
    from trainer.trackers import check_tracker

    try:
        check_tracker(name)
    except SettingsError as reason:
        raise click.UsageError(f"--tracker: {reason}") from None


def _ended(folder: Path, job: Job, code: int, *, as_json: bool = False) -> int:
    from planner.outcome import outcome_text
    from planner.remember import STOPPED, ended

    record = _record_of(folder, f"It is written anew by: plan --resume {shlex.quote(str(folder))}.")
    ended(folder, job, record, code)
    if record is not None and record.status == "finished":
        out_json(jsonio.to_json(record)) if as_json else out(outcome_text(record, folder))
    elif code not in (0, 1, *STOPPED):
        say(
            f"Error: the trainer ended with code {code}. Its log: {folder / 'train.log'}. "
            f"Go on with: plan --resume {shlex.quote(str(folder))}"
        )
        return 1
    return code


@cli.command("tune", cls=BriefHelp, short_help="Find the fastest way to train on the same batches.")
@click.argument("names", nargs=-1, metavar="[PRESET]...")
@with_options
def tune_command(names: tuple[str, ...], **given: Any) -> None:
    """Find the fastest way to train on the same batches: split, packing, loss, attention, threads.

    Times for about three times --budget, and loads the model about a dozen times on top. What it finds is kept: plan
    shows the tuned twins from then on, and plan --run PRESET --tuned runs one. Every change leaves the gradient of a
    step as it is, up to rounding. An interrupted search goes on when the same command is given again within a day.

    \b
    Examples:
      plan tune --dataset messages.jsonl
      plan tune recommended --dataset messages.jsonl --budget 120
    """
    refused = [flag for flag in ("run", "resume", "output", "step_time", "dry_run", "force") if given[flag]]
    if refused:
        raise click.UsageError(f"--{refused[0].replace('_', '-')} does not go with 'plan tune'.")
    from planner.resolve import Options, option_fields

    options = Options(**{name: given[name] for name in option_fields() if name in given})
    settings = settings_of(options, (*names, *given["preset_names"]))
    given["preset_names"] = (*names, *given["preset_names"])
    added: tuple[str, ...] = ()
    if given["preset_names"] and "baseline" not in given["preset_names"]:
        added = ("baseline",)  # to compare with; in another precision its own search would take half of the time
    given["preset_names"] = (*added, *given["preset_names"])
    given |= {"tuned": True, "explain": True}
    _table(options, settings, given, unsearched=frozenset(added))


for _command in (history, check, merge, chat, watch, report, presets, advise, doctor):
    cli.add_command(_command)


def _show(reason: click.ClickException) -> None:
    """As click shows it, but free of control sequences: a file's name is repeated in it."""
    context = getattr(reason, "ctx", None)
    if context is not None:
        say(context.get_usage())
        say(f"Try '{context.command_path} {context.help_option_names[0]}' for help.\n".rstrip())
        say("")
    for line in reason.format_message().splitlines():
        say(f"Error: {line}")


def main() -> None:
    """Entry point `plan`: the one place where errors become exit codes."""
    from trainer.process import quiet_waiting

    quiet_waiting()
    debug = "--debug" in sys.argv
    try:
        code = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        say("interrupted")
        code = 130
    except click.ClickException as reason:
        _show(reason)
        code = reason.exit_code
    except PlanError as reason:
        if debug:
            raise
        lines = str(reason).splitlines() or [type(reason).__name__]
        for line in lines:
            say(f"Error: {line}")
        code = 2 if isinstance(reason, OptionError) else 1
    except BrokenPipeError:
        # The reader (head, say) has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as reason:
        if debug:
            raise
        say(f"Error: {type(reason).__name__}: {reason}. This is a defect of plan itself; --debug shows where.")
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
