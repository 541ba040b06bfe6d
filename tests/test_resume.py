"""A run that is killed at any step and started again ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
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
from ddptrain.compose import compose
from ddptrain.launch.worker import TIMEOUT
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import open_directory

RANKS = 2
EXACT = ("experiment=ragged", "parallel.reduction=exact")
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
        # From which the first one takes its config at a restart.
        assert (tmp_path / "launched.yaml").read_text() == launched
    finally:
        kill_tree(first.pid)
        first.communicate()


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
