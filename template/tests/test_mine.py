"""The parts do what they say, and the whole trains: run `pytest` in the project's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

from mine import Arms, Network, Spirals  # noqa: E402


def test_a_loss_is_a_sum_over_samples() -> None:
    data = Spirals(samples=6, seed=0)
    task = Arms(Network())
    points, arms = (torch.stack(parts) for parts in zip(*[data[i] for i in range(6)], strict=True))
    whole = task((points, arms))
    halves = [task((points[part], arms[part])) for part in (slice(0, 3), slice(3, 6))]
    assert whole.count == 6
    assert torch.allclose(whole.sum, sum(half.sum for half in halves))


def test_it_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddptrain", "train", "experiment=mine", f"run.dir={tmp_path}"]
    subprocess.run(command, cwd=PROJECT, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["metrics"]["test/accuracy"] > 0.95
