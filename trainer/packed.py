"""Tells transformers whether a micro-batch's rows are packed, which it would otherwise ask the GPU.

Before every forward pass transformers looks whether positions begin anew in a row: it reads one number from the GPU,
and so waits until all that was launched before is done. The host then launches each micro-step into an idle GPU. Who
made the micro-batch knows the answer: with it the host launches one while the GPU still computes the one before.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_known: contextvars.ContextVar[bool | None] = contextvars.ContextVar("packed", default=None)


@contextlib.contextmanager
def known(*, packed: bool) -> Iterator[None]:
    """Within the block no forward pass looks for packed rows: they are, or none is."""
    _register()
    token = _known.set(packed)
    try:
        yield
    finally:
        _known.reset(token)


@functools.cache
def _register() -> None:
    """Let transformers find packed rows by what is known of them; once is enough. Versions that do not look stay so."""
    from transformers import masking_utils

    look = getattr(masking_utils, "find_packed_sequence_indices", None)
    if look is None:
        return

    @functools.wraps(look)
    def find(position_ids: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor | None:
        packed = _known.get()
        if packed is None:
            found: torch.Tensor | None = look(position_ids, *more, **named)
            return found
        return _documents(position_ids) if packed else None

    masking_utils.find_packed_sequence_indices = find


def _documents(position_ids: torch.Tensor) -> torch.Tensor:
    """Which document of its row each position belongs to, counted from 0: (rows, width) int64 of the same shape."""
    import torch

    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return begins.cumsum(-1)
