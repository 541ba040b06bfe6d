"""What Slurm's variables and commands tell of a job, in the forms in which they tell it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launching import DDPTRAIN, PROJECT

from ddptrain.compose import compose
from ddptrain.config import Resume
from ddptrain.launch.allocation import Allocation
from ddptrain.launch.slurm import OF_TASKS
from ddptrain.place import address_towards, interface_of

JOB = Allocation("7", "7", 2, is_batch=True)
HOLDER = """
import sys, time
from pathlib import Path
from ddptrain.claim import LAUNCH_LOCK, Lock
lock = Lock(Path(sys.argv[1]) / LAUNCH_LOCK)
lock.take()
print("held", flush=True)
time.sleep(1.5)
"""


@pytest.mark.parametrize(
    ("asked", "tasks", "gpus"),
    [
        ({}, "2(x2)", 0),
        ({"SLURM_GPUS_PER_TASK": "1"}, "2(x2),1", 5),
        ({"SLURM_GPUS_PER_TASK": "a100:2"}, "1", 2),
        ({"SLURM_GPUS_PER_TASK": "a100:3,h100:1"}, "1(x2)", 8),
        ({"SLURM_TRES_PER_TASK": "cpu=8"}, "4", 0),
        ({"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu:a100=2"}, "4", 8),
        ({"SLURM_TRES_PER_TASK": "gres/gpu:1,license/a=3"}, "4(x3)", 12),
    ],
)
def test_gpus_of_all_tasks(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], tasks: str, gpus: int
) -> None:
    for name, value in {**asked, "SLURM_TASKS_PER_NODE": tasks}.items():
        monkeypatch.setenv(name, value)
    assert JOB.gpus() == gpus


def test_nodes_have_addresses_or_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "NodeName=a1 Arch=x86_64 Gres=gpu:2 NodeAddr=10.0.0.1 NodeHostName=a1 Port=6818",
        "NodeName=a2 CoresPerSocket=1 Gres=gpu:2 State=POWERED_DOWN",
        "NodeName=a3 NodeAddr=a3.cluster NodeHostName=a3",
    ]
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a[1-3]")
    assert JOB.addresses() == {"a1": "10.0.0.1", "a2": "a2", "a3": "a3.cluster"}


def test_a_node_is_reached_by_a_numeric_address() -> None:
    here = address_towards(["no-such-name.invalid", "127.0.0.2"])
    assert here is not None
    assert interface_of(here) == "lo"
    assert address_towards([]) is None


def test_srun_hears_nothing_of_tasks() -> None:
    of_tasks = ["SLURM_NTASKS_PER_GPU", "SLURM_CPUS_PER_GPU", "SLURM_MEM_PER_CPU"]
    of_tasks += ["SLURM_CPU_BIND_LIST", "SLURM_DIST_PLANESIZE"]
    others = ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CONF", "SLURM_GPUS_PER_NODE"]
    assert all(name.startswith(OF_TASKS) for name in of_tasks)
    assert not any(name.startswith(OF_TASKS) for name in others)


def test_a_heterogeneous_job_is_refused_in_a_line(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2", "ENVIRONMENT": "BATCH"}
    command = [*DDPTRAIN, "train", "experiment=ragged", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, **job}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddptrain: job 7 is a heterogeneous one of 2 components")
    assert not (tmp_path / "run").exists()


def test_a_job_that_is_requeued_waits_for_the_start_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may live on, on a node that Slurm has lost."""
    monkeypatch.chdir(PROJECT)
    config = compose(["experiment=ragged", f"run.dir={tmp_path}", "run.resume=never"])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        replace(JOB, has_been_requeued=True).find_itself(config)
        assert holder.wait() == 0
    assert f"is in use by process {holder.pid} on " in capsys.readouterr().err
    assert config.run.resume is Resume.auto


@pytest.mark.parametrize(("left", "is_short"), [(100.0, True), (3600.0, False)])
def test_a_time_limit_before_the_first_step_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, left: float, is_short: bool
) -> None:
    monkeypatch.setattr(Allocation, "seconds_left", lambda _: left)
    assert JOB.was_too_short(300) is is_short
