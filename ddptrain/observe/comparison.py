"""Compares runs: which keys of their configs differ, what came of each, and which is the best."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ddptrain.config import Config, flatten
from ddptrain.errors import Refused, TrainingError
from ddptrain.files import read_json
from ddptrain.observe.loggers import Scalars, read_json_lines
from ddptrain.observe.values import measured, number, printable, shown
from ddptrain.run_directory import RunDirectory

WHERE_IT_LIES = (
    "run.", "checkpoint.dir", "launch.interface", "slurm.account", "slurm.partition", "slurm.qos",
    "slurm.time", "slurm.memory", "slurm.sbatch", "slurm.srun", "slurm.setup", "slurm.python",
    "slurm.interface", "launch.timeout", "launch.check", "launch.bind_cpus",
)  # fmt: skip
"""Keys that begin so say where a run lies or which machines take it: no reason for its metrics."""
EXPECTED = "expected a run's directory (with a config.yaml), or a folder with runs below it"
Curve = dict[int, float]


@dataclass(frozen=True)
class RunRecord:
    """What a run tells of itself. A metric that is not finite is NaN."""

    run: RunDirectory
    config: dict[str, Any]
    status: str
    step: int | None
    metrics: Scalars
    """At its end, or the last known ones of a run that has not come to it."""
    curves: dict[str, Curve]
    """Of each metric, against optimiser steps."""

    @staticmethod
    def read(run: RunDirectory) -> RunRecord:
        """Read a run's files; what is damaged in them is passed over.

        Raises ``Refused`` if its config cannot be read, and ``OSError``.
        """
        config = flatten(run.stored())
        if not any(key.startswith("task.") for key in config):
            raise Refused(f"{run.config}: it has no task, so it is not the config of a run")
        curves = _curves(read_json_lines(run.metrics))
        last = max((step for curve in curves.values() for step in curve), default=None)
        ended = run.outcome()
        final = ended.get("metrics")
        known = {n: list(c.values())[-1] for n, c in curves.items() if not n.startswith("train/")}
        if isinstance(final, dict):
            metrics = {name: measured(value) for name, value in final.items()}
            known = metrics if ended.get("status") == "completed" else known | metrics
        status, step = ended.get("status", "unfinished"), ended.get("step", last)
        status = read_json(run.trial).get("status", status)
        return RunRecord(run, config, str(status), _whole(step), known, curves)

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def progress(self) -> str:
        """Its status, and how far it came if that is not the end."""
        is_known = self.step is not None and not self.is_completed
        return f"{self.status}, step {self.step}" if is_known else self.status

    def curve(self, metric: str) -> Curve:
        """A metric against steps; of one that was told at the end alone, that."""
        told = self.curves.get(metric, {})
        return told or ({self.step or 0: self.metrics[metric]} if metric in self.metrics else {})


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    given: list[RunRecord]
    left_out: list[str]
    """What was asked for and is no run that can be read, with the reason."""

    @staticmethod
    def of(paths: list[Path]) -> Comparison:
        """Read the runs at and below ``paths``. Raises ``Refused`` if there is none."""
        left_out: list[str] = []
        runs: dict[Path, RunDirectory] = {}
        for path in paths:
            for run in find_runs(path, left_out):
                runs.setdefault(run.path.resolve(), run)
        records = []
        for run in runs.values():
            try:
                records.append(RunRecord.read(run))
            except (OSError, TrainingError) as error:
                left_out.append(_in_a_line(error))
        left_out = list(dict.fromkeys(left_out))
        if not records:
            raise Refused(f"{'; '.join(left_out)}; {EXPECTED}")
        return Comparison(_with_training_loss(records), left_out)

    @cached_property
    def folder(self) -> Path:
        """The nearest folder that all runs are in."""
        return Path(os.path.commonpath([record.run.path.parent for record in self.given]))

    @cached_property
    def title(self) -> str:
        """How many runs, and of which experiments."""
        names = dict.fromkeys(printable(str(r.config.get("run.name"))) for r in self.given)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        count = f"{len(self.given)} run{'s' if len(self.given) > 1 else ''}"
        return f"{count} of {', '.join(list(names)[:3])}{more}"

    @cached_property
    def changed(self) -> list[str]:
        """The keys whose values are not the same in all runs, section by section."""
        configs = [record.config for record in self.given]
        keys = list(dict.fromkeys(key for config in configs for key in config))
        sections = {field.name: place for place, field in enumerate(fields(Config))}
        keys.sort(key=lambda key: sections.get(key.partition(".")[0], len(sections)))
        return [
            key
            for key in keys
            if not key.startswith(WHERE_IT_LIES) and len({_compared(c, key) for c in configs}) > 1
        ]

    @cached_property
    def metric(self) -> str | None:
        """What they are sorted by: the ``checkpoint.metric`` of all, if any of them has it."""
        wanted = {
            (str(r.config.get("checkpoint.metric")), str(r.config.get("checkpoint.mode")))
            for r in self.given
        }
        metric, mode = next(iter(wanted))
        has_it = any(metric in record.metrics for record in self.given)
        return metric if len(wanted) == 1 and has_it and mode in ("max", "min") else None

    @cached_property
    def larger_is_better(self) -> bool:
        return self.given[0].config.get("checkpoint.mode") == "max"

    @cached_property
    def metrics(self) -> list[str]:
        """All metrics that any run has; the one to sort by first."""
        names = {name for record in self.given for name in record.metrics}
        return sorted(names, key=lambda name: (name != self.metric, name))

    @cached_property
    def records(self) -> list[RunRecord]:
        """The runs, best first if there is a metric to tell; those without it last."""
        return sorted(self.given, key=self._rank)

    def _rank(self, record: RunRecord) -> tuple[int, float]:
        if self.metric not in record.metrics:
            return (2 if self.metric else 0), 0.0
        value = record.metrics[self.metric]
        if math.isnan(value):
            return 1, 0.0
        return 0, -value if self.larger_is_better else value

    def is_best(self, record: RunRecord) -> bool:
        """Whether no run has a better final metric; several may have the same."""
        best = self._rank(self.records[0])
        return self.metric is not None and best[0] == 0 and self._rank(record) == best

    def best_over(self, record: RunRecord) -> tuple[float, int] | None:
        """The best value of the metric that a run had at any time, and the first step with it."""
        curve = record.curves.get(self.metric or "", {})
        finite = [(value, step) for step, value in curve.items() if math.isfinite(value)]
        sign = -1 if self.larger_is_better else 1
        return min(finite, key=lambda point: (sign * point[0], point[1]), default=None)

    def name(self, record: RunRecord) -> str:
        """What tells a run from the others: its path below the folder that all are in."""
        return str(record.run.path.relative_to(self.folder))

    def is_numeric(self, key: str) -> bool:
        """Whether every run that has the key has a number there."""
        values = [record.config[key] for record in self.given if key in record.config]
        return all(number(value) is not None for value in values)


def find_runs(path: Path, left_out: list[str]) -> list[RunDirectory]:
    """The run at ``path``, or all below it; if there is none, ``left_out`` says so.

    Raises ``Refused`` if there is no such folder.
    """
    if not os.path.exists(path):
        raise Refused(f"{path}: there is no such folder; {EXPECTED}")
    before = len(left_out)
    found = list(_search(Path(os.path.abspath(path)), left_out))
    if not found and len(left_out) == before and not is_of_an_earlier_comparison(path):
        left_out.append(f"{path}: no run found")
    return found


def _search(folder: Path, left_out: list[str]) -> Iterator[RunDirectory]:
    """What lies in a run is its own (a replay, a copy of code); links lead to runs alone."""
    try:
        run = RunDirectory(folder)
        if run.config.is_file():
            yield run
        elif folder.is_dir() and not is_of_an_earlier_comparison(folder):
            for below in sorted(folder.iterdir()):
                is_run = RunDirectory(below).config.is_file()
                if is_run or not (below.is_symlink() or below.name.startswith(".")):
                    yield from _search(below, left_out)
    except OSError as error:
        left_out.append(_in_a_line(error))


def is_of_an_earlier_comparison(folder: Path) -> bool:
    return (folder / MARK).is_file()


MARK = Path("tensorboard") / ".compare"
"""Tells what `ddptrain compare` has written from what only has its name, and may not be deleted."""


def _in_a_line(error: OSError | TrainingError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in lines:
        step, split = _whole(line.get("step")), line.get("split")
        if step is None or not isinstance(split, str):
            continue
        for name in line.keys() - {"step", "split"}:
            curves.setdefault(f"{split}/{name}", {})[step] = measured(line[name])
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _with_training_loss(records: list[RunRecord]) -> list[RunRecord]:
    """Where a run has been evaluated on nothing yet, the training loss is what all have to show."""
    loss = "train/loss"
    if not any(loss in record.curves and not record.metrics for record in records):
        return records
    return [
        replace(r, metrics=r.metrics | {loss: list(r.curves[loss].values())[-1]})
        if loss in r.curves
        else r
        for r in records
    ]


def _whole(value: object) -> int | None:
    """A step; None if a damaged file holds something else there."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < 1 << 53 else None


def _compared(config: dict[str, Any], key: str) -> object:
    """What makes two values the same: 0 and 0.0 are, a list is by what it looks like."""
    value = config.get(key)
    return shown(config, key) if number(value) is None else value
