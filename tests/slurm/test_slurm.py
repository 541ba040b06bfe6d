"""What a user submits trains on all nodes of the job, and goes on whatever Slurm does to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import LIMIT_SECONDS, LIVING, Cluster, missing_binaries, wait_until

PROJECT = Path(__file__).parents[1] / "project"
SCRIPTS = Path(__file__).parents[2] / "slurm"
OVERRIDES = ("experiment=digits", "log.every_steps=5", "log.tensorboard=false")
TRAIN = ("python", "-m", "ddptrain", "train", *OVERRIDES)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if missing := missing_binaries():
        reason = f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster() as running:
        yield running


def submit(
    slurm: Cluster, folder: Path, *overrides: str, script: str = "train", options: str = "--nodes=2"
) -> int:
    given = [*options.split(), "--cpus-per-task=1", str(SCRIPTS / f"{script}.sbatch")]
    return slurm.submit(folder, *given, *OVERRIDES, *overrides)


def finish(slurm: Cluster, job: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """Wait for a job that has to succeed; return its output and its only run's result."""
    output = folder / f"slurm-{job}.out"
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}", output.read_text)
    assert slurm.state(job) == "COMPLETED", output.read_text()[-5000:]
    (run,) = (folder / "runs" / "digits").iterdir()
    assert run.name == f"slurm-{job}"
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed"
    return output.read_text(), result


def wait_for_lines(folder: Path, job: int) -> None:
    metrics = folder / "runs" / "digits" / f"slurm-{job}" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "the first line")


@pytest.mark.long
def test_one_rank_on_one_node(slurm: Cluster, tmp_path: Path) -> None:
    """Whatever the job was asked for in tasks."""
    options = "--nodes=1 --ntasks-per-node=2"
    job = submit(slurm, tmp_path, "train.max_steps=20", options=options)
    output, result = finish(slurm, job, tmp_path)
    for step in (5, 10, 15, 20):
        assert output.count(f"step {step}/20  loss") == 1, output
    assert (result["world_size"], result["step"]) == (1, 20)


def test_one_rank_on_each_node_with_all_of_it(slurm: Cluster, tmp_path: Path) -> None:
    """Of nodes that differ, though the job asked for GPUs by the task and memory in two ways."""
    prolog = tmp_path / "prolog.sh"
    prolog.write_text(
        '#!/bin/bash\necho "print $SLURMD_NODENAME: $CUDA_VISIBLE_DEVICES, $SLURM_CPUS_ON_NODE"\n'
    )
    prolog.chmod(0o755)
    options = "--nodes=2 --nodelist=n2,n3 --exclusive --ntasks-per-node=2 --gpus-per-task=1"
    options += " --mem-per-cpu=100 --export=ALL,SLURM_MEM_PER_NODE=300,SRUN_CPUS_PER_TASK=1"
    wanted = ("train.max_steps=10", f'slurm.srun=["--task-prolog={prolog}"]')
    output, result = finish(slurm, submit(slurm, tmp_path, *wanted, options=options), tmp_path)
    assert {"n2: 0,1, 2", "n3: 0,1, 4"} <= set(output.splitlines())
    for step in (5, 10):
        assert output.count(f"step {step}/10  loss") == 1, output
    assert (result["world_size"], result["step"]) == (2, 10)


def test_what_ranks_are_refused_is_refused_once(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "launch.interface=nowhere", options="--nodes=3")
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}")
    told = slurm.run(None, "scontrol", "show", "job", str(job)).stdout
    assert "ExitCode=2:0" in told
    lines = (tmp_path / f"slurm-{job}.out").read_text().splitlines()
    assert lines[-1].startswith("ddptrain: rank ")
    assert "launch.interface=nowhere: this machine has " in lines[-1]
    assert len([line for line in lines if "launch.interface=nowhere" in line]) <= 1 + 3


@pytest.mark.long
def test_a_job_that_is_asked_to_stop_before_its_first_step_goes_on(
    slurm: Cluster, tmp_path: Path
) -> None:
    job = submit(slurm, tmp_path, "train.max_steps=5")
    wait_until(lambda: slurm.agents_that_listen() == 2, "the agents")
    slurm.signal(job, "USR1")
    slurm.hasten(job)
    _, result = finish(slurm, job, tmp_path)
    assert (result["step"], result["restarts"]) == (5, 0)


