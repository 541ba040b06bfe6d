"""What a user submits with sbatch trains on all nodes of the job, and goes on after a requeue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import LIVING, Cluster, missing_binaries, wait_until

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
OVERRIDES = ("experiment=digits", "log.every_steps=5", "log.tensorboard=false")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if missing := missing_binaries():
        reason = f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster() as running:
        yield running


def submit(slurm: Cluster, folder: Path, nodes: int, *overrides: str) -> int:
    options = (f"--nodes={nodes}", "--cpus-per-task=1")
    return slurm.submit(folder, *options, str(SCRIPT), *OVERRIDES, *overrides)


def finish(slurm: Cluster, job: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """Wait for a job that has to succeed; return its output and its only run's result."""
    output = folder / f"slurm-{job}.out"
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}", output.read_text)
    assert slurm.state(job) == "COMPLETED", output.read_text()[-5000:]
    (run,) = (folder / "runs").iterdir()
    assert run.name == f"slurm-{job}"
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed"
    return output.read_text(), result


@pytest.mark.parametrize("nodes", [1, 2])
def test_one_rank_on_each_node(slurm: Cluster, tmp_path: Path, nodes: int) -> None:
    job = submit(slurm, tmp_path, nodes, "train.max_steps=20")
    output, result = finish(slurm, job, tmp_path)
    for step in (5, 10, 15, 20):
        assert output.count(f"step {step}/20  loss") == 1, output
    assert result["world_size"] == nodes
    assert result["step"] == 20


def test_a_typo_is_answered_in_one_line(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, 2, "train.max_stepss=20")
    output = tmp_path / f"slurm-{job}.out"
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}")
    assert slurm.state(job) == "FAILED"
    (line,) = output.read_text().splitlines()
    assert "did you mean train.max_steps?" in line
    assert not (tmp_path / "runs").exists()


def test_a_requeued_job_continues_its_run(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, 2, "train.max_steps=100", "checkpoint.every_steps=10")
    checkpoints = tmp_path / "runs" / f"slurm-{job}" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("step-*/manifest.json")), "a checkpoint")
    slurm.requeue(job)
    output, result = finish(slurm, job, tmp_path)
    assert output.count("step 5/100  loss") == 1, output
    assert result["step"] == 100
    assert result["restarts"] == 1


def test_a_job_whose_time_is_up_goes_on_by_itself(slurm: Cluster, tmp_path: Path) -> None:
    """SIGTERM to its step, which Slurm sends two minutes before the time limit."""
    job = submit(slurm, tmp_path, 2, "train.max_steps=100")
    metrics = tmp_path / "runs" / f"slurm-{job}" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "the first line")
    slurm.signal(job, "TERM")
    slurm.hasten(job)
    output, result = finish(slurm, job, tmp_path)
    assert "stopped after step" in output
    assert (result["step"], result["restarts"], result["lost_steps"]) == (100, 1, 0)
