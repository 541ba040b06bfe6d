"""How values of configs and metrics are told where there is little room."""

from __future__ import annotations

import json
import math
from typing import Any

NOT_SET = "–"
LARGEST = 1e100
"""No axis goes further: what matplotlib computes with its ends would overflow."""


def number(value: object) -> float | None:
    """A number that has a place on an axis; None if it is anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value == 0 or 1 / LARGEST < abs(value) < LARGEST else None


def measured(value: object) -> float:
    """A metric from a file of JSON, where one that is not finite is null."""
    if isinstance(value, float) and math.isfinite(value):
        return value
    known = number(value)
    return math.nan if known is None else known


def digits(value: float) -> str:
    """Four significant digits, zeros at the end as well: what is below each other lines up."""
    return f"{value:#.4g}".rstrip(".")


def printable(text: str) -> str:
    """A name from somebody's file, which may hold what a terminal would obey."""
    return text if text.isprintable() else repr(text)


def shown(config: dict[str, Any], key: str) -> str:
    """The value of a key of a flat config, as one would type it on the command line."""
    return _typed(config[key]) if key in config else NOT_SET


def _typed(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{_typed(key)}:{_typed(inner)}' for key, inner in value.items())}}}"
    return printable(str(value)) or "''"
