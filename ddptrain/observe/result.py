"""``result.json``: how a run ended, for machines; and the same in a few lines for people."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

from ddptrain.files import replace_text
from ddptrain.observe.faults import noted_faults
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import short


def write_result(run: RunDirectory, result: dict[str, Any]) -> None:
    """Replace ``result.json``; a NaN metric becomes null, which JSON has."""
    metrics = {
        name: value if math.isfinite(value) else None for name, value in result["metrics"].items()
    }
    replace_text(run.result, json.dumps({**result, "metrics": metrics}, indent=2) + "\n")


def summarise(run: RunDirectory, result: dict[str, Any], example: str | None) -> str:
    """What to print when a run is over: the metrics, where it is, what to paste next."""
    where = short(run.path)
    # Beside its other runs, where a run is in the default place.
    runs = run.path.parent if "runs" in run.path.parts else None
    lines = [
        "",
        f"{result['status']} after {result['step']} steps ({result['epochs']:.1f} epochs, "
        f"{result['samples']:,} samples) in {result['wall_seconds']:.1f} s "
        f"on {result['world_size']} rank{'s' if result['world_size'] > 1 else ''}",
        *(f"  {name:<24} {value:.4f}" for name, value in sorted(result["metrics"].items())),
    ]
    if example:
        lines += ["", "from the model:", *(f"  | {line}" for line in example.splitlines())]
    return "\n".join(
        [
            *lines,
            "",
            f"run          {where}",
            f"curves       tensorboard --logdir {short(runs if runs else run.path)}",
            f"weights      ddptrain export {where}",
            *([f"pictures     {short(run.plots)}"] if run.plots.exists() else []),
            *_of_faults(run),
        ]
    )


def _of_faults(run: RunDirectory) -> list[str]:
    steps = []
    with suppress(OSError):  # a courtesy is no reason to fail
        steps = [line["step"] for line in noted_faults(run)]
    if not steps:
        return []
    count = f"{len(steps)} step{'s' if len(steps) > 1 else ''}, in {run.anomalies.name}"
    return [f"at fault     {count}; to see why: ddptrain replay {short(run.path)} {steps[-1]}"]
