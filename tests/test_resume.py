"""A run that is killed at any step and started again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos.machine import small_disk
from launching import (
    DDPTRAIN,
    LIMIT_SECONDS,
    PROJECT,
    TORCHRUN,
    kill_tree,
    ranks_below,
    read_metrics,
    read_result,
    run,
    start,
    train,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddptrain.build import build_trainer
from ddptrain.claim import LAUNCH_LOCK, Lock, launching
from ddptrain.compose import compose
from ddptrain.launch.worker import TIMEOUT
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import open_directory

RANKS = 2
EXACT = ("experiment=ragged", "parallel.reduction=exact")
NO_BEST = ("checkpoint.keep_best=0",)
Command = list[str]


def command(ranks: int, run_dir: Path, *overrides: str) -> Command:
    base = [*TORCHRUN, str(ranks), "-m", "ddptrain", *EXACT]
    return [*base, f"run.dir={run_dir}", *overrides]


def kill_at(step: int, attempt: int, ranks: int, run_dir: Path, *overrides: str) -> None:
    """Start the run for the ``attempt``-th time; SIGKILL all its processes once past ``step``."""
    process = start(command(ranks, run_dir, *overrides))
    attempts, metrics = run_dir / "attempts.jsonl", run_dir / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while lines_of(attempts) < attempt or lines_of(metrics) < step:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kill_tree(process.pid)
    process.communicate()


def lines_of(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    return train(run_dir, RANKS, *EXACT), run_dir


def test_killed_runs_end_with_the_same_bits(
    undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Two kills, each attempt on another number of ranks and of data loading workers."""
    result, run_dir = undisturbed
    seed = random.SystemRandom().randrange(1000)
    print(f"seed {seed}")  # shown by pytest if the test fails
    chance = random.Random(seed)
    again = tmp_path / "run"
    for attempt, ranks, after in ((1, 3, 0), (2, 1, 90)):
        step = after + chance.randint(5, 50)
        kill_at(step, attempt, ranks, again, f"data.workers={attempt - 1}")
    finished = run(command(RANKS, again, "data.workers=1"))
    assert finished.returncode == 0, finished.stderr[-3000:]
    ended = read_metrics(again), read_metrics(again, "val")
    assert ended == (read_metrics(run_dir), read_metrics(run_dir, "val"))
    told = read_result(again)
    assert told["weights_sha256"] == result["weights_sha256"]
    assert told["metrics"] == result["metrics"]
    assert told["restarts"] == 2
    _check_curves(again)
    kept = {path.name for path in (again / "checkpoints").iterdir()}
    assert kept == {path.name for path in (run_dir / "checkpoints").iterdir()}
    best = sorted(read_metrics(again, "val"), key=lambda line: float(line["loss"]))[:2]
    steps = {*(line["step"] for line in best), 200}
    assert kept == {"latest", *(f"step-{step:08d}" for step in steps)}


def _check_curves(run_dir: Path) -> None:
    """TensorBoard shows one run whose steps increase, and none beyond what was kept."""
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, 201))
    assert [event.step for event in events.Scalars("val/loss")] == list(range(50, 201, 50))


