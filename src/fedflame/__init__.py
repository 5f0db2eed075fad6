"""Federated fine-tuning of sparse-mixture-of-experts language models on unequal machines.

`run`, `plan`, `evaluate` and `export` do what the commands of the same names do. Each name is loaded when it
is first used, so that `import fedflame` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedflame.config.load import load_config
    from fedflame.config.run_config import RunConfig
    from fedflame.errors import UserError
    from fedflame.experiment.api import evaluate, export, plan, run
    from fedflame.experiment.finished_run import Run
    from fedflame.experiment.plan import Plan
    from fedflame.strategies.base import Strategy
    from fedflame.training.scores import Scores

__all__ = [
    "Plan",
    "Run",
    "RunConfig",
    "Scores",
    "Strategy",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "plan",
    "run",
]

_HOME = {
    "Plan": "fedflame.experiment.plan",
    "Run": "fedflame.experiment.finished_run",
    "RunConfig": "fedflame.config.run_config",
    "Scores": "fedflame.training.scores",
    "Strategy": "fedflame.strategies.base",
    "UserError": "fedflame.errors",
    "evaluate": "fedflame.experiment.api",
    "export": "fedflame.experiment.api",
    "load_config": "fedflame.config.load",
    "plan": "fedflame.experiment.api",
    "run": "fedflame.experiment.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
