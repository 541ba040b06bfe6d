"""A config as a run stores it: read back, filled up with what was no key yet, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ddptrain.compose import config_trees
from ddptrain.config import EXECUTION_ONLY, Config, flatten, to_plain
from ddptrain.errors import Refused, TrainingError
from ddptrain.files import LASTING

SETTINGS = (
    "train", "parallel", "checkpoint", "log", "resilience", "data", "eval", "launch", "slurm", "run"
)  # fmt: skip
"""Sections whose keys are the framework's own; the others are built by what they name."""


def defaults() -> dict[str, Any]:
    """The framework's own keys and sections, as the built-in tree has them."""
    tree = config_trees()[0]
    root = read_yaml(tree / "config.yaml")
    chosen = {group: name for entry in root.pop("defaults") if isinstance(entry, dict)
              for group, name in entry.items() if name is not None}  # fmt: skip
    return {"restarts": root["restarts"]} | {
        section: read_yaml(tree / section / f"{chosen[section]}.yaml")
        if chosen.get(section)
        else root[section]
        for section in SETTINGS
    }


def fill(known: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """``plain``, with those of the ``known`` entries that it lacks."""
    filled = {
        key: fill(known[key], value)
        if isinstance(value, dict) and isinstance(known.get(key), dict)
        else value
        for key, value in plain.items()
    }
    return {**known, **filled}


def read_yaml(file: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(file.read_text())
    except LASTING as error:
        raise Refused(f"{file.parent}: not a run: {error.strerror}: {file}") from None
    except OSError as error:  # a disk that is away, and may be back at the next try
        raise TrainingError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not YAML, and no text: {error}; nothing of it was read") from None
    except ConstructorError as error:
        where = error.problem_mark
        raise Refused(
            f"{file}: line {where.line + 1 if where else '?'}: {error.problem}; a config holds "
            "plain values, and no tag was followed, because one can run code; take it out"
        ) from None
    except yaml.YAMLError as error:
        raise Refused(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise Refused(f"{file}: not a config")
    return plain


def differences(stored: Config, now: Config) -> list[str]:
    """``key: stored → now`` for every key that changes what is computed."""
    return changes(computed(stored), computed(now))


def computed(config: Config) -> dict[str, Any]:
    """The keys and values that decide what a run computes."""
    flat = flatten(to_plain(config))
    # By these the best of several restarts is told, to which schedules and guards hold.
    told_by = ("checkpoint.metric", "checkpoint.mode") if config.restarts > 1 else ()
    return {k: v for k, v in flat.items() if k in told_by or not k.startswith(EXECUTION_ONLY)}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: old → new`` for every key of two flat mappings that differs."""
    return [
        f"{key}: {old.get(key, 'not set')!s} → {new.get(key, 'not set')!s}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
