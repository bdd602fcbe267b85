"""What examples begin with in common is computed once in a packed row, and nothing else changes by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import make_job, make_row
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, grouped, random_data, small_model, with_lora

from planner.cli import cli
from planner.group import rows_of, shape_of
from planner.options import same_options
from planner.workload import Worker
from trainer import documents, loop
from trainer.agreement import _documents, packing_agrees
from trainer.batching import BatchPlan, Pass, Stretch, make_batch_plan
from trainer.beginning import LEAST_TOKENS, find_beginnings
from trainer.collate import MicroBatch, collate
from trainer.data import prepare_data
from trainer.job import DataSpec, Job
from trainer.loop import train
from trainer.packing import MOST_SPREAD
from trainer.planning import plan_job
from trainer.step import clear_gradients, make_stepper, micro_step, model_arguments, token_losses
from trainer.tokens import TokenizedDataset

COMMON = 12
LENGTHS = [40, 15, 25, 14, 31, 17, 14, 22]
DATA = random_data(LENGTHS, beginning=COMMON)
APART = [family for family in FAMILIES if family != "gemma2"]  # whose capped scores SDPA cannot do


def plan_of(
    data: TokenizedDataset, *, packed: int | None, size: int = 8, micro: int = 1, shared: bool = True
) -> BatchPlan:
    passes = (Pass(examples=np.arange(len(data)), num_epochs=1, stretches=(Stretch(phase=0, global_batch_size=size),)),)
    beginnings = data.beginnings if shared else None
    return make_batch_plan(data.lengths, passes, micro_batch_size=micro, packed_length=packed, beginnings=beginnings)


def gradients(model: Any, data: TokenizedDataset, plan: BatchPlan, made: Callable[..., Any] = collate) -> list[Any]:
    """Of the first window."""
    stepper = make_stepper(model, "cpu", "fp32")
    for micro in range(plan.window_offsets[0], plan.window_offsets[1]):
        micro_step(stepper, made(plan.rows_of_micro_batch(micro), data), scale=0.01)
    found = [parameter.grad.clone() for parameter in stepper.parameters]
    clear_gradients(stepper.parameters)
    return found


# --- finding it -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    own=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    size=st.integers(0, 40),
    others=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_what_is_found_is_common_to_a_family_and_learnt_from_in_none(
    own: list[int], size: int, others: int, seed: int
) -> None:
    without = tuple(range(min(others, len(own))))
    data = random_data([size + more for more in own], seed=seed, beginning=size, without=without)
    found = find_beginnings(data)
    if found is None:
        assert size < LEAST_TOKENS or len(own) - len(without) < 3
        return
    assert found.sizes[0] == 0
    taken = 0
    for family, common in enumerate(found.sizes.tolist()[1:], 1):
        having = np.flatnonzero(found.families == family).tolist()
        firsts = [data.token_ids[start : start + common].tolist() for start in data.offsets[having]]
        assert all(one == firsts[0] for one in firsts)
        assert all(not data.supervised[start : start + common + 1].any() for start in data.offsets[having])
        assert (data.lengths[having] > common).all()
        taken += len(having)
    assert taken >= len(own) - len(without)


def two_prompts() -> TokenizedDataset:
    """Four examples with a prompt of 9 tokens, two with none, then six with one of 50."""
    parts = [
        random_data([60] * 4, seed=1, beginning=9),
        random_data([60] * 2, seed=2),
        random_data([60] * 6, beginning=50),
    ]
    parts[0].token_ids[parts[0].offsets[:-1]] += 1
    return replace(
        parts[0],
        token_ids=np.concatenate([one.token_ids for one in parts]),
        supervised=np.concatenate([one.supervised for one in parts]),
        offsets=60 * np.arange(13),
    )


def test_each_of_two_system_prompts_is_found_the_one_that_saves_more_first() -> None:
    found = find_beginnings(two_prompts())
    assert found is not None
    assert found.sizes.tolist() == [0, 50, 9]
    assert found.families.tolist() == [2] * 4 + [0] * 2 + [1] * 6


def test_prompts_behind_a_header_of_the_template_are_told_apart_and_the_rest_shares_the_header() -> None:
    random = np.random.default_rng(0)
    header, prompts = random.integers(0, 97, 25), [random.integers(0, 97, 60) for _ in range(6)]
    texts = []
    for number in range(72):
        prompt = prompts[number % 6] if number < 60 else random.integers(0, 97, 60)
        texts.append(np.concatenate([header, prompt, random.integers(0, 97, 20)]))
    ids = np.concatenate(texts).astype(np.int32)
    supervised = np.arange(len(ids)) % 105 > 95
    data = replace(DATA, token_ids=ids, supervised=supervised, offsets=105 * np.arange(73))
    found = find_beginnings(data)
    assert found is not None
    assert found.sizes.tolist() == [0] + [85] * 6 + [25]
    assert np.bincount(found.families).tolist() == [0] + [10] * 6 + [12]


def test_a_beginning_that_is_learnt_from_or_hardly_saves_anything_is_left_alone() -> None:
    learnt = random_data(LENGTHS, beginning=COMMON)
    learnt.supervised[learnt.offsets[:-1] + 3] = True
    assert find_beginnings(learnt) is None
    assert find_beginnings(random_data(LENGTHS, beginning=LEAST_TOKENS - 1)) is None
    assert find_beginnings(random_data([400] * 4, beginning=20)) is None  # 60 of 1,600 tokens


def test_an_example_that_learns_from_what_others_only_read_is_no_member() -> None:
    data = random_data(LENGTHS, beginning=COMMON)
    data.supervised[data.offsets[3] + 4] = True
    found = find_beginnings(data)
    assert found is not None
    assert found.families.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_it_is_kept_beside_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(LENGTHS, beginning=COMMON, without=[2])
    data.save(tmp_path)
    monkeypatch.setattr("trainer.beginning.find_beginnings", lambda data: pytest.fail("looked for again"))
    opened = TokenizedDataset.load(tmp_path).beginnings
    assert opened is not None
    assert opened.sizes.tolist() == [0, COMMON]
    assert opened.families.tolist() == [1, 1, 0] + [1] * 5


def test_that_there_is_none_is_kept_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_data(LENGTHS).save(tmp_path)
    monkeypatch.setattr("trainer.beginning.find_beginnings", lambda data: pytest.fail("looked for again"))
    assert TokenizedDataset.load(tmp_path).beginnings is None


# --- batch plans ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    own=st.lists(st.integers(1, 40), min_size=4, max_size=40),
    size=st.integers(2, 16),
    packed=st.integers(20, 200),
    micro=st.integers(1, 4),
    without=st.sets(st.integers(0, 39), max_size=6),
)
def test_a_plan_counts_the_beginning_once_a_row_and_collating_does_too(
    own: list[int], size: int, packed: int, micro: int, without: set[int]
) -> None:
    others = [one for one in sorted(without) if one < len(own)]
    data = random_data([COMMON + more for more in own], beginning=COMMON, without=others)
    plan = plan_of(data, packed=packed, size=size, micro=micro)
    assert sorted(plan.order.tolist()) == list(range(len(own)))
    shapes = plan.micro_shapes(data.lengths)
    for number in range(plan.num_micro_batches):
        rows = plan.rows_of_micro_batch(number)
        batch = collate(rows, data)
        assert batch.input_ids.shape == (int(shapes.rows[number]), int(shapes.width[number]))
        assert batch.num_tokens == int(shapes.tokens[number])
        assert len(batch.targets) == int(data.num_supervised[np.concatenate(rows)].sum())
        for row in rows:
            assert len(row) == 1 or data.row_tokens(row) <= packed
    whole = plan_of(data, packed=packed, size=size, micro=micro, shared=False)
    assert not whole.shares_beginnings
    assert int(whole.micro_shapes(data.lengths).tokens.sum()) == int(data.lengths.sum())


def test_a_row_holds_no_more_documents_than_attention_has_memory_for() -> None:
    data = random_data([COMMON + 1] * 400, beginning=COMMON)
    plan = plan_of(data, packed=40, size=400)
    whole = plan.per_micro_batch(data.lengths)
    assert int(whole.max()) <= MOST_SPREAD * 40
    assert int(plan.micro_shapes(data.lengths).width.max()) < 40  # so that it is this that ends a row


def test_a_plan_of_an_earlier_version_is_read_and_has_the_same_digest(tmp_path: Path) -> None:
    plan = plan_of(DATA, packed=64, shared=False)
    path = tmp_path / "plan.npz"
    plan.save(path)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive if name != "saved"}
    np.savez_compressed(path, **arrays)
    opened = BatchPlan.load(path)
    assert not opened.shares_beginnings
    assert opened.digest() == plan.digest() != plan_of(DATA, packed=64).digest()


def test_rows_of_an_earlier_plan_are_made_as_it_counts_them() -> None:
    plan = plan_of(DATA, packed=64, shared=False)
    data = DATA.as_planned(shares_beginnings=plan.shares_beginnings)
    shapes = plan.micro_shapes(data.lengths)
    widths = [collate(plan.rows_of_micro_batch(one), data).input_ids.shape[1] for one in range(plan.num_micro_batches)]
    assert widths == shapes.width.tolist()


# --- the same gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["one by one", "in groups", "masked", "masked, eager"])
@pytest.mark.parametrize("family", APART)
def test_the_gradient_is_that_of_one_document_a_row(family: str, way: str) -> None:
    is_apart = not way.startswith("masked")
    kind = "eager" if way.endswith("eager") else "sdpa"
    model = with_lora(small_model(family, attention=kind, sliding_window=8 if is_apart else 300))
    if kind == "sdpa":
        documents.use(model, apart=is_apart)
    made = (lambda *given: grouped(collate(*given))) if way == "in groups" else collate
    single = plan_of(DATA, packed=None, micro=8, shared=False)
    reference = gradients(model, DATA, single)
    for packed, micro in ((60, 1), (400, 1), (60, 2)):
        plan = plan_of(DATA, packed=packed, micro=micro)
        assert int(plan.saved.sum()) > 0
        for one, other in zip(reference, gradients(model, DATA, plan, made), strict=True):
            assert float((one - other).norm()) <= 1e-6 * float(one.norm())
    assert min(float(one.norm()) for one in reference) > 0


@pytest.mark.parametrize("way", ["one by one", "in groups"])
def test_examples_of_several_families_and_of_none_share_a_row(way: str) -> None:
    data = two_prompts()
    model = with_lora(small_model("mistral"))
    documents.use(model, apart=True)
    reference = gradients(model, data, plan_of(data, packed=None, size=12, shared=False))
    plan = plan_of(data, packed=800, size=12)
    assert plan.saved.tolist() == [5 * 50 + 3 * 9]
    made = (lambda *given: grouped(collate(*given))) if way == "in groups" else collate
    for one, other in zip(reference, gradients(model, data, plan, made), strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(one.norm())


@pytest.mark.parametrize("way", ["one by one", "in groups"])
def test_examples_without_it_keep_their_gradient(way: str) -> None:
    data = random_data(LENGTHS, beginning=COMMON, without=[1, 4, 6])
    model = with_lora(small_model("mistral"))
    documents.use(model, apart=True)
    made = (lambda *given: grouped(collate(*given))) if way == "in groups" else collate
    reference = gradients(model, data, plan_of(data, packed=None, shared=False))
    plan = plan_of(data, packed=300, micro=2)
    assert plan.num_micro_batches == 1
    assert plan.saved.tolist() == [4 * COMMON]
    for one, other in zip(reference, gradients(model, data, plan, made), strict=True):
        assert float((one - other).norm()) <= 1e-6 * float(one.norm())


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_the_loss_is_that_of_one_document_a_row_also_where_positions_are_learnt(family: str) -> None:
    model = small_model(family).eval()
    documents.use(model, apart=True)
    row = np.arange(len(DATA))
    together = float(token_losses(model, collate([row], DATA)).detach())
    alone = sum(float(token_losses(model, collate([row[one : one + 1]], DATA)).detach()) for one in row)
    assert together == pytest.approx(alone, rel=1e-10)


# --- and a model that it is not for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["one by one", "in groups"])
def test_rows_that_share_are_what_is_compared_before_packing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "in groups":
        monkeypatch.setattr(MicroBatch, "to", grouped)
    model = with_lora(small_model("mistral")).float()
    documents.use(model, apart=True)
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda _m, _p, named: seen.append(named.get("documents")), with_kwargs=True)
    assert packing_agrees(model, DATA, device="cpu", precision="fp32", packed_length=100) is None
    if way == "one by one":
        assert any(before == COMMON for one in seen if one is not None for *_, before in one)
    else:
        assert any(one.repeated for one in seen if one is not None)


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=3),
    examples=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=2, max_size=8),
    packed=st.integers(4, 60),
)
def test_what_is_compared_is_a_row_wherever_two_examples_share_one(
    sizes: list[int], examples: list[tuple[int, int]], packed: int
) -> None:
    """Else the run would take it that nothing is packed, and would not know how its documents are kept apart."""
    families = np.array([min(family, len(sizes)) for family, _ in examples], dtype=np.int32)
    common = np.array([0, *sizes])
    data = random_data([int(common[family]) + own for family, (_, own) in zip(families, examples, strict=True)])
    data = replace(data, families=families, sizes=common)
    chosen = _documents(data, np.arange(len(data)), packed)
    assert len(chosen) == len(set(chosen.tolist()))
    assert data.row_tokens(chosen) <= packed or len(chosen) < 2
    usable = np.flatnonzero(data.lengths > 1).tolist()
    pairs = [[one, other] for one in usable for other in usable if one < other]
    assert (len(chosen) > 1) == any(data.row_tokens(pair) <= packed for pair in pairs)


def test_a_document_that_does_not_see_what_its_row_begins_with_is_refused() -> None:
    model = small_model("llama").float()
    documents.use(model, apart=True)
    real = model.forward

    def forward(**named: Any) -> Any:
        if named.get("documents") is not None:
            named["documents"] = tuple((*one[:3], 0, 0) for one in named["documents"])
        return real(**named)

    model.forward = forward
    assert "packed logits differ" in str(packing_agrees(model, DATA, device="cpu", precision="fp32"))


def test_a_mask_takes_the_place_of_documents_where_the_model_does_not_attend_to_them_apart() -> None:
    model = small_model("llama")
    documents.use(model, apart=False)
    named = model_arguments(model, collate([np.array([1, 3]), np.array([2])], DATA))
    assert named["attention_mask"].shape == (2, 1, 25, 25)
    seen = named["attention_mask"][0, 0]
    assert seen[15 + 1].nonzero().flatten().tolist() == [*range(COMMON), 15, 16]  # beginning, then its own
    assert seen[14].nonzero().flatten().tolist() == list(range(15))
    assert "attention_mask" not in model_arguments(model, collate([np.array([0])], DATA))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompted(chat_file: Path, tmp_path: Path) -> DataSpec:
    """The chats, each behind the same system prompt."""
    path = tmp_path / "prompted.jsonl"
    system = {"role": "system", "content": "You answer in one sentence, and say so where you do not know."}
    chats = [json.loads(line) for line in chat_file.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**chat, "messages": [system, *chat["messages"]]}) for chat in chats]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataSpec(source=str(path))


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_packed_run_computes_a_system_prompt_once_a_row_and_learns_the_same(
    make_run: Any, prompted: DataSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, widths = loop.steps.micro_step, []

    def step(stepper: Any, batch: MicroBatch, *, scale: float) -> Any:
        widths.append(batch.input_ids.shape[1])
        return real(stepper, batch, scale=scale)

    monkeypatch.setattr(loop.steps, "micro_step", step)
    alone = make_run("alone", data=prompted)
    packed = make_run("packed", data=prompted, packing=True, packed_length=256)
    earlier = make_run("earlier", data=prompted, packing=True, packed_length=256)
    off = make_run("off", data=prompted, packing=True, packed_length=256, share_beginnings=False)
    job = Job.read(earlier / "job.json")
    data = prepare_data(job.data, model=job.model, max_length=job.preset.max_length, seed=job.seed)
    whole = plan_job(job, data.as_planned(shares_beginnings=False)).plan
    whole.save(earlier / "batch_plan.npz")  # of a version that did not share
    for run in (alone, packed, earlier, off):
        widths.clear()
        train(run)
        assert widths == BatchPlan.load(run / "batch_plan.npz").micro_shapes(data.lengths).width.tolist()
    assert losses_of(packed) == pytest.approx(losses_of(alone), rel=1e-4)
    assert losses_of(off) == losses_of(earlier)
    assert losses_of(earlier) == pytest.approx(losses_of(alone), rel=1e-4)
    tokens = [
        int(BatchPlan.load(run / "batch_plan.npz").micro_shapes(data.lengths).tokens.sum()) for run in (packed, alone)
    ]
    assert tokens[0] < 0.8 * tokens[1]
    told = {
        run.name: " ".join(json.loads((run / "record.json").read_text(encoding="utf-8"))["notes"])
        for run in (packed, alone, earlier, off)
    }
    assert "all examples begin with the same" in told["packed"]
    assert f"{1 - tokens[0] / tokens[1]:.0%} fewer tokens" in told["packed"]
    assert "begin with the same" not in told["alone"] + told["earlier"] + told["off"]


def test_it_can_be_turned_off_and_the_command_that_is_printed_says_so(prompted: DataSpec, tiny_model: Path) -> None:
    words = ["--run", "recommended", "--dataset", prompted.source, "--model", str(tiny_model), "--packing", "--dry-run"]
    said = [CliRunner().invoke(cli, [*words, *more]) for more in ([], ["--no-share-beginnings"])]
    assert [one.exit_code for one in said] == [0, 0]
    assert "begin with the same" in said[0].output
    assert "begin with the same" not in said[1].output
    for words in (["--packing", "--no-share-beginnings"], ["--packing"]):
        assert same_options(cli.make_context("plan", list(words)).params) == "".join(f" {word}" for word in words)


def test_workers_are_given_what_their_own_plan_counts() -> None:
    """Beside a plan whose rows share, one whose attention cannot: their rows differ in width."""
    shared = make_row(make_job(packing=True, packed_length=128), DATA)
    whole = make_row(make_job(packing=True, packed_length=128, attention="eager"), DATA)
    assert (shared.plan.shares_beginnings, whole.plan.shares_beginnings) == (True, False)
    for row in (shared, whole):
        shapes = row.plan.micro_shapes(DATA.lengths)
        for micro in range(row.plan.num_micro_batches):
            assert shape_of(row.plan, rows_of(row.plan, micro), DATA) == (shapes.rows[micro], shapes.width[micro])
            widths = [Worker(row.job, DATA, None).data.row_tokens(one) for one in rows_of(row.plan, micro)]
            assert max(widths) == shapes.width[micro]
