"""Run folders: make one, start the trainer on it, and put predicted beside actual when it is done."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from presets import jsonio
from presets.errors import RunError, SettingsError
from presets.home import expanded
from trainer.alive import NAME as PROCESS
from trainer.batching import BatchPlan
from trainer.folder import LOCK, refuse_links, require_unused, sole_writer
from trainer.job import Job
from trainer.planning import needs_loss
from trainer.process import stop_signals, threads_of_a_process
from trainer.record import Predicted, RunRecord

LAUNCHER = "accelerate.commands.launch"
# Without a file of our own, Accelerate would read the user's default one, whatever it asks for.
OWN_ACCELERATE_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
"""


def make_run_folder(output: Path | None, job: Job, plan: BatchPlan, predicted: Predicted, now: datetime) -> Path:
    """A new run folder with job.json, estimate.json and batch_plan.npz; returns its absolute path.

    Where the model's own loss selects the examples, `plan` is only a stand-in: the run makes its own at the start.

    Raises:
        RunError: the folder cannot be made, or is not empty. Nothing is left behind then.
    """
    check_output(output)
    folder = run_folder_name(output, job, now)
    made = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder, made = _new_folder(folder, may_be_there=output is not None)
        with sole_writer(folder):
            if not _is_empty(folder):  # another plan was quicker: what is there is not ours to remove
                raise RunError(_not_empty(output or folder, folder))
            try:
                _fill(folder, job, plan, predicted)
            except OSError:
                for entry in folder.iterdir():  # nothing half-written stays
                    entry.unlink(missing_ok=True)
                raise
    except (OSError, RunError) as reason:
        if made:
            with contextlib.suppress(OSError):  # another plan has come to use it
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        if isinstance(reason, RunError):
            raise
        raise RunError(
            f"output '{output or folder}' cannot be written ({reason.strerror or reason}). Choose another --output."
        ) from None
    return folder


def _new_folder(folder: Path, *, may_be_there: bool) -> tuple[Path, bool]:
    """Make it, or one with a number behind its name where another plan began in the same second; whether it is new."""
    for number in itertools.count(2):
        try:
            folder.mkdir()
            return folder, True
        except FileExistsError:
            if may_be_there:
                return folder, False
            folder = folder.with_name(f"{folder.name.removesuffix(f'-{number - 1}')}-{number}")
    raise AssertionError("itertools.count ends")


def _fill(folder: Path, job: Job, plan: BatchPlan, predicted: Predicted) -> None:
    if not needs_loss(job.preset):
        plan.save(folder / "batch_plan.npz")
    jsonio.write_atomically(folder / "estimate.json", jsonio.to_json(predicted))
    jsonio.write_atomically(folder / "job.json", job.to_json())  # last: its presence says the folder is whole


def run_folder_name(output: Path | None, job: Job, now: datetime) -> Path:
    """Where a run that starts `now` will lie."""
    return expanded(output or Path("runs") / f"{job.name}-{now:%Y%m%d-%H%M%S}").absolute()


def check_output(output: Path | None) -> None:
    """Refuse an output that could not be used, before anything is measured for it.

    Raises:
        RunError: as `make_run_folder` would.
    """
    folder = expanded(output or Path("runs")).absolute()
    if output is not None and folder.is_symlink():
        raise RunError(
            f"output '{output}' is a link to '{folder.readlink()}'. A run is written into a folder of its own: name "
            "the folder itself."
        )
    if output is not None and folder.exists() and (not folder.is_dir() or not _is_empty(folder)):
        if folder.is_dir():
            require_unused(folder)
        raise RunError(_not_empty(output, folder))
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"output '{output or folder}' cannot be written: '{existing}' is not a folder you may write to.")


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK for path in folder.iterdir())


def _not_empty(output: Path, folder: Path) -> str:
    hint = ""
    if not folder.is_dir():
        return f"output '{output}' is a file. Choose another --output."
    if _is_finished(folder):  # not one that was killed between its result and its record: that one is resumed
        hint = f" It holds a finished run: plan report {shlex.quote(str(output))}."
    elif (folder / "job.json").is_file():
        hint = f" Go on with it: plan --resume {shlex.quote(str(output))}."
    other = "Or choose another --output." if hint else "Choose another --output."
    return f"output '{output}' exists and is not empty.{hint} {other}"


def _is_finished(folder: Path) -> bool:
    try:
        record = read_record(folder)
    except RunError:  # damaged
        return False
    return record is not None and record.status == "finished"


