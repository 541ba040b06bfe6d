"""Where a run's numbers go: a file for machines, and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

from ddptrain.files import replace_text

Scalars = dict[str, float]


class Logger(Protocol):
    """Takes scalars at an optimiser step. Only rank 0 has loggers."""

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        """Record ``scalars`` of ``split`` (train, val, test) after ``step`` optimiser steps."""

    def close(self) -> None:
        """Flush, and write nothing afterwards."""


class JsonLines:
    """One object a line, each step once over all resumes; ``metrics.jsonl`` is one such file."""

    def __init__(self, file: Path, resumed_at: int) -> None:
        if file.exists():
            kept = [line for line in read_json_lines(file) if line["step"] <= resumed_at]
            replace_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        self.stream = file.open("a", buffering=1)
        self.is_empty = file.stat().st_size == 0

    def write(self, line: dict[str, Any]) -> None:
        self.stream.write(json.dumps(line) + "\n")

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        self.write({"step": step, "split": split, **finite})

    def close(self) -> None:
        self.stream.close()


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line cut short by a crash is left out."""
    objects = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return objects


class TensorBoard:
    """Event files: curves against optimiser steps, the config as text, hparams at the end."""

    def __init__(self, folder: Path, resumed_at: int, config_text: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Also from step 0: a start that saved nothing may have left curves.
        begun_before = any(folder.glob("events.*"))
        purge = resumed_at + 1 if resumed_at else 0 if begun_before else None
        self.writer = SummaryWriter(str(folder), purge_step=purge)
        if not resumed_at:
            self.writer.add_text("config", f"```yaml\n{config_text}\n```")

    def log(self, step: int, split: str, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def finish(self, step: int, hparams: dict[str, Any], outcome: Scalars) -> None:
        """Write the run as a row of the HPARAMS tab: its config and ``outcome``."""
        from torch.utils.tensorboard.summary import hparams as summary

        plain = {
            k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()
        }
        writer = self.writer._get_file_writer()  # type: ignore[no-untyped-call]
        for part in summary(plain, outcome):  # type: ignore[no-untyped-call]
            writer.add_summary(part)
        for name, value in outcome.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
