"""How long it takes, whether it fits, and which one to choose.

    import planner
    report = planner.plan(dataset="messages.jsonl", model="./my-model")

`plan`, `PlanReport`, `Row` and `PlanError` are the names to rely on. Importing this imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.library import plan as plan
    from planner.report import PlanReport as PlanReport
    from planner.report import Row as Row
    from presets.errors import PlanError as PlanError

__all__ = ["PlanError", "PlanReport", "Row", "plan"]

_HOMES = {
    "plan": "planner.library",
    "PlanReport": "planner.report",
    "Row": "planner.report",
    "PlanError": "presets.errors",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: the command line, which is imported through here, should start at once.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'planner' has no attribute '{name}'")
