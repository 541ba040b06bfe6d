"""Distributed data-parallel training for PyTorch: a run is a pure function of its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddptrain.loop import Trainer
    from ddptrain.tasks.task import Loss, Task

__all__ = ["Loss", "Task", "Trainer"]
__version__ = "0.1.0"

_HOMES = {"Loss": "ddptrain.tasks.task", "Task": "ddptrain.tasks.task", "Trainer": "ddptrain.loop"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: commands that need no torch do not load it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ddptrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