def command(
    folder: Path, job: Job, *, resume: bool = False, accelerate_config: Path | None = None, dry: bool = False
) -> list[str]:
    """What starts the trainer: this Python on one device, Accelerate's launcher on several.

    Args:
        dry: write no configuration for the launcher.

    -P keeps the working directory off the import path: a folder called `trainer` there would be run instead.

    Raises:
        SettingsError: the Accelerate configuration asks for what cannot be run, or cannot be read.
    """
    if accelerate_config is not None:
        check_accelerate_config(accelerate_config)
    tail = [str(folder / "job.json"), *(["--resume"] if resume else [])]
    if job.num_devices == 1:
        return [sys.executable, "-P", "-m", "trainer", *tail]
    # --multi_gpu means "one process a device, started by torch's launcher"; with --cpu Accelerate starts a single one.
    # The trainer itself says whether it is on the CPU. Port 0: a free one, so that two runs do not meet.
    launcher = [sys.executable, "-P", "-m", LAUNCHER, "--multi_gpu", "--num_processes", str(job.num_devices)]
    launcher += ["--main_process_port", "0"]
    if accelerate_config is None:
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        accelerate_config = folder / "accelerate.yaml"
        if not dry:
            jsonio.write_atomically(accelerate_config, OWN_ACCELERATE_CONFIG)
    launcher += ["--config_file", str(accelerate_config)]
    threads = threads_of_a_process(job.num_threads, job.num_devices)
    return [*launcher, "--num_cpu_threads_per_process", str(threads), "--module", "trainer", *tail]


def check_accelerate_config(path: Path) -> None:
    """Refuse an Accelerate configuration whose way of distributing has not been tested here.

    Raises:
        SettingsError: it asks for FSDP, DeepSpeed or another such way, or it cannot be read.
    """
    import yaml  # type: ignore[import-untyped]  # comes with accelerate

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as reason:
        said = " ".join(str(getattr(reason, "strerror", None) or reason).split())
        raise SettingsError(f"--accelerate-config '{path}' cannot be read ({said}).") from None
    if not isinstance(content, dict):
        raise SettingsError(
            f"--accelerate-config '{path}' is not an Accelerate configuration: make one with 'accelerate config'."
        )
    kind = content.get("distributed_type", "NO")
    # YAML reads an unquoted NO as false.
    if kind is not False and str(kind).upper() not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise SettingsError(
            f"--accelerate-config '{path}' asks for distributed_type {kind}, which is not supported: it could not be "
            "tested yet. Use one with MULTI_GPU, or leave the option out."
        )
    if str(content.get("compute_environment", "LOCAL_MACHINE")).upper() != "LOCAL_MACHINE":
        raise SettingsError(
            f"--accelerate-config '{path}' asks for compute_environment {content['compute_environment']}; "
            "only LOCAL_MACHINE is supported."
        )


def start(argv: Sequence[str]) -> int:
    """Run the trainer in the foreground and return its exit code; signals are passed on, it decides what they do.

    It stays in this process's group, for a terminal's sake. Of a signal to the whole group it gets a second copy so,
    which it takes for the same one.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    child = subprocess.Popen(list(argv), env=environment)
    passed_on: list[int] = []

    def forward(number: int, _frame: object) -> None:
        passed_on.append(number)
        # A terminal's Ctrl-C reaches the child by itself, since it is in the same group.
        if number != signal.SIGINT or not sys.stdin.isatty():
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if passed_on and code and LAUNCHER in argv:
        return 128 + passed_on[0]  # the launcher itself ends with 1, or by the signal, when its processes were stopped
    return 128 - code if code < 0 else code


def open_run(folder: Path) -> Job:
    """The job of an existing run folder.

    Raises:
        RunError: it is not a run folder.
    """
    if not (folder / "job.json").is_file():
        raise RunError(f"'{folder}' is not a run folder: there is no job.json in it.")
    return Job.read(folder / "job.json")


def open_to_write(folder: Path) -> Job:
    """The job of a run folder in which a trainer is to be started: nobody trains in it, and it can be written.

    The note of the process that trained in it last goes: until the next one has written its own, whoever looks at the
    folder would take the run for ended.

    Raises:
        RunError: it is not a run folder, or cannot be written into now.
    """
    job = open_run(folder)
    refuse_links(folder)
    with sole_writer(folder):
        with contextlib.suppress(OSError):  # it cannot be changed: the trainer says why
            (folder / PROCESS).unlink(missing_ok=True)
        return job


def read_record(folder: Path) -> RunRecord | None:
    """The record of a run; None where it has not ended yet."""
    path = folder / "record.json"
    return RunRecord.read(path) if path.is_file() else None
