"""The options of `plan`, each declared once: group, names, click settings; and what follows from what was given."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.counts import parse_count
from presets.rules import MOST_EPOCHS, MOST_EXAMPLES, MOST_SEED, MOST_SEQUENCES, MOST_TOKENS
from presets.text import listed

if TYPE_CHECKING:
    from planner.candidates import MeasureSettings

F = TypeVar("F", bound=Callable[..., Any])


class _Epochs(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A whole number of epochs, or a share of one."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if 0 < number < 1:
            return number
        if 1 <= number <= MOST_EPOCHS and number == int(number):
            return int(number)
        self.fail(f"'{value}' is neither a whole number of at least 1 nor a share of one below 1.", param, ctx)


class Number(click.FloatRange):
    """A number in a range: click itself lets "nan" through, which no comparison refuses."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return found


class _Share(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """ "2%" or "0.02" -> 0.02."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 < share < 1:
            self.fail(f"'{text}' is no share above 0 and below 1, such as 2% or 0.02.", param, ctx)
        return share


def _choice(*words: str) -> click.Choice[str]:
    return click.Choice(list(words))


class Valued(click.Option):
    """An option that is given no empty value and no other option for one: a script's variable that was not set would
    train or plan something else than was meant, and `--run --dataset x` would look for a preset '--dataset'.
    """

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, str) and not one.strip():
                raise click.BadParameter(f"it is empty. Was a variable not set?{self.hint()}", ctx, self)
            if isinstance(one, str) and one.partition("=")[0] in _flags(ctx.command):
                raise click.BadParameter(f"it needs a value, and '{one}' is an option.{self.hint()}", ctx, self)
        return super().type_cast_value(ctx, value)

    def hint(self) -> str:
        """ " Presets: ..." for an option that takes the name of one, else empty."""
        if self.metavar != "PRESET":
            return ""
        from presets.user import all_names

        return f" Presets: {listed(all_names())}."


def _flags(command: click.Command) -> set[str]:
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts) if flag.startswith("-")}


# One declaration per option. Those named like a field of planner.resolve.Options are passed on by that name.
OPTIONS: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("What", ("--dataset",), {"metavar": "COUNT|FILE|NAME", "help": "A count (63000), a file (JSONL, JSON, CSV, Parquet; .gz), a saved folder or a hub name."}),
    ("What", ("--model",), {"metavar": "FOLDER|NAME", "help": "Model folder (to plan, it needs no weights) or hub name."}),
    ("What", ("--run",), {"metavar": "PRESET", "help": "Train this configuration, then show predicted beside actual."}),
    ("What", ("--resume",), {"metavar": "RUN", "type": click.Path(path_type=Path), "help": "Go on with a stopped run folder."}),
    ("What", ("--output",), {"metavar": "FOLDER", "type": click.Path(path_type=Path), "help": "The run folder itself [runs/PRESET-TIME]."}),
    ("What", ("--force",), {"is_flag": True, "help": "Run what the safety rules advise against."}),
    ("What", ("--dry-run",), {"is_flag": True, "help": "With --run: print what would be started; measure nothing, make no run folder."}),
    ("What", ("--preset", "preset_names"), {"metavar": "PRESET", "multiple": True, "help": "Compare only these (repeat it)."}),
    ("Measure", ("--budget",), {"type": Number(min=0, min_open=True, max=86400), "default": 60.0, "show_default": True, "envvar": "PLAN_BUDGET", "show_envvar": True, "metavar": "SECONDS", "help": "Seconds of timing, half of them at the least; process starts come on top."}),
    ("Measure", ("--precision-target",), {"type": _Share(), "metavar": "PERCENT", "default": "2%", "show_default": True, "help": "Stop timing when the range is as narrow as ± this."}),
    ("Measure", ("--tuned",), {"is_flag": True, "help": "Show (or run) the tuned twins too; searched for where not known."}),
    ("Measure", ("--quantized",), {"is_flag": True, "help": "Let a search try 8-bit and 4-bit bases, which train something else."}),
    ("Measure", ("--explain",), {"is_flag": True, "help": "Say where the time goes, and what each change gained."}),
    ("Measure", ("--step-time",), {"type": Number(min=0, min_open=True, max=1e9), "metavar": "SECONDS", "help": "Measure nothing: fill the published formula with this step time."}),
    ("Measure", ("--fresh",), {"is_flag": True, "help": "Measure again, though an earlier measurement would do."}),
    ("Measure", ("--json", "as_json"), {"is_flag": True, "help": "Print one JSON object and nothing else."}),
    ("Measure", ("--format", "output_format"), {"type": _choice("table", "markdown", "csv", "json", "html"), "default": "table", "show_default": True, "help": "Form of the table; html is a page of its own."}),
    ("Data", ("--columns",), {"metavar": "ROLE=NAME,...", "help": "Name the columns: prompt=q,completion=a,engagement=likes."}),
    ("Data", ("--tokens-per-example",), {"type": click.IntRange(2, MOST_TOKENS), "metavar": "N", "help": "With a count: every example has N tokens."}),
    ("Data", ("--train-on",), {"type": _choice("assistant", "all"), "default": "assistant", "show_default": True, "help": "Which tokens count for the loss."}),
    ("Data", ("--limit",), {"type": click.IntRange(1, MOST_EXAMPLES), "metavar": "N", "help": "Use only the first N records."}),
    ("Data", ("--skip-bad-lines",), {"is_flag": True, "help": "Leave out records that cannot be read, and count them."}),
    ("Data", ("--eval-fraction",), {"type": Number(min=0, max=1, max_open=True), "metavar": "F", "help": "Held-out share [0.02, at least 8, at most 1,000 examples]."}),
    ("Data", ("--samples",), {"type": click.IntRange(min=0, max=100), "metavar": "N", "help": "Answers written before and after, side by side [4]."}),
    ("Override", ("--micro-batch-size",), {"type": click.IntRange(1, MOST_SEQUENCES), "metavar": "N", "help": "Sequences per forward pass; the global batch stays."}),
    ("Override", ("--gradient-accumulation-steps",), {"type": click.IntRange(1, MOST_SEQUENCES), "metavar": "N", "help": "Changes the global batch."}),
    ("Override", ("--precision",), {"type": _choice("fp32", "tf32", "fp16", "bf16"), "help": "Compute precision."}),
    ("Override", ("--base-precision",), {"type": _choice("auto", "fp32", "fp16", "bf16", "8bit", "4bit"), "help": "How frozen weights are stored."}),
    ("Override", ("--adapter",), {"type": _choice("lora", "full"), "help": "Train LoRA adapters or all weights."}),
    ("Override", ("--learning-rate",), {"type": Number(min=0, min_open=True, max=1, max_open=True), "metavar": "LR", "help": "Peak learning rate."}),
    ("Override", ("--epochs",), {"type": _Epochs(), "metavar": "N", "help": "Passes over the data."}),
    ("Override", ("--max-length",), {"type": click.IntRange(2, MOST_TOKENS), "metavar": "TOKENS", "help": "Longer examples keep their head."}),
    ("Override", ("--sample-size",), {"type": click.IntRange(1, MOST_EXAMPLES), "metavar": "N", "help": "Use N examples: the top ones, or as a preset that samples does."}),
    ("Override", ("--sample-ratio",), {"type": Number(min=0, min_open=True, max=1), "metavar": "R", "help": "Use this share of the examples."}),
    ("Override", ("--sampling-strategy",), {"type": _choice("random", "top", "prioritized"), "help": "How the sample is chosen."}),
    ("Override", ("--sample-score",), {"type": _choice("engagement", "recency", "loss"), "help": "What 'top' ranks by."}),
    ("Override", ("--attention",), {"type": _choice("sdpa", "eager"), "help": "Attention implementation."}),
    ("Override", ("--gradient-checkpointing/--no-gradient-checkpointing",), {"default": None, "help": "Less memory, more time."}),
    ("Override", ("--packing",), {"is_flag": True, "help": "Several examples in a row, kept apart; the same examples in each step."}),
    ("Override", ("--share-beginnings/--no-share-beginnings",), {"default": None, "help": "Packed rows hold once what examples begin with in common [yes]."}),
    ("Override", ("--lean-loss",), {"is_flag": True, "help": "The output layer sees only what is learnt from, in chunks: the same loss, less memory."}),
    ("Override", ("--group-by-length",), {"is_flag": True, "help": "Windows of examples alike in length: less padding, but other batches."}),
    ("Override", ("--compile",), {"is_flag": True, "help": "torch.compile the layers; the time it takes is counted."}),
    ("Override", ("--seed",), {"type": click.IntRange(0, MOST_SEED), "metavar": "N", "help": "Order, sampling and initial weights [42]."}),
    ("Device", ("--device",), {"type": _choice("cuda", "mps", "cpu"), "help": "Where to run [the GPU, if there is one]."}),
    ("Device", ("--devices", "num_devices"), {"type": click.IntRange(min=1, max=1024), "metavar": "N", "help": "Number of GPUs (processes on a CPU)."}),
    ("Device", ("--threads", "num_threads"), {"type": click.IntRange(min=1, max=1024), "metavar": "N", "help": "CPU threads."}),
    ("Device", ("--accelerate-config",), {"type": click.Path(path_type=Path, exists=True, dir_okay=False), "metavar": "FILE", "help": "Accelerate's own configuration, passed on."}),
    ("Device", ("--tracker",), {"metavar": "NAME", "help": "Also log to tensorboard, wandb, ... through Accelerate."}),
    ("Device", ("--trust-remote-code",), {"is_flag": True, "help": "Run code that comes with a model."}),
    ("Device", ("--debug",), {"is_flag": True, "help": "Show tracebacks."}),
)  # fmt: skip


# What `--help` shows; `--help-all` shows every option. A table and a run need no others.
ESSENTIAL = (
    "dataset", "model", "run", "resume", "tuned", "explain", "fresh", "budget", "output_format", "goal", "deadline",
    "within", "start",
)  # fmt: skip


class BriefHelp(click.Command):
    """A command whose help fits on a screen, and which tells all options that are wrong at once."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.BadOptionUsage as reason:  # it stands last, with no value
            option = next((one for one in self.params if reason.option_name in one.opts), None)
            if isinstance(option, Valued) and option.nargs == 1 and not option.is_flag:
                raise click.UsageError(f"{reason.format_message()}{option.hint()}", ctx) from None
            raise
        except click.BadParameter as first:
            told = self._all_bad(ctx, given)
            if len(told) < 2:
                raise
            raise click.UsageError("\n".join(told), ctx) from first

    def _all_bad(self, ctx: click.Context, args: list[str]) -> list[str]:
        opts, _, order = self.make_parser(ctx).parse_args(args)
        told = []
        for param in click.core.iter_params_for_processing(order, self.get_params(ctx)):
            try:
                if not param.is_eager:
                    param.handle_parse_result(ctx, opts, [])
            except click.BadParameter as reason:
                told.append(reason.format_message())
        return told

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.meta.get("plan.help_all"):
            super().format_options(ctx, formatter)
            return
        shown = {*ESSENTIAL, "help", "help_all"} - (set() if isinstance(self, click.Group) else {"run", "resume"})
        wanted = [one for one in self.get_params(ctx) if one.name in shown]
        records = [record for one in wanted if (record := one.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)


def _help_all(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta["plan.help_all"] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def with_options(function: F) -> F:
    """A command with all of them, and --help-all."""
    function = click.option(
        "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_help_all, help="Show every option."
    )(function)
    for _, names, settings in reversed(OPTIONS):
        function = click.option(*names, cls=Valued, **settings)(function)
    return function


def measure_settings(given: dict[str, Any]) -> MeasureSettings:
    """How long and how sharply to measure."""
    from planner.candidates import MeasureSettings

    return MeasureSettings(
        budget_seconds=given["budget"],
        precision_target=given["precision_target"],
        fresh=given["fresh"],
        quantized=given["quantized"],
    )


def same_options(given: dict[str, Any]) -> str:
    """The options of this call that a run needs too, as text; for a count a file's place is held."""
    skipped = {"run", "resume", "as_json", "budget", "precision_target", "preset_names", "debug", "step_time"}
    skipped |= {"fresh", "explain", "force", "dry_run", "output_format"}  # what was measured just now will do
    skipped |= set() if given["tuned"] else {"quantized"}
    words = []
    for _, names, settings in OPTIONS:
        flag = names[0].split("/")[0]
        name = names[1] if len(names) > 1 else flag.removeprefix("--").replace("-", "_")
        value = given[name]
        if name in skipped or value is None or (value is settings.get("default", False) is False):
            continue
        if value == settings.get("default") and not isinstance(value, bool):
            continue
        if value is False:  # --this/--no-this: said, and not the default
            words.append(names[0].split("/")[1])
            continue
        if name == "tokens_per_example":
            continue
        if name == "dataset" and parse_count(value) is not None:
            words += [flag, "YOUR_FILE"]  # a count is enough to plan, a run needs messages
            continue
        words += [flag] if value is True else [flag, shlex.quote(str(value))]
    return "".join(f" {word}" for word in words)
