"""`plan presets`, `advise`, `doctor`: what can be chosen, what to choose, and whether this machine is well."""

from __future__ import annotations

import sys
import textwrap
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from planner.options import BriefHelp, Valued, measure_settings, same_options, with_options
from planner.terminal import measuring_bar, open_history, out, out_json, say, settings_of, width

if TYPE_CHECKING:
    from planner.advise import Advice

GOALS = ("first", "again", "best", "today", "prompts")  # planner.advise says what they mean


@click.group(invoke_without_command=True, short_help="List, show and make presets.")
@click.pass_context
def presets(ctx: click.Context) -> None:
    """What can be run: list the presets, show one, or make one of your own.

    \b
    Examples:
      plan presets
      plan presets show aggressive
      plan presets new mine --from recommended
    """
    if ctx.invoked_subcommand is None:
        _list()


@presets.command("list")
def presets_list() -> None:
    """One line per preset."""
    _list()


def _list() -> None:
    from presets.errors import PresetError
    from presets.text import printable
    from presets.user import all_names, find_preset

    for name in all_names():
        try:
            summary = find_preset(name).summary
        except PresetError as reason:  # one of the user's own, to be mended
            summary = f"cannot be used: {reason}"
        out(f"{name:<12} {printable(summary)}")


@presets.command("show")
@click.argument("name")
def presets_show(name: str) -> None:
    """The preset's own file: a bundled one, one of yours, or any TOML file.

    \b
    Example:
      plan presets show aggressive
    """
    from presets.text import printable
    from presets.user import text_of

    out("\n".join(map(printable, text_of(name).splitlines())))


@presets.command("new")
@click.argument("name")
@click.option(
    "--from", "source", cls=Valued, default="recommended", show_default=True, metavar="PRESET", help="What to copy."
)
def presets_new(name: str, source: str) -> None:
    """A preset of your own: a copy with its comments, to be edited.

    \b
    Example:
      plan presets new mine --from recommended
    """
    from presets.user import new_preset

    out(f"{new_preset(name, source)}")
    say(f"Edit it, then: plan --preset {name} --dataset messages.jsonl")


@click.command(cls=BriefHelp, short_help="Which configuration to take, and when it is done.")
@click.option("--goal", cls=Valued, type=click.Choice(GOALS), help="What for; asked where it is left out.")
@click.option(
    "--deadline",
    cls=Valued,
    metavar="WHEN",
    help="Done by then, surely: friday, 18:00, 'tomorrow 09:00', '2026-11-27 09:00', 'in 3 hours'.",
)
@click.option("--within", cls=Valued, metavar="TIME", help="Done in this time, surely: 8h, 90min.")
@click.option("--start", cls=Valued, metavar="WHEN", help="When it will be started [now].")
@with_options
@click.pass_context
def advise(
    ctx: click.Context, /, goal: str | None, deadline: str | None, within: str | None, start: str | None, **given: Any
) -> None:
    """Which configuration to take, why, when it will be done, and the command that starts it.

    By the published guide's questions, or for a deadline: then the best quality that is surely done in time, tuned
    splits first and samples last. From this machine's measurements.

    \b
    Examples:
      plan advise --goal first --dataset messages.jsonl
      plan advise --deadline "tomorrow 09:00" --dataset messages.jsonl
      plan advise --within 8h --tuned --dataset messages.jsonl
    """
    from planner.advise import for_deadline, for_goal
    from planner.compare import compare
    from planner.figures import full_clock
    from planner.moments import parse_deadline, parse_start, parse_within
    from planner.resolve import Options, option_fields

    refused = [flag for flag in ("run", "resume", "output", "step_time", "dry_run", "force") if given[flag]]
    if refused:
        raise click.UsageError(f"--{refused[0].replace('_', '-')} does not go with 'plan advise'.")
    if given["output_format"] not in ("table", "json"):
        raise click.UsageError("--format is 'table' or 'json' for advice.")
    given["as_json"] = given["as_json"] or given["output_format"] == "json"
    if sum(one is not None for one in (goal, deadline, within)) > 1:
        raise click.UsageError("--goal, --deadline and --within do not go together: name one of them.")
    now = datetime.now().astimezone()
    begin = now if start is None else parse_start(start, now)
    until = None
    if deadline is not None:
        until = parse_deadline(deadline, now, begin)
    elif within is not None:
        until = begin + timedelta(seconds=parse_within(within))
    elif goal is None:
        goal = _ask()
    if until is not None:  # as it was understood, before minutes are spent on measuring
        say(f"to be done by {full_clock(until)}, started {full_clock(begin)}")
    options = Options(**{name: given[name] for name in option_fields() if name in given})
    settings = settings_of(options, given["preset_names"])
    comparison = compare(
        options,
        settings,
        measure_settings(given),
        names=given["preset_names"],
        say=say,
        shown=measuring_bar,
        history=open_history(say),
        tuned=given["tuned"],
    )
    report = comparison.report
    if until is not None:
        found = for_deadline(report.rows, begin, until, report.dataset.num_examples)
    else:
        assert goal is not None
        found = for_goal(report.rows, goal)
    tail = same_options(given | {"tuned": False})
    if given["as_json"]:
        out_json(_advice_json(found, tail, begin, until))
    else:
        out(_advice_text(found, tail, begin, until))
    ctx.exit(0 if found.row is not None else 1)


