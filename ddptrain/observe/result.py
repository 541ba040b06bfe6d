"""``result.json``: how a run ended, for machines; and the same in a few lines for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ddptrain.files import replace_text
from ddptrain.run_directory import RunDirectory


def write_result(run: RunDirectory, result: dict[str, Any]) -> None:
    """Replace ``result.json``; a NaN metric becomes null, which JSON has."""
    metrics = {
        name: value if math.isfinite(value) else None for name, value in result["metrics"].items()
    }
    replace_text(run.result, json.dumps({**result, "metrics": metrics}, indent=2) + "\n")


def summarise(run: RunDirectory, result: dict[str, Any], example: str | None) -> str:
    """What to print when a run is over: the metrics, where it is, what to paste next."""
    where = _short(run.path)
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
            f"curves       tensorboard --logdir {_short(runs if runs else run.path)}",
            f"weights      ddptrain export {where}",
        ]
    )


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
