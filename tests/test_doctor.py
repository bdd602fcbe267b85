"""Every finding of `plan doctor`, from made-up machines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.doctor import GIB, Found, Machine, examine, look
from planner.hardware import DeviceFacts

CARD = ("NVIDIA GeForce RTX 2080 Ti", 11 * GIB)
CUDA = DeviceFacts(name=CARD[0], kind="cuda", memory_bytes=11 * GIB, free_bytes=10 * GIB)
WELL = Machine(
    python=(3, 12),
    system="Linux",
    packages=dict.fromkeys(
        ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib"), "1.0"
    ),
    torch_cuda="13.0",
    gpus=(CARD,),
    driver="580.10",
    device=CUDA,
    memory=(32 * GIB, 20 * GIB),
    disks={"runs (this folder)": 100 * GIB, "measurements and tokenised data": 100 * GIB},
)
CPU = DeviceFacts(name="a CPU", kind="cpu", memory_bytes=32 * GIB, free_bytes=20 * GIB)


def findings(**changes: object) -> list[Found]:
    return [one for one in examine(replace(WELL, **changes)) if one.state != "ok"]  # type: ignore[arg-type]


def test_a_well_machine_has_nothing_wrong() -> None:
    assert findings() == []
    assert findings(taken=3.0) == []  # beside a GPU it hardly matters
    assert any(CARD[0] in one.text for one in examine(WELL))


@pytest.mark.parametrize(
    ("changes", "state", "words", "remedy"),
    [
        ({"torch_cuda": None, "device": CPU}, "wrong", "a build without CUDA, beside NVIDIA", "pip install"),
        ({"driver": "525.60"}, "wrong", "too old for CUDA 13.0, which needs 580", "install NVIDIA driver 580"),
        ({"device": CPU}, "wrong", "none is visible to torch", "CUDA_VISIBLE_DEVICES"),
        ({"device": replace(CUDA, free_bytes=2 * GIB)}, "note", "another program holds", "nvidia-smi"),
        ({"disks": {"runs": 1 * GIB}}, "wrong", "only 1.0 GiB free", "--output"),
        ({"disks": {"runs": 5 * GIB}}, "note", "only 5.0 GiB free", "--output"),
        ({"disks": {"runs": None}}, "wrong", "cannot be written", "PLAN_HOME"),
        ({"packages": WELL.packages | {"bitsandbytes": None}}, "note", "no 4-bit", "pip install bitsandbytes"),
        ({"packages": WELL.packages | {"torch": None}}, "wrong", "not installed", "pip install torch"),
        ({"python": (3, 14)}, "note", "not tested", "3.12"),
        ({"hub_offline": True}, "note", "HF_HUB_OFFLINE", "unset"),
        (
            {"taken": 3.0, "gpus": (), "driver": None, "torch_cuda": None, "device": CPU},
            "note",
            "take 100% of the CPU's time",
            "close them",
        ),
    ],
)
def test_each_thing_that_is_not_well_comes_with_its_remedy(
    changes: dict[str, object], state: str, words: str, remedy: str
) -> None:
    (found,) = findings(**changes)
    assert found.state == state
    assert words in found.text
    assert remedy in (found.remedy or "")


def test_a_cpu_machine_is_well_too() -> None:
    assert findings(gpus=(), driver=None, torch_cuda=None, device=CPU) == []


def test_an_older_cuda_takes_an_older_driver() -> None:
    assert findings(torch_cuda="12.8", driver="570.1") == []


def test_this_machine_is_looked_at_and_told_of() -> None:
    from planner.cli import cli

    done = CliRunner().invoke(cli, ["doctor", "--json"])
    found = {one["what"]: one for one in json.loads(done.stdout)["findings"]}
    assert found["Python"]["text"].startswith("3.")
    assert found["torch"]["state"] in ("ok", "wrong")
    assert done.exit_code == int(any(one["state"] == "wrong" for one in found.values()))
    assert look().disks["runs (this folder)"]


def test_a_folder_that_cannot_be_written_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("PLAN_HOME", str(in_the_way / "home"))
    assert look().disks["measurements and tokenised data"] is None
