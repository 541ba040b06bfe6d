"""The steps at fault that a run has noted, newest last."""

from __future__ import annotations

from typing import Any

from ddptrain.observe.loggers import read_json_lines
from ddptrain.run_directory import RunDirectory


def noted_faults(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of ``anomalies.jsonl`` that are of one step and its samples. May raise ``OSError``.

    Replicas that differ are noted there as well, but are no matter of a step that can be replayed.
    """
    return [line for line in read_json_lines(run.anomalies) if {"step", "samples"} <= line.keys()]