def test_a_typo_is_answered_in_one_line(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "train.max_stepss=20")
    output = tmp_path / f"slurm-{job}.out"
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}")
    assert slurm.state(job) == "FAILED"
    (line,) = output.read_text().splitlines()
    assert "did you mean train.max_steps?" in line
    assert not (tmp_path / "runs").exists()


def test_a_requeued_job_continues_its_run(slurm: Cluster, tmp_path: Path) -> None:
    overrides = ("train.max_steps=100", "checkpoint.every_steps=10", "run.resume=never")
    job = submit(slurm, tmp_path, *overrides)
    checkpoints = tmp_path / "runs" / "digits" / f"slurm-{job}" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("step-*/manifest.json")), "a checkpoint")
    slurm.requeue(job)
    output, result = finish(slurm, job, tmp_path)
    assert output.count("step 5/100  loss") == 1, output
    assert result["step"] == 100
    assert result["restarts"] == 1


@pytest.mark.long
def test_a_job_that_is_asked_to_stop_goes_on_by_itself(slurm: Cluster, tmp_path: Path) -> None:
    """By a signal to its step, as Slurm sends it before a time limit."""
    job = submit(slurm, tmp_path, "train.max_steps=100", script="preemptible")
    wait_for_lines(tmp_path, job)
    slurm.signal(job, "USR1")
    slurm.hasten(job)
    output, result = finish(slurm, job, tmp_path)
    assert "stopped after step" in output
    assert (result["step"], result["restarts"], result["lost_steps"]) == (100, 1, 0)


@pytest.mark.long
def test_a_job_stops_before_its_time_is_up(slurm: Cluster, tmp_path: Path) -> None:
    """Of one minute, of which it takes three quarters; the steps need more."""
    slow = ["experiment=ragged", "data.train.seconds=0.02", "train.max_steps=110"]
    script = str(SCRIPTS / "train.sbatch")
    limit = ["--time=1", f"--chdir={PROJECT}", f"--output={tmp_path}/job.out"]
    given = [*slow, "eval.every_steps=null", "checkpoint.keep_best=0", "log.tensorboard=false"]
    job = slurm.submit(PROJECT, *limit, script, *given, f"run.dir={tmp_path / 'run'}")
    wait_until((tmp_path / "run" / "result.json").exists, "the stop")
    slurm.hasten(job)
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}")
    output = (tmp_path / "job.out").read_text()
    assert slurm.state(job) == "COMPLETED", output[-5000:]
    assert "the job's time is nearly up: it stops, to go on later" in output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["step"], result["restarts"], result["lost_steps"]) == (110, 1, 0)


@pytest.mark.long
def test_neither_what_fails_nor_what_is_cancelled_is_started_again(
    slurm: Cluster, tmp_path: Path
) -> None:
    failing = submit(slurm, tmp_path, "data.train._target_=digits.Nothing", script="preemptible")
    cancelled = submit(slurm, tmp_path, "train.max_steps=2000", script="preemptible")
    wait_until(lambda: slurm.state(failing) not in LIVING, f"job {failing}")
    assert slurm.state(failing) == "FAILED"
    wait_for_lines(tmp_path, cancelled)
    slurm.run(tmp_path, "scancel", str(cancelled))
    wait_until(lambda: slurm.state(cancelled) not in LIVING, f"job {cancelled}")
    assert slurm.state(cancelled) == "CANCELLED"


def test_a_job_goes_on_elsewhere_when_its_node_is_lost(slurm: Cluster, tmp_path: Path) -> None:
    overrides = ("train.max_steps=100", "checkpoint.every_steps=10")
    job = submit(slurm, tmp_path, *overrides, script="preemptible", options="--nodes=1")
    checkpoints = tmp_path / "runs" / "digits" / f"slurm-{job}" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("step-*/manifest.json")), "a checkpoint")
    with slurm.without("n1"):
        wait_until(lambda: slurm.state(job) == "PENDING", f"job {job} to be requeued")
        slurm.run(tmp_path, "scontrol", "update", f"JobId={job}", "StartTime=now")
        _, result = finish(slurm, job, tmp_path)
    assert (result["step"], result["restarts"]) == (100, 1)


@pytest.mark.long
def test_salloc_trains_on_its_nodes(slurm: Cluster, tmp_path: Path) -> None:
    """In a run of the usual name: a person may start several in one allocation."""
    done = slurm.run(tmp_path, "salloc", "--nodes=2", *TRAIN, "train.max_steps=10")
    assert done.returncode == 0, done.stderr
    assert "on 2 ranks" in done.stdout
    (run,) = (tmp_path / "runs" / "digits").iterdir()
    assert not run.name.startswith("slurm")