def _ask() -> str:
    """The guide's questions, in the terminal."""
    from planner.advise import GOALS as MEANINGS
    from planner.advise import QUESTIONS

    if not sys.stdin.isatty():
        raise click.UsageError(
            "nothing was asked for: name --goal (first, again, best, today, prompts), --deadline or --within."
        )
    click.echo("What do you want to do?", err=True)
    for number, name in enumerate(MEANINGS, start=1):
        click.echo(f"  {number}  {QUESTIONS[name]}", err=True)
    chosen: int = click.prompt("Number", type=click.IntRange(1, len(MEANINGS)), err=True)
    return list(MEANINGS)[chosen - 1]


def _advice_text(found: Advice, tail: str, begin: datetime, until: datetime | None) -> str:
    from planner.advise import at_the_latest, latest_minute
    from planner.figures import clock, duration, duration_range, full_clock
    from presets.text import printable

    limit = max(40, min(width() or 110, 110))

    def wrapped(text: str, indent: int) -> str:
        return textwrap.fill(
            text, limit, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )

    lines = [] if until is None else [f"By {full_clock(until)}, started {full_clock(begin)}:\n"]
    row = found.row
    sampled = bool(found.extra)
    if row is None:
        lines.append(wrapped(f"{found.why[0][0].upper()}{found.why[0][1:]}.", 0))
    else:
        told = [("why" if not number else "", text) for number, text in enumerate(found.why)]
        if not sampled:
            span = duration_range(row.seconds_low, row.seconds_high)
            told.append(("time", f"{duration(row.seconds)} ({span}), measured here"))
            done = clock(begin + timedelta(seconds=row.seconds or 0.0), begin)
            latest = clock(latest_minute(begin, row.seconds_high or row.seconds or 0.0), begin)
            told.append(("done", f"{done}, {at_the_latest(row, latest)}, started {clock(begin, begin)}"))
        told += [("note", printable(note)) for note in (row.note or "").split("\n") if note]
        lines.append(printable(row.name))
        lines += [wrapped(f"  {title:<8} {text}", 11) for title, text in told]
    if found.given_up:
        lines.append("\nPassed over:")
        lines += [wrapped(f"  {printable(text)}", 4) for text in found.given_up]
    command = found.command(tail)
    if command:
        lines.append(f"\nStart it:\n  {command}")
    return "\n".join(lines)


def _advice_json(found: Advice, tail: str, begin: datetime, until: datetime | None) -> str:
    import json

    plain = {
        "schema": 1,
        "row": None if found.row is None else found.row.to_plain(),
        "why": list(found.why),
        "passed_over": list(found.given_up),
        "start_at": begin.isoformat(timespec="seconds"),
        "deadline_at": None if until is None else until.isoformat(timespec="seconds"),
        "command": found.command(tail),
    }
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)


@click.command(short_help="What is wrong with this machine, and what mends it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """What this machine has, what is wrong with it, and the command that mends it.

    Ends with 1 where something is wrong.

    \b
    Example:
      plan doctor
    """
    import json

    from planner.doctor import examine, look
    from presets import jsonio
    from presets.text import printable

    found = examine(look())
    if as_json:
        out_json(json.dumps({"schema": 1, "findings": [jsonio.to_plain(one) for one in found]}, indent=2))
    else:
        marks = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
        for one in found:
            out(f"{marks[one.state]}  {printable(one.what)}: {printable(one.text)}")
            if one.remedy:
                out(f"         -> {printable(one.remedy)}")
    ctx.exit(int(any(one.state == "wrong" for one in found)))
