"""What is told of an explanation: a table on the screen and in files, facts, and pictures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from ddptrain.errors import TrainingError
from ddptrain.explain.attribution import INTEGRATED, Attributions
from ddptrain.files import replace_bytes
from ddptrain.observe.loggers import Picture
from ddptrain.observe.table import Column, plain
from ddptrain.observe.values import digits, printable

SHOWN = 20
"""Rows of a table on the screen; the file has all."""
PICTURES = {"features", "samples", "classes"}
WIDE = 6
"""Headers of more columns than these are broken."""


@dataclass
class Report:
    """``header`` and ``rows`` of the table, and pictures by the end of their files' names."""

    header: Sequence[str]
    rows: list[Sequence[Any]]
    pictures: dict[str, Picture] = field(default_factory=dict)

    def table(self) -> str:
        """The first rows, for the screen."""
        shown = self.rows[:SHOWN]
        is_wide = len(self.header) > WIDE
        columns = [
            Column(
                name.replace(" ", "\n" if is_wide else " "),
                [_cell(row[place]) for row in shown],
                _is_number(shown[0][place]),
            )
            for place, name in enumerate(self.header)
        ]
        left_out = len(self.rows) - len(shown)
        return plain(columns) + (f"\n… and {left_out} more" if left_out else "")

    def write(self, folder: Path, split: str, facts: dict[str, Any]) -> list[Path]:
        """Write all files, and return their paths. Raises ``TrainingError`` if that fails."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        table = [dict(zip(self.header, map(_plain, row), strict=True)) for row in self.rows]
        facts = {key: _plain(value) for key, value in facts.items()}
        content = json.dumps({**facts, "table": table}, indent=2, allow_nan=False) + "\n"
        files = {"csv": text.getvalue().encode(), "json": content.encode()}
        by_path = {folder / f"{split}.{suffix}": content for suffix, content in files.items()}
        by_path |= {folder / f"{split}-{n}.png": p.png for n, p in self.pictures.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, written in by_path.items():
                replace_bytes(path, written)
            for name in PICTURES - self.pictures.keys():  # of other inputs, from before
                (folder / f"{split}-{name}.png").unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(f"{folder} cannot be written to: {error.strerror}") from error
        return list(by_path)


def quality_of(found: Attributions) -> dict[str, float]:
    """How good the integrated gradients are, if there are any."""
    if INTEGRATED not in found.by_method:
        return {}
    changes, deltas = found.changes.double().abs(), found.deltas.double().abs()
    return {
        "mean_absolute_change": changes.mean().item(),
        "largest_convergence_delta": deltas.max().item(),
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _cell(value: object) -> str:
    return digits(value) if isinstance(value, float) else printable(str(value))


def _plain(value: Any) -> Any:
    """What JSON has: null for what is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
