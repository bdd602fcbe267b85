"""What a measurement stands for: device, processor, versions, code, model and step, as a key. numpy only."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from planner.hardware import DeviceFacts, cpu_name
from planner.measurement import StepSignature
from presets import jsonio
from presets.errors import PlanError
from presets.home import expanded
from trainer.job import Job
from trainer.model import inspect_model
from trainer.tokens import TokenizedDataset

VERSIONED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "training-planner")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
# A change in one of these makes other timings, or keeps them in another form.
TIMED_SOURCES = (
    ("trainer", "step.py"), ("trainer", "model.py"), ("trainer", "collate.py"), ("trainer", "evaluate.py"),
    ("trainer", "lean.py"), ("trainer", "fused.py"), ("trainer", "documents.py"), ("trainer", "agreement.py"),
    ("trainer", "arrangement.py"), ("trainer", "grouped.py"), ("trainer", "halves.py"), ("trainer", "norms.py"),
    ("trainer", "rotary.py"), ("trainer", "kernels.py"), ("trainer", "entropy.py"), ("trainer", "alike.py"),
    ("trainer", "siblings.py"), ("trainer", "gated.py"), ("trainer", "packed.py"), ("trainer", "widths.py"),
    ("trainer", "beginning.py"),
    ("trainer", "checkpoint.py"), ("trainer", "feed.py"), ("trainer", "compiled.py"), ("trainer", "process.py"),
    ("planner", "worker.py"), ("planner", "workload.py"), ("planner", "prober.py"), ("planner", "measurement.py"),
    ("planner", "strata.py"), ("planner", "stopwatch.py"), ("planner", "memory.py"), ("planner", "first_times.py"),
    ("planner", "measured.py"), ("planner", "sequence.py"),
)  # fmt: skip
# A change in one of these makes another prediction of the same timings.
ESTIMATED_SOURCES = (
    ("planner", "estimate.py"), ("planner", "measure.py"), ("planner", "steadiness.py"), ("planner", "intervals.py"),
    ("planner", "outliers.py"), ("planner", "slope.py"), ("planner", "estimator.py"), ("planner", "decks.py"),
    ("planner", "fixed.py"), ("planner", "works.py"), ("planner", "first_times.py"),
    ("planner", "rounds.py"),
)  # fmt: skip
NOT_SHAPE = ("_name_or_path", "transformers_version")  # of a config.json


@dataclass(slots=True, eq=False)
class Keys:
    """Keys of jobs on one machine as it is now; what they share is gathered once."""

    facts: DeviceFacts
    _machine: dict[str, Any] | None = None
    _models: dict[tuple[str, bool], Any] = field(default_factory=dict)
    _data: dict[TokenizedDataset, str] = field(default_factory=dict)

    def of_runs(self, job: Job) -> str | None:
        """Runs of jobs with the same key are comparable; None where the model's shape is not known."""
        parts = self._parts(job)
        if parts is None:
            return None
        return _digest({**parts, "packing": job.packing, "estimate": _source_digest(ESTIMATED_SOURCES)})

    def of_measurement(self, job: Job, disk: str | None = None) -> str | None:
        """A measurement stands for jobs with the same key, as far as their batches allow; None as for `of_runs`.

        Args:
            job: any one of a step signature: how it forms its rows is compared row by row.
            disk: on which a checkpoint was or would be timed; None where none is.
        """
        parts = self._parts(job)
        return None if parts is None else _digest({**parts, "max_length": job.preset.max_length, "disk": disk})

    def of_data(self, data: TokenizedDataset) -> str:
        """Data with the same key takes the same time: lengths, how much of each is learnt from, what examples share."""
        if data not in self._data:
            sha = hashlib.sha256(np.ascontiguousarray(data.lengths).data)
            sha.update(np.ascontiguousarray(data.num_supervised).data)
            if data.beginnings is not None:
                sha.update(f"{data.beginnings.sizes.tolist()}".encode())
                sha.update(np.ascontiguousarray(data.beginnings.families).data)
            self._data[data] = sha.hexdigest()[:16]
        return self._data[data]

    def _parts(self, job: Job) -> dict[str, Any] | None:
        self._machine = self._machine or machine(self.facts)
        place = (job.model, job.trust_remote_code)
        if place not in self._models:
            self._models[place] = model_shape(*place)
        shape = self._models[place]
        if shape is None:
            return None
        signature = jsonio.to_plain(StepSignature.of(job))
        del signature["model"]  # a folder's name says nothing of what is in it
        return {
            "machine": self._machine,
            "model": shape,
            "signature": signature,
            "num_devices": job.num_devices,
        }


def machine(facts: DeviceFacts) -> dict[str, Any]:
    """What a timing depends on beside the job: device, processor, versions, our own code."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "device": [facts.name, facts.kind, facts.memory_bytes, facts.driver, facts.num_devices, facts.capability],
        "cpu": [cpu_name(), os.cpu_count(), len(affinity(0)) if affinity else None],
        "system": [platform.system(), platform.machine(), list(sys.version_info[:2])],
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "versions": {name: _version(name) for name in VERSIONED},
        "sources": _source_digest(TIMED_SOURCES),
    }


def model_shape(model: str, trust_remote_code: bool = False) -> dict[str, Any] | None:
    """What decides the cost of a model's step: its configuration and, where that runs, its code. None: not known.

    The weights' values cost nothing, so only whether there are any is part of it: loading them takes its time.
    """
    folder = expanded(model)
    if not folder.is_dir():
        found = _hub_snapshot(model)
        if found is None:
            return None
        folder = found
    try:
        content = jsonio.loads((folder / "config.json").read_text(encoding="utf-8"), strict=False)
        code = [path.read_bytes() for path in sorted(folder.glob("*.py"))] if trust_remote_code else []
        has_weights = inspect_model(str(folder)).has_weights
    except (OSError, ValueError, PlanError):
        return None
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in NOT_SHAPE}
    return {"config": content, "has_weights": has_weights, "code": hashlib.sha256(b"\0".join(code)).hexdigest()}


def _hub_snapshot(name: str) -> Path | None:
    """The folder of a hub model that was fetched before, found without importing what fetches it."""
    home = expanded(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    hub = expanded(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = hub / f"models--{name.replace('/', '--')}"
    try:
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    return snapshot if snapshot.is_dir() else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source_digest(sources: Sequence[tuple[str, str]]) -> str:
    sha = hashlib.sha256()
    for package, name in sources:
        content = resources.files(package).joinpath(name).read_bytes()
        sha.update(f"{package}/{name} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