def test_another_config_is_refused(
    undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, run_dir = undisturbed
    refused = run([*DDPTRAIN, *EXACT, f"run.dir={run_dir}", "optim.lr=0.5", "seed=3"])
    assert refused.returncode == 2
    line = refused.stderr.strip()
    assert "\n" not in line
    assert "optim.lr: 0.01 → 0.5" in line
    assert "seed: 0 → 3" in line


def test_resume_never_and_must(undisturbed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    _, run_dir = undisturbed
    never = run([*DDPTRAIN, *EXACT, f"run.dir={run_dir}", "run.resume=never"])
    must = run([*DDPTRAIN, "experiment=ragged", f"run.dir={tmp_path / 'new'}", "run.resume=must"])
    assert (never.returncode, must.returncode) == (2, 2)
    assert "holds a checkpoint" in never.stderr
    assert "holds no checkpoint" in must.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_torchrun_restart_finds_its_own_run(
    undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Rank 1 is killed once; the agent starts both again, and without run.dir they go on."""
    project = shutil.copytree(PROJECT, tmp_path / "project")
    overrides = ["task.culprit=1", "task.kill_at=60", f"task.once={tmp_path / 'killed'}"]
    launcher = [*TORCHRUN, str(RANKS), "--max-restarts=1", "-m", "ddptrain"]
    finished = run([*launcher, *EXACT, *overrides], project)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    (only,) = (project / "runs" / "ragged").iterdir()
    told = read_result(only)
    assert told["weights_sha256"] == undisturbed[0]["weights_sha256"]
    assert told["restarts"] == 1


def test_resume_at_step_a_million_reads_no_sample_that_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    overrides = ["experiment=ragged", "train.max_steps=1000002", "log.tensorboard=false"]
    config = compose(
        [*overrides, "eval.every_steps=null", "data.val=null", "checkpoint.keep_best=0"]
    )
    config.run.dir = str(tmp_path)
    directory = open_directory(config, overrides)
    ranks = Ranks(Place(), torch.device("cpu"), TIMEOUT)
    before = build_trainer(config, ranks, directory, Phases())
    before.done = 1_000_000
    before.save()
    before.checkpoints.settle()
    after = build_trainer(config, ranks, directory, Phases())
    fetched: list[int] = []
    dataset = after.fetcher.source.dataset
    original = type(dataset).__getitem__
    monkeypatch.setattr(
        type(dataset), "__getitem__", lambda self, i: fetched.append(i) or original(self, i)
    )
    after.train()
    assert after.done == 1_000_002
    samples_of_two_steps = after.fetcher.source.plan.samples_before(2)
    digest = 16
    assert len(fetched) <= samples_of_two_steps + digest


def test_a_directory_that_another_run_is_writing_to_is_refused(tmp_path: Path) -> None:
    endless = [*DDPTRAIN, "train", "launch.nproc_per_node=2", "experiment=ragged"]
    endless += ["train.max_steps=1000000", "log.tensorboard=false", f"run.dir={tmp_path}"]
    first = start(endless)
    try:
        while lines_of(tmp_path / "metrics.jsonl") == 0:
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.01)
        launched = (tmp_path / "launched.yaml").read_text()
        second = run([*endless, "log.every_steps=7"], PROJECT)
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert f"{tmp_path} is in use by process {ranks_below(first.pid)[0]} on " in line
        launch = Lock(tmp_path / LAUNCH_LOCK)
        assert launch.is_taken()
        assert launch.holder().startswith(f"process {first.pid} on ")
        # From which the first one takes its config at a restart.
        assert (tmp_path / "launched.yaml").read_text() == launched
    finally:
        kill_tree(first.pid)
        first.communicate()


@pytest.mark.long
def test_checkpoints_may_lie_in_the_run_directory_itself(tmp_path: Path) -> None:
    """Both know by a file of their own who may write."""
    few = ["train.max_steps=6", "log.tensorboard=false", f"checkpoint.dir={tmp_path / 'run'}"]
    assert train(tmp_path / "run", 2, "experiment=ragged", *few)["status"] == "completed"


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for wanted, why in ((file, "File exists"), (file / "run", "Not a directory")):
        refused = run([*DDPTRAIN, "train", "experiment=ragged", f"run.dir={wanted}"], PROJECT)
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert f"{wanted} cannot be made or written to: {why}; name another run.dir" in line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_directory_is_its_launchs_also_between_two_starts(tmp_path: Path, ranks: int) -> None:
    with launching(tmp_path):
        command = [*DDPTRAIN, "train", f"launch.nproc_per_node={ranks}", "experiment=ragged"]
        second = run([*command, f"run.dir={tmp_path}"], PROJECT)
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert f"{tmp_path} is in use by process {os.getpid()} on " in line
    assert [file.name for file in tmp_path.iterdir()] == [LAUNCH_LOCK]


def test_a_line_that_spans_a_stop_is_that_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed after step 6, while steps 5 to 8 make a line; what the task logs is in it too."""
    monkeypatch.chdir(PROJECT)
    overrides = ["experiment=ragged", "train.max_steps=12", "log.every_steps=4"]
    overrides += ["checkpoint.every_steps=3", "checkpoint.keep_last=9", "log.tensorboard=false"]
    ranks = Ranks(Place(), torch.device("cpu"), TIMEOUT)
    config = compose(overrides)
    config.run.dir = str(tmp_path / "run")
    directory = open_directory(config, overrides)
    build_trainer(config, ranks, directory, Phases()).train()
    lines = read_metrics(directory.path)
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert "accuracy" in lines[0]
    for step in (9, 12):
        shutil.rmtree(directory.checkpoints / f"step-{step:08d}")
    resumed = build_trainer(config, ranks, directory, Phases())
    resumed.train()
    assert read_metrics(directory.path) == lines


@pytest.mark.long
def test_checkpoints_of_another_config_are_refused_and_left_alone(tmp_path: Path) -> None:
    short = ["train.max_steps=8", "log.tensorboard=false", "eval.every_steps=null", *NO_BEST]
    train(tmp_path / "first", 1, *EXACT, *short)
    there = tmp_path / "first" / "checkpoints"
    before = {file: file.read_bytes() for file in there.rglob("*") if file.is_file()}
    second = [*DDPTRAIN, "train", *EXACT, *short, "optim.lr=0.02", f"checkpoint.dir={there}"]
    for ranks in (1, 2):
        again = [*second, f"run.dir={tmp_path / 'second'}", f"launch.nproc_per_node={ranks}"]
        done = run(again, PROJECT)
        assert done.returncode == 2, done.stderr
        last = done.stderr.splitlines()[-1]
        assert f"{there}/step-00000008 is of a run with another config: optim.lr: 0.01 → 0.02" in (
            last
        )
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/*"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path: Path, what: str) -> None:
    short = ["train.max_steps=8", "log.tensorboard=false", "eval.every_steps=null", *NO_BEST]
    train(tmp_path / "run", 1, *EXACT, *short)
    for gone in (tmp_path / "run").glob(what):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    done = run([*DDPTRAIN, "train", *EXACT, *short, f"run.dir={tmp_path / 'run'}"], PROJECT)
    assert done.returncode == 1
    assert "its checkpoints are gone; set run.dir to a new folder" in done.stderr
    assert read_result(tmp_path / "run")["status"] != "completed"


def test_a_metric_that_there_is_not_costs_no_step(tmp_path: Path) -> None:
    best = ["checkpoint.keep_best=1", "checkpoint.metric=val/lss", "launch.nproc_per_node=2"]
    done = run([*DDPTRAIN, "train", *EXACT, *best, f"run.dir={tmp_path / 'run'}"], PROJECT)
    assert done.returncode == 2
    assert "did you mean val/loss?" in done.stderr.splitlines()[-1]
    assert "starting the ranks again" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs is mounted by root alone")
def test_a_disk_that_is_full_at_the_start_is_told_in_a_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", mebibytes=1) as small:
        with suppress(OSError):
            (small / "filler").write_bytes(b"0" * 2**20)
        done = run([*DDPTRAIN, "train", *EXACT, f"run.dir={small / 'run'}"], PROJECT)
        left = [file.name for file in small.rglob("*.tmp")]
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ddptrain: {small}/run cannot be made or written to: No space left on")
    assert not left
