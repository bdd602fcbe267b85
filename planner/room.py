"""Whether the disk has room for what a run will write, before minutes are spent on measuring for it. No torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from presets.home import expanded
from trainer.disk import bytes_to_write, require_room
from trainer.job import Job

LONGEST_HEADER = 100 << 20  # bytes; safetensors' own limit


def require_room_for(job: Job, folder: Path, num_trainable: int | None = None) -> None:
    """Refuse a run whose checkpoints and result will not fit on the disk of `folder`, which need not exist yet.

    Args:
        num_trainable: values that are trained. None: not known before the model was loaded, then a lower bound.

    Raises:
        RunError: with needed and free bytes.
    """
    require_room(folder, bytes_to_write(num_trainable or least_trainable(job), job.keep_checkpoints))


def least_trainable(job: Job) -> int:
    """Values that a job trains at least: all weights of a model folder in full fine-tuning, else nothing is promised.

    An adapter's size follows from the layers that it is added to, which only the loaded model tells. It is small.
    """
    if job.preset.adapter == "lora":
        return 0
    return sum(_values_in(file) for file in expanded(job.model).glob("*.safetensors"))


def _values_in(file: Path) -> int:
    """Values in a safetensors file, by its header; 0 where it has none that can be read."""
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, LONGEST_HEADER)))
        return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return 0
