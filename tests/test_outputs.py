"""What a run writes beside its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.outcome import outcome_text
from trainer.card import card
from trainer.job import Job
from trainer.loop import train


def test_a_run_without_sample_answers_writes_none_and_speaks_of_none(make_run: Any) -> None:
    run = make_run()
    job = Job.read(run / "job.json")
    quiet = replace(job, evaluation=replace(job.evaluation, num_samples=0))
    (run / "job.json").write_text(quiet.to_json(), encoding="utf-8")
    record = train(run)
    assert record is not None
    assert record.actual.breakdown is not None
    assert record.actual.breakdown.samples == 0.0
    assert not list(run.glob("samples*"))
    assert "samples.md" not in outcome_text(record, run)


def test_the_held_out_loss_along_the_way_is_kept(make_run: Any) -> None:
    run = make_run()
    record = train(run)
    assert record is not None
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["step"] == 0
    assert lines[0]["loss"] == record.actual.eval_loss_before
    assert lines[-1]["loss"] == record.actual.eval_loss_after
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))


def test_the_model_card_has_this_runs_figures_and_no_path_of_this_machine(make_run: Any) -> None:
    import yaml

    run = make_run()
    record = train(run)
    assert record is not None
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "peft"
    assert metadata["base_model"] == Path(record.job.model).name
    assert f"{record.actual.eval_loss_after:,.4f}" in body
    assert f"| optimizer steps | {record.actual.num_steps} |" in body
    assert "More Information Needed" not in text
    assert str(run.parent) not in text
    assert str(Path(record.job.model).parent) not in text


def test_nothing_in_a_name_breaks_out_of_the_card(make_run: Any) -> None:
    run = make_run()
    record = train(run)
    assert record is not None
    nasty = replace(record, job=replace(record.job, name="a|b<script>\n# c", model="someone/x: y\n- z"))
    text = card(nasty)
    assert "<script>" not in text
    assert "\n# c" not in text
    assert text.count("---\n") == 2
