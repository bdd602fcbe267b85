"""Run folders that are incomplete, damaged, someone else's, or full of links: one clear line each, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_kill import stopped_after
from wounds import WAYS

from planner import cli, launch
from planner.launch import check_output, make_run_folder
from presets.errors import RunError, SettingsError
from trainer import checkpoint, loop
from trainer.batching import BatchPlan
from trainer.job import Job
from trainer.record import Predicted
from trainer.sums import write_sums


def resume(run: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """plan --resume in this process: what it said; it must have ended with 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plan", "--resume", str(run)])
        patch.setattr(launch, "start", lambda argv: pytest.fail("it was started"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 1
    return capsys.readouterr().err.splitlines()


def stopped_run(make_run: Any, name: str = "run", steps: int = 3, **changes: Any) -> Path:
    """A run that died after some steps, with a checkpoint after each."""

    run: Path = make_run(name, checkpoint_every=1, **changes)
    stopped_after(run, steps)
    return run


# --- job.json and batch_plan.npz --------------------------------------------------------------------------------------


def test_a_folder_without_a_job_or_with_a_damaged_one_is_refused(
    tmp_path: Path, make_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert resume(tmp_path / "empty", capsys) == [
        f"Error: '{tmp_path / 'empty'}' is not a run folder: there is no job.json in it."
    ]
    run = make_run()
    text = (run / "job.json").read_text()
    for content in ("", text[: len(text) // 2], "\0" * len(text), "[]", text.replace("micro_batch_size", "micro")):
        (run / "job.json").write_text(content)
        (line,) = resume(run, capsys)
        assert line.startswith(f"Error: {run}/job.json: ")
    (run / "job.json").write_bytes(b"\xff\xfe{")
    (line,) = resume(run, capsys)
    assert "cannot be read" in line


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "a\\b", "..", ""])
def test_no_name_in_a_job_leads_out_of_its_folder(make_job: Any, name: str) -> None:
    plain = json.loads(make_job().to_json()) | {"name": name}
    with pytest.raises(SettingsError, match=r"^job\.json: name "):
        Job.from_json(json.dumps(plain))


def test_a_batch_plan_that_is_damaged_is_refused_and_made_anew_once_it_is_removed(make_run: Any) -> None:
    whole = make_run("whole")
    loop.train(whole)
    run = stopped_run(make_run)
    path = run / "batch_plan.npz"
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2], bytes(len(content)), content[:-30], b"PK" + content[2:400]):
        path.write_bytes(damaged)
        with pytest.raises(
            RunError, match=r"batch_plan\.npz: the batch plan cannot be read \(.*Remove the file"
        ) as seen:
            loop.train(run, resume=True)
        assert "\n" not in str(seen.value)
    path.unlink()
    loop.train(run, resume=True)
    assert adapter_bytes(run) == adapter_bytes(whole)


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_arrays_that_do_not_fit_together_are_no_batch_plan(make_run: Any, tmp_path: Path) -> None:
    run = stopped_run(make_run, steps=1)
    with np.load(run / "batch_plan.npz") as archive:
        whole = {name: archive[name] for name in archive.files}
    path = tmp_path / "plan.npz"
    for name, wrong in (
        ("window_offsets", whole["window_offsets"][::-1]),
        ("row_offsets", whole["row_offsets"] + 1),
        ("micro_offsets", whole["micro_offsets"][:-1]),
        ("order", whole["order"] - 50),
        ("order", whole["order"].astype(float)),
        ("window_phase", whole["window_phase"][1:]),
        ("num_devices", np.array(0)),
        ("num_devices", np.array([1, 2])),
        ("evaluation", whole["evaluation"][None]),
    ):
        np.savez(path, **{**whole, name: wrong})
        with pytest.raises(RunError, match="the batch plan cannot be read"):
            BatchPlan.load(path)
    np.savez(path, **whole)
    assert BatchPlan.load(path).digest() == BatchPlan.load(run / "batch_plan.npz").digest()


def test_a_batch_plan_of_another_job_is_refused(make_run: Any) -> None:
    run = stopped_run(make_run)
    others = {
        "two": ({"num_devices": 2}, "2 devices, where job.json has 1"),
        "micro": ({"micro": 4}, "4 rows in a micro-batch, where job.json has 1"),
        "batch": ({"gradient_accumulation_steps": 16}, "16 examples in a step, where job.json has 8"),
        "seed": ({"seed": 3}, "the checkpoint is of another batch plan"),
    }
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    for name, (changes, message) in others.items():
        other = make_run(name, **changes)
        job = Job.read(other / "job.json")
        data = loop.prepare_data(job.data, model=job.model, max_length=job.preset.max_length, seed=job.seed)
        loop.plan_job(job, data).plan.save(run / "batch_plan.npz")
        with pytest.raises(RunError, match=message):
            loop.train(run, resume=True)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == checkpoints


def test_an_estimate_or_a_record_that_is_damaged_is_no_reason_to_lose_a_run(
    make_run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_run(make_run)
    (run / "estimate.json").write_text('{"seconds": ')
    with pytest.raises(RunError, match=r"estimate\.json: the estimate cannot be read .*Remove the file: the run then"):
        loop.train(run, resume=True)
    (run / "estimate.json").unlink()
    (run / "record.json").write_bytes(b"\0\0\0")
    (run / "samples-before.json").write_text("[")
    started: list[str] = []
    monkeypatch.setattr(launch, "start", lambda argv: started.append(argv[-1]) or (loop.train(run, resume=True) and 0))
    monkeypatch.setattr(sys, "argv", ["plan", "--resume", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert started == ["--resume"]
    assert f"{run}/record.json: not JSON" in capsys.readouterr().err
    assert (run / "adapter").is_dir()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stepper() -> Any:
    import torch

    from trainer.step import make_stepper, optimizer_step

    torch.manual_seed(1)
    made = make_stepper(torch.nn.Linear(40, 40), "cpu", "fp32")
    made.model(torch.ones(1, 40)).sum().backward()
    optimizer_step(made, 0.1)
    return made


def save_two(folder: Path, stepper: Any) -> Path:
    """Checkpoints of steps 1 and 2; the newer one."""
    states = checkpoint.random_state(0)
    for number in (1, 2):
        newest = checkpoint.save_checkpoint(folder, stepper, checkpoint.Progress(windows_done=number), states)
    return newest


def test_no_way_to_spoil_any_file_of_a_checkpoint_goes_unseen(tmp_path: Path, stepper: Any) -> None:
    whole = tmp_path / "whole"
    newest = save_two(whole, stepper)
    files = sorted(path.name for path in newest.iterdir())
    assert files == ["SHA256SUMS", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
    for file in files:
        for way, inflict in WAYS.items():
            folder = tmp_path / f"{file} {way}"
            shutil.copytree(whole, folder)
            inflict(folder / newest.name / file)
            progress, path, notes = checkpoint.load_newest(folder, stepper, 0, True)
            assert progress.windows_done == 1, f"{file}: {way}"
            assert path == folder / "step-000001"
            (note,) = notes
            assert f"{folder / newest.name}" in note
            assert "damaged" in note
            assert note.endswith("It is set aside as damaged-step-000002.")
            assert (folder / "damaged-step-000002").is_dir()


def test_the_sums_are_those_of_sha256sum(tmp_path: Path, stepper: Any) -> None:
    import hashlib

    newest = save_two(tmp_path, stepper)
    for line in (newest / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((newest / name).read_bytes()).hexdigest() == digest


def test_what_a_checkpoint_says_leads_nowhere_else(tmp_path: Path, stepper: Any) -> None:
    """Names in SHA256SUMS and numbers in state.json are compared, not followed."""
    folder = tmp_path / "checkpoints"
    newest = save_two(folder, stepper)
    sums = newest / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("random.safetensors", "../../secret"))
    (tmp_path / "secret").write_bytes((newest / "random.safetensors").read_bytes())
    _, path, notes = checkpoint.load_newest(folder, stepper, 0, True)
    assert path == folder / "step-000001"
    assert "SHA256SUMS is not as it was written" in notes[0]
    # A checkpoint under another step's name.
    (folder / "step-000001").rename(folder / "step-000007")
    with pytest.raises(RunError, match=r"step-000007: the checkpoint is damaged \(it is of step 1\)"):
        checkpoint.load_newest(folder, stepper, 0, True)


def test_checkpoints_of_another_model_or_a_later_version_are_refused_and_left_where_they_are(
    tmp_path: Path, stepper: Any
) -> None:
    import torch

    from trainer.step import make_stepper

    newest = save_two(tmp_path, stepper)
    with pytest.raises(RunError, match="not this model's"):
        checkpoint.load_newest(tmp_path, make_stepper(torch.nn.Linear(3, 3), "cpu", "fp32"), 0, True)
    state = newest / "state.json"
    written = json.loads(state.read_text())
    for change, said in (
        ({"format": 4}, "checkpoint format 4, this version reads 1 to 3"),
        ({"format": 4, "more": 1}, "checkpoint format 4, this version reads 1 to 3"),
        ({"more": 1}, "this one does not know 'more'"),
        ({"progress": {**written["progress"], "rounds": 3}}, "this one does not know 'rounds'"),
    ):
        state.write_text(json.dumps(written | change))
        write_sums(newest, checkpoint.SUMMED)
        for _ in range(2):
            with pytest.raises(RunError) as refused:
                checkpoint.load_newest(tmp_path, stepper, 0, True)
            assert f"was written by another version of the planner ({said})" in str(refused.value)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(("whole", "spoiled"), [('"tokens"', '"tokenr"'), ('"format": 3', '"format": 7')])
def test_a_bit_that_turned_over_is_not_taken_for_another_version(
    tmp_path: Path, stepper: Any, whole: str, spoiled: str
) -> None:
    state = save_two(tmp_path, stepper) / "state.json"
    assert whole in state.read_text()
    state.write_text(state.read_text().replace(whole, spoiled))
    _, path, (note,) = checkpoint.load_newest(tmp_path, stepper, 0, True)
    assert path == tmp_path / "step-000001"
    assert note.endswith("It is set aside as damaged-step-000002.")


def test_a_state_that_is_nested_too_deeply_is_not_whole(tmp_path: Path, stepper: Any) -> None:
    newest = save_two(tmp_path, stepper)
    assert checkpoint.looks_whole(newest)
    (newest / "state.json").write_text("[" * 100_000)
    assert not checkpoint.looks_whole(newest)


def test_a_checkpoint_of_the_version_before_checksums_is_still_read(make_run: Any) -> None:
    whole = make_run("whole", lora_dropout=0.1)
    loop.train(whole)
    run = stopped_run(make_run, lora_dropout=0.1)
    for folder in (run / "checkpoints").iterdir():
        (folder / "SHA256SUMS").unlink()
        state = json.loads((folder / "state.json").read_text())
        del state["sizes"], state["progress"]["plan_digest"]
        state["format"] = 1
        (folder / "state.json").write_text(json.dumps(state))
    record = loop.train(run, resume=True)
    assert "resumed from step 3" in record.notes
    assert adapter_bytes(run) == adapter_bytes(whole)


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own on Windows")
class TestLinks:
    @pytest.mark.parametrize(
        "name",
        ["job.json", "checkpoints", "adapter", "metrics.jsonl", "train.log", ".lock", "process.json",
         "checkpoints/step-000002", "checkpoints/step-000002/state.json"],
    )  # fmt: skip
    def test_nothing_is_written_through_a_link_in_a_run_folder(
        self, make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        run, elsewhere = make_run(), tmp_path / "elsewhere"
        elsewhere.mkdir()
        link = run / name
        link.parent.mkdir(parents=True, exist_ok=True)
        target = elsewhere / "target"
        if name == "job.json":
            link.rename(target)
        elif name in ("checkpoints", "adapter", "checkpoints/step-000002"):
            target.mkdir()
        else:
            target.write_text("precious")
        link.symlink_to(target)
        before = {path: path.read_bytes() if path.is_file() else b"" for path in elsewhere.rglob("*")}
        with pytest.raises(RunError, match=f"'{link}' is a link to '{target}'.*in its own folder only"):
            loop.train(run, resume=True)
        (line,) = resume(run, capsys)
        assert f"'{link}' is a link to" in line
        assert {path: path.read_bytes() if path.is_file() else b"" for path in elsewhere.rglob("*")} == before

    def test_a_new_run_is_not_made_behind_a_link_but_may_lie_in_a_linked_folder(
        self, make_job: Any, tmp_path: Path
    ) -> None:
        from datetime import datetime

        (tmp_path / "large-disk").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "large-disk")
        (tmp_path / "nowhere").symlink_to(tmp_path / "not-there")
        for name in ("link", "nowhere"):
            with pytest.raises(RunError, match=r"is a link to .*name the folder itself"):
                check_output(tmp_path / name)
        plan = BatchPlan(**{name: np.arange(1) for name in ("order", "row_offsets", "micro_offsets", "window_offsets",
                            "window_phase", "window_epoch", "evaluation")})  # fmt: skip
        made = make_run_folder(tmp_path / "link" / "run", make_job(), plan, Predicted(), datetime.now())
        assert (tmp_path / "large-disk" / "run" / "job.json").is_file()
        assert made == tmp_path / "link" / "run"

    def test_a_link_of_the_user_s_own_to_a_run_folder_is_followed_to_the_folder_itself(
        self, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from trainer import __main__ as entry

        run = make_run()
        (tmp_path / "latest").symlink_to(run)
        seen: list[Path] = []
        monkeypatch.setattr(loop, "train", lambda folder, **_: seen.append(folder))
        monkeypatch.setattr(sys, "argv", ["trainer", str(tmp_path / "latest" / "job.json")])
        assert entry.main() == 0
        assert seen == [run.resolve()]


def test_two_plans_that_begin_in_the_same_second_get_a_folder_each(
    make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    monkeypatch.chdir(tmp_path)
    empty = np.zeros(1, dtype=np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    plan = BatchPlan(order=nothing, row_offsets=empty, micro_offsets=empty, window_offsets=empty, window_phase=nothing,
                     window_epoch=nothing, evaluation=nothing)  # fmt: skip
    now = datetime(2026, 1, 2, 3, 4, 5)
    names = [make_run_folder(None, make_job(), plan, Predicted(), now).name for _ in range(3)]
    first = "recommended-20260102-030405"
    assert names == [first, f"{first}-2", f"{first}-3"]