STOPPED = """
srun --overlap --ntasks=1 sleep 600 & other=$!
$* & launch=$!
until [ -s run/metrics.jsonl ]; do sleep 0.2; done
kill -USR1 $launch
wait $launch
echo "ended with $?"
kill -0 $other && echo "the other step lives"
kill $other
"""


@pytest.mark.long
def test_a_signal_to_a_launch_ends_nothing_else_of_its_job(slurm: Cluster, tmp_path: Path) -> None:
    command = ["bash", "-c", STOPPED, "-", *TRAIN, "train.max_steps=2000", "run.dir=run"]
    done = slurm.run(tmp_path, "salloc", "--nodes=2", *command)
    assert "ended with 75" in done.stdout, done.stderr
    assert "the other step lives" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"


@pytest.mark.long
def test_a_job_knows_nothing_of_the_step_that_submitted_it(slurm: Cluster, tmp_path: Path) -> None:
    """Slurm hands on the variables of whoever submits: of a step, or of a task of an array."""
    script = tmp_path / "outer.sh"
    own = f"sbatch --parsable --nodes=2 {SCRIPTS / 'train.sbatch'} {' '.join(OVERRIDES)}"
    script.write_text(f"#!/bin/bash\nsrun --ntasks=1 {own} train.max_steps=4 >inner\n")
    slurm.submit(tmp_path, "--array=5", str(script))
    wait_until(lambda: (tmp_path / "inner").exists(), "the first job")
    wait_until(lambda: bool((tmp_path / "inner").read_text()), "the second job")
    job = int((tmp_path / "inner").read_text())
    _, result = finish(slurm, job, tmp_path)
    assert result["world_size"] == 2


def test_one_process_of_srun_trains_alone(slurm: Cluster, tmp_path: Path) -> None:
    done = slurm.run(tmp_path, "srun", "--ntasks=1", *TRAIN, "train.max_steps=10")
    assert done.returncode == 0, done.stderr
    assert "on 1 rank" in done.stdout


@pytest.mark.long
def test_an_interactive_step_trains_with_ranks_of_its_own(slurm: Cluster, tmp_path: Path) -> None:
    """srun gives the first task a terminal, which it has to have one itself for."""
    command = " ".join(
        ["srun --ntasks=2 --pty", *TRAIN, "train.max_steps=4", "launch.nproc_per_node=2"]
    )
    done = slurm.run(tmp_path, "script", "-qec", f"{command} run.dir=mine", "/dev/null")
    assert "completed after 4 steps" in done.stdout
    assert len(list(tmp_path.rglob("config.yaml"))) == 1
    result = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert (result["status"], result["world_size"]) == ("completed", 2)


