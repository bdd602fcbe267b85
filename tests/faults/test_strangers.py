"""Files from strangers: a model folder, a run folder or a preset runs no code, hangs nothing and shows nothing else."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_tokenizer import CHATML, make_tokenizer

from presets.errors import ModelError, PlanError, PresetError, RunError, SettingsError
from trainer import templates
from trainer.data import load_tokenizer, prepare_data
from trainer.job import DataSpec, Job
from trainer.model import inspect_model
from trainer.templates import ChatTemplate

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = [path for room in ("planner", "trainer", "presets") for path in sorted((REPOSITORY / room).rglob("*.py"))]
CHAT = {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four"}]}
MESSAGES = (("user", "two?"), ("assistant", "four"))


# -- nothing unpickles -----------------------------------------------------------------------------------------------

UNPICKLING = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def calls_of(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_code_of_ours_unpickles_or_evaluates_what_it_reads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name.split(".")[0] for alias in node.names} | {
                str(getattr(node, "module", "")).split(".")[0]
            }
            assert not names & UNPICKLING, f"{path}:{node.lineno}"
    for line, name, call in calls_of(path):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in ("eval", "exec", "torch.load", "yaml.load", "os.system"), f"{path}:{line}"
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle") == "False", f"{path}:{line}"
        if name.endswith("ForCausalLM.from_pretrained"):
            assert given.get("use_safetensors") == "True", f"{path}:{line}"
        if name.endswith(("Tokenizer.from_pretrained", "Config.from_pretrained", "CausalLM.from_pretrained")):
            assert "trust_remote_code" in given or "folder" in ast.unparse(call.args[0]), f"{path}:{line}"


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "boom")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path, tiny_model: Path) -> None:
    import pickle

    marker = tmp_path / "boom"
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "adapter_model.bin"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        shutil.copy(tiny_model / "config.json", folder)
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(ModelError) as caught:
            inspect_model(str(folder))
        assert f"its weights are pickled ({name}), which can run code when loaded. Convert them" in str(caught.value)
        assert "save_pretrained" in str(caught.value)
    assert not marker.exists()


def test_arrays_with_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    from presets.errors import DataError
    from trainer.batching import BatchPlan
    from trainer.tokens import TokenizedDataset

    marker = tmp_path / "boom"
    objects = np.array([Bomb(marker)], dtype=object)
    names = BatchPlan.__dataclass_fields__
    np.savez(tmp_path / "batch_plan.npz", allow_pickle=True, **dict.fromkeys(names, objects))
    with pytest.raises(RunError):
        BatchPlan.load(tmp_path / "batch_plan.npz")
    np.save(tmp_path / "token_ids.npy", objects, allow_pickle=True)
    with pytest.raises(DataError):
        TokenizedDataset.load(tmp_path)
    assert not marker.exists()


# -- code in a model's folder ----------------------------------------------------------------------------------------


@pytest.fixture
def trojan(tmp_path: Path, tiny_model: Path) -> Path:
    """A model folder whose own code, wherever transformers might look for it, writes a file called `boom`."""
    folder = tmp_path / "trojan"
    shutil.copytree(tiny_model, folder)
    boom = f"from pathlib import Path\nPath({str(tmp_path / 'boom')!r}).write_text('boom')\n"
    (folder / "evil.py").write_text(
        boom + "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
        "class EvilConfig(C): model_type = 'evil'\n"
        "class EvilModel(M): config_class = EvilConfig\nclass EvilTokenizer(T): pass\n"
    )
    for name in ("sitecustomize.py", "torch.py", "transformers.py", "__init__.py"):
        (folder / name).write_text(boom)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def test_code_in_a_model_folder_is_not_run_unless_it_is_trusted(
    tmp_path: Path, trojan: Path, chat_file: Path, make_job: Callable[..., Job]
) -> None:
    from trainer.model import load_base, load_model

    job = make_job(model=str(trojan))
    for attempt in (
        lambda: load_tokenizer(str(trojan)),
        lambda: prepare_data(job.data, model=str(trojan), max_length=64, cache=tmp_path),
        lambda: load_model(job, need_weights=True),
        lambda: load_base(job),
    ):
        with pytest.raises(ModelError) as caught:
            attempt()
        assert "--trust-remote-code" in str(caught.value)
        assert not (tmp_path / "boom").exists()
    # The trap is a real one: whoever trusts it runs it.
    with contextlib.suppress(ModelError):
        load_tokenizer(str(trojan), trust_remote_code=True)
    assert (tmp_path / "boom").exists()


def test_a_plan_and_its_worker_run_no_code_of_a_model_folder(tmp_path: Path, trojan: Path) -> None:
    done = plan(["--model", str(trojan), "--preset", "baseline", "--dataset", "100", "--budget", "1"], folder=trojan)
    assert done.returncode == 1
    assert "comes with code of its own" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "boom").exists()


def plan(
    arguments: list[str], folder: Path, *, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **(environ or {})}
    code = "from planner.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "told",
    [
        b"[1]", b"null", b'"x"', b"{", b"\xff", b"[" * 100_000, b'{"tokenizer_class": 7}',
        b'{"tokenizer_class": "os.system"}', b'{"tokenizer_class": "GPT2Model", "auto_map": 3}',
        b'{"added_tokens_decoder": {"a": 1}}', b'{"added_tokens_decoder": {"1": {"content": {"__type": "x"}}}}',
        b'{"model_max_length": ' + b"9" * 5000 + b"}", b'{"chat_template": 7}', b'{"chat_template": [{"name": 1}]}',
        b'{"bos_token": [[[]]], "eos_token": {"a": 1}}', b'{"extra_special_tokens": 5}', b'{"padding_side": "up"}',
    ],
    ids=lambda told: told[:40].decode("latin-1"),
)  # fmt: skip
def test_a_strange_tokenizer_config_is_one_clear_error_or_does_no_harm(tmp_path: Path, told: bytes) -> None:
    folder = tmp_path / "model"
    make_tokenizer(CHATML, eos="<|im_end|>").save_pretrained(str(folder))
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 400}')
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_bytes(told)
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT))
    said = ""
    try:
        prepare_data(DataSpec(source=str(tmp_path / "a.jsonl")), model=str(folder), max_length=64, cache=tmp_path)
    except PlanError as reason:
        said = str(reason)
    assert len(said) < 900 + 2 * len(str(folder))


@pytest.mark.parametrize(
    "content", [b"[1]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"]
)
def test_a_strange_model_config_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        inspect_model(str(tmp_path))


# -- chat templates --------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch boom') }}",
    "{{ self._TemplateReference__context.environment.loader }}{{ joiner.__init__.__globals__ }}",
    "{{ messages.append.__self__.__class__.__base__ }}",
    "{% set x = namespace(a=1) %}{{ x.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__ }}{{ lipsum.__globals__['os'].popen('touch boom').read() }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ ('{0.__class__.__mro__}').format('x') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{% include 'secrets.txt' %}",
    "{% import 'os' as os %}{{ os.system('touch boom') }}",
]


def render(template: str) -> str:
    return ChatTemplate(make_tokenizer(template)).render(MESSAGES)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_reach_python(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secrets.txt").write_text("hf_secret")
    try:
        text = render(template)
    except (ModelError, templates.TemplateRefusal) as reason:
        text = str(reason)
    assert not re.search(r"<(class|function|module|built-in)|hf_secret|posix", text)
    assert not (tmp_path / "boom").exists()


def test_an_attempt_to_reach_python_is_told_as_such_and_names_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_tokenizer("{{ ''.__class__.__mro__ }}", eos="<|im_end|>").save_pretrained(str(folder))
    with pytest.raises(ModelError) as caught:
        ChatTemplate(load_tokenizer(str(folder))).render(MESSAGES)
    assert str(caught.value).startswith(f"{folder}: the chat template does what no template needs (access to attribute")
    assert "tokenizer_config.json or chat_template.jinja" in str(caught.value)


ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a power": "{% set n = messages | length + 7 %}{{ n ** (n ** n) > 1 }}",
    "a text as long as memory": "{{ ('a' * (10 ** (10 + messages | length))) | length }}",
    "a text of six gigabytes": "{{ ('a' * (3 * 10 ** 9 * (messages | length))) | length }}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a width": "{{ '%*d' | format(10 ** 10, 1) }}",
    "a huge list": "{{ (range(99999) | list) * 99999 }}",
    "constants": "{{ 'a' * 10 ** 12 }}{{ 9 ** 9 ** 9 }}",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits of memory are Linux's")
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_chat_template_that_never_ends_is_stopped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.3)
    before, limits = _peak(), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises((ModelError, templates.TemplateRefusal)) as caught:
        pytest.fail(f"rendered {len(render(ENDLESS[kind])):,} characters")
    assert len(str(caught.value)) < 500
    assert _peak() - before < 2.5 * 2**30
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert render(CHATML)  # and the next one has all its time again


def _peak() -> int:
    from trainer.process import peak_resident_bytes

    return peak_resident_bytes()


@pytest.mark.parametrize(
    ("kind", "spent"), [("nested loops", "10 seconds"), ("a text of six gigabytes", "1 GiB of memory")]
)
def test_what_was_spent_is_told_with_the_template_and_the_remedy(
    kind: str, spent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.3)
    with pytest.raises(
        ModelError, match=rf"chat template takes more than {spent} for one conversation. Mend or replace"
    ):
        render(ENDLESS[kind])


def test_the_clock_of_a_template_is_the_processors_and_leaves_no_alarm_behind() -> None:
    import signal
    import time

    from trainer.limits import limited

    with limited(seconds=0.2, room=1 << 30):
        time.sleep(0.5)  # a suspended machine makes nobody slow
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


# -- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".", "a\\b", "a\0b", "", "x" * 300])
def test_a_job_named_like_a_path_is_refused(make_job: Callable[..., Job], name: str) -> None:
    plain = json.loads(make_job().to_json()) | {"name": name}
    with pytest.raises(SettingsError, match="name is "):
        Job.from_json(json.dumps(plain))


@pytest.mark.parametrize(
    "name", ["../../evil", "a/b", "/etc/evil", "..", ".hidden", "a\nb", "A", "x" * 60, "yours", "-x"]
)
def test_a_new_preset_lies_in_the_users_folder_or_nowhere(tmp_path: Path, name: str) -> None:
    from presets.user import new_preset, user_folder

    with pytest.raises(PresetError):
        new_preset(name, "recommended")
    assert not user_folder().exists() or not list(user_folder().iterdir())


def test_a_model_or_data_path_of_a_job_is_read_and_never_written(
    tmp_path: Path, tiny_model: Path, make_run: Callable[..., Path]
) -> None:
    from trainer.loop import train

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, elsewhere)
    data = tmp_path / "data" / "a.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(CHAT) + "\n" for _ in range(40)))
    before = _content(elsewhere), _content(data.parent)
    run = make_run(model=str(elsewhere), data=DataSpec(source=str(data)))
    train(run, resume=False)
    assert (_content(elsewhere), _content(data.parent)) == before
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- a run folder from somebody else ---------------------------------------------------------------------------------


def test_an_adapter_of_pickled_weights_is_never_loaded(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    import pickle

    from trainer.finished import merge, open_finished

    run, marker = make_run(), tmp_path / "boom"
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM"}')
    (run / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    for attempt in (lambda: open_finished(run), lambda: merge(run, tmp_path / "merged")):
        with pytest.raises(RunError, match=r"adapter_model.safetensors"):
            attempt()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    for attempt in (lambda: open_finished(run), lambda: merge(run, tmp_path / "merged")):
        with pytest.raises(RunError, match=r"adapter_model.safetensors.*cannot be read"):
            attempt()
    assert not marker.exists()


@pytest.mark.parametrize("command", ["check", "chat", "merge", "--resume"])
def test_a_run_folder_cannot_give_itself_trust(command: str, make_run: Callable[..., Path]) -> None:
    import click

    from planner.cli import cli

    run = make_run(trust_remote_code=True)
    with pytest.raises((SettingsError, click.UsageError), match="--trust-remote-code"):
        cli.main([command, str(run)], standalone_mode=False)