@pytest.mark.parametrize("command", [TRAIN, ("python", "-m", "ddptrain", *OVERRIDES)])
def test_several_processes_of_srun_are_refused(
    slurm: Cluster, tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = slurm.run(tmp_path, "srun", "--ntasks=2", *command)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line.startswith("ddptrain: ")]
    assert len(told) == 1
    assert "srun has started 2 of these, and each would be a run of its own" in told[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("alone", ["--standalone", "--nnodes=1"])
def test_several_torchruns_of_srun_are_refused(slurm: Cluster, tmp_path: Path, alone: str) -> None:
    torchrun = ("python", "-m", "torch.distributed.run", alone, "--nproc-per-node=1")
    done = slurm.run(
        tmp_path, "srun", "--nodes=2", "--ntasks=2", *torchrun, "-m", "ddptrain", *OVERRIDES
    )
    assert done.returncode == 1
    assert "ddptrain: srun has started 2 torchruns, and each would be a run of" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_torchrun_in_a_batch_script_is_left_alone(slurm: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "own.sh"
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node=2 -m ddptrain"
    script.write_text(f"#!/bin/bash\nsrun --ntasks=1 {torchrun} {' '.join(OVERRIDES)} $@\n")
    job = slurm.submit(tmp_path, "--nodes=1", str(script), "train.max_steps=10")
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}")
    assert slurm.state(job) == "COMPLETED"
    assert "on 2 ranks" in (tmp_path / f"slurm-{job}.out").read_text()


def test_an_array_trains_each_combination_in_a_run_of_its_own(
    slurm: Cluster, tmp_path: Path
) -> None:
    values = ("optim.lr=0.001,0.003", "seed=1,2", "train.max_steps=5")
    job = submit(slurm, tmp_path, *values, script="sweep", options="--array=1-2")
    wait_until(lambda: not set(slurm.state(job).split()) & set(LIVING), f"job {job}")
    found = {}
    for run in (tmp_path / "runs" / "digits").iterdir():
        stored = (run / "config.yaml").read_text()
        found[run.name] = ("lr: 0.001" in stored, "seed: 1" in stored)
        assert (run / "result.json").exists()
    assert found == {f"slurm-{job}_1": (True, False), f"slurm-{job}_2": (False, True)}


@pytest.mark.long
def test_a_submitted_job_runs_the_code_that_there_was(slurm: Cluster, tmp_path: Path) -> None:
    """Whatever becomes of the folder while the job waits; a user's own module, on two nodes."""
    project = Path(shutil.copytree(PROJECT, tmp_path / "project"))
    short = ["experiment=ragged", "train.max_steps=8", "log.tensorboard=false"]
    short += ["eval.every_steps=null", "checkpoint.keep_best=0"]
    submitting = ["python", "-m", "ddptrain", "submit", *short, "parallel.reduction=exact"]
    own = 'defaults: [default]\nnodes: 2\nsbatch: [--hold]\nsetup: ["echo set up"]\n'
    (project / "conf" / "slurm").mkdir()
    (project / "conf" / "slurm" / "mine.yaml").write_text(own)
    done = slurm.run(project, *submitting, "slurm=mine")
    assert done.returncode == 0, done.stderr
    told = dict(line.split(None, 1) for line in done.stdout.splitlines())
    (project / "ragged.py").write_text("raise SystemExit('another code')\n")
    shutil.rmtree(project / "conf")
    slurm.run(project, "scontrol", "release", told["job"])
    wait_until(lambda: slurm.state(int(told["job"])) not in LIVING, "the job")
    output = (project / told["output"].removeprefix("tail -F ")).read_text()
    assert slurm.state(int(told["job"])) == "COMPLETED", output
    assert "set up" in output
    result = json.loads((project / told["run"] / "result.json").read_text())
    assert (result["status"], result["step"], result["world_size"]) == ("completed", 8, 2)


def test_a_submission_that_slurm_refuses_leaves_nothing(slurm: Cluster, tmp_path: Path) -> None:
    submission = ("python", "-m", "ddptrain", "submit", *OVERRIDES, "slurm.partition=nowhere")
    done = slurm.run(tmp_path, *submission)
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.long
def test_the_doctor_tries_all_nodes_of_a_job(slurm: Cluster, tmp_path: Path) -> None:
    """Both are this machine, at the same address."""
    doctor = ("python", "-m", "ddptrain", "doctor", *OVERRIDES)
    done = slurm.run(tmp_path, "salloc", "--nodes=2", *doctor)
    assert done.returncode == 0, done.stderr
    assert "ranks       ok  2: 2 on " in done.stdout, done.stdout
    assert "all-reduce  ok  4.1 kB in " in done.stdout
    wrong = slurm.run(tmp_path, "salloc", "--nodes=1", *doctor, "slurm.interface=ib7")
    assert wrong.returncode == 2
    assert "launch.interface=ib7: this machine has lo" in wrong.stderr


def test_a_node_that_does_not_come_is_named(slurm: Cluster, tmp_path: Path) -> None:
    """Its Python does not get as far as to say that it is there."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "if os.environ.get('SLURM_STEP_ID') == '0' and os.environ['SLURM_NODEID'] == '1':\n"
        "    time.sleep(1000)\n"
    )
    given = ["launch.timeout=8", f"run.dir={tmp_path / 'run'}"]
    path = f"PYTHONPATH={tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    command = ["salloc", "--nodes=2", "--nodelist=n1,n2", "env", path, *TRAIN, *given]
    done = slurm.run(tmp_path, *command)
    assert done.returncode == 1
    assert "ddptrain: of 2 nodes n2 (127.0.0.1) did not come within 8 s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_sweep_through_submitit_is_a_job_for_each_trial(slurm: Cluster, tmp_path: Path) -> None:
    """Of two ranks; one of the trials fails, and is a failed trial."""
    project = Path(shutil.copytree(PROJECT, tmp_path / "project"))
    sweep = [*TRAIN[:4], "--multirun", "hydra/launcher=slurm", "slurm.cpus_per_node=2"]
    sweep += [
        "hydra.sweep.dir=mine",
        "experiment=ragged",
        "train.max_steps=12",
        "eval.every_steps=6",
    ]
    sweep += ["log.tensorboard=false", "checkpoint.keep_best=0", "launch.nproc_per_node=2"]
    done = slurm.run(project, *sweep, "data.train.fail_at=17,null")
    assert done.returncode == 1, done.stdout + done.stderr
    trials = [json.loads((project / "mine" / n / "trial.json").read_text()) for n in "01"]
    assert [each["status"] for each in trials] == ["failed", "completed"]
    result = json.loads((project / "mine" / "1" / "result.json").read_text())
    assert (result["world_size"], result["metrics"]["val/loss"]) == (2, trials[1]["value"])
    assert "1 trial failed: data.train.fail_at=17 exited 1: " in done.stderr
    assert "sample 17: ValueError: the file is corrupt" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_jobs_of_a_sweep_end_with_it_and_one_that_is_lost_has_failed(
    slurm: Cluster, tmp_path: Path
) -> None:
    """A sweep that was killed leaves its jobs, and is not started again before they are over."""
    project = Path(shutil.copytree(PROJECT, tmp_path / "project"))
    sweep = [*TRAIN[:4], "--multirun", "hydra/launcher=submitit_slurm", "hydra.sweep.dir=mine"]
    sweep += ["experiment=ragged", "train.max_steps=60", "data.train.seconds=0.01", "seed=1,2"]
    sweep += ["log.tensorboard=false", "checkpoint.keep_best=0", "log.every_steps=1"]
    sweep += ["eval.every_steps=null"]
    metrics = [project / "mine" / number / "metrics.jsonl" for number in "01"]

    def steps() -> list[int]:
        return [len(each.read_text().splitlines()) if each.exists() else 0 for each in metrics]

    def start() -> subprocess.Popen[str]:
        before = steps()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        driver = subprocess.Popen(
            sweep, cwd=project, env=slurm.environment, text=True, **pipes, start_new_session=True
        )
        wait_until(lambda: all(map(int.__gt__, steps(), before)), "steps")
        return driver

    def jobs() -> list[str]:
        return slurm.run(None, "squeue", "--noheader", "--array", "--format=%i").stdout.split()

    driver = start()
    driver.kill()
    driver.communicate()
    left = sorted(jobs())
    done = slurm.run(project, *sweep)
    assert done.returncode == 2
    assert f"still queued or running ({' '.join(left)})" in done.stderr
    assert done.stderr.strip().endswith(f"or end them: scancel {' '.join(left)}")
    slurm.run(None, "scancel", *left)
    wait_until(lambda: not jobs(), "the end of the jobs")

    driver = start()
    driver.send_signal(signal.SIGINT)
    _, err = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 75, err
    assert not jobs()
    results = [json.loads((each.parent / "result.json").read_text()) for each in metrics]
    assert [each["status"] for each in results] == ["stopped"] * 2

    driver = start()
    (lost,) = (job for job in jobs() if job.endswith("_1"))
    slurm.run(None, "scancel", "--signal=KILL", lost)
    out, err = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 1, err
    assert f"trial 1: its job {lost} ended without a result (" in err.splitlines()[-1]
    trial = json.loads((project / "mine" / "0" / "trial.json").read_text())
    assert trial["status"] == "completed", out


@pytest.mark.long
def test_a_sweep_in_a_job_comes_back_to_its_trials(slurm: Cluster, tmp_path: Path) -> None:
    """Each on all nodes of the job, which is requeued in the second one."""
    given = ["--multirun", "seed=1,2", "train.max_steps=40", "checkpoint.every_steps=5"]
    job = submit(slurm, tmp_path, *given, options="--nodes=2")
    folder = tmp_path / "runs" / "sweeps" / f"slurm-{job}"
    checkpoints = folder / "1" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("step-*/manifest.json")), "a checkpoint")
    slurm.requeue(job)
    output = tmp_path / f"slurm-{job}.out"
    wait_until(lambda: slurm.state(job) not in LIVING, f"job {job}", output.read_text)
    assert slurm.state(job) == "COMPLETED", output.read_text()[-5000:]
    assert "trial 0: seed=1: completed before" in output.read_text()
    results = [json.loads((folder / n / "result.json").read_text()) for n in "01"]
    assert [(r["step"], r["world_size"], r["restarts"]) for r in results] == [
        (40, 2, 0),
        (40, 2, 1),
    ]
