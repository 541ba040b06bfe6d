"""A rank that fails ends the run within seconds, and the real error is the last on the screen."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import DDPTRAIN, LIMIT_SECONDS, PROJECT, TORCHRUN, Finished, run, start, tree
from torch.utils.data import Dataset

from ddptrain.data.fetch import Fetcher, Source
from ddptrain.data.plan import Plan
from ddptrain.errors import (
    DataAway,
    DataError,
    LostWorker,
    NonFiniteError,
    PeerFailed,
    TrainingError,
)
from ddptrain.resilience.failure import may_pass

LAUNCHED = [*DDPTRAIN, "train", "launch.nproc_per_node=2", "launch.max_restarts=0"]
UNDER_TORCHRUN = [*TORCHRUN, "2", "-m", "ddptrain"]
ALONE = ["data.val=null", "eval.every_steps=null", "checkpoint.keep_best=0"]
SHORT = ["experiment=ragged", "train.max_steps=12", "log.tensorboard=false", *ALONE]


def last_line(finished: Finished) -> str:
    return finished.stderr.strip().splitlines()[-1]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT, tmp_path / "project"))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("data.train.fail_at=17", r"data\.train \(Sentences\): sample 17: ValueError: the file is"),
        ("data.train.odd_at=17", r"data\.train \(Sentences\): sample 17 is .*\(11,\).*\(12,\)"),
        ("data.train.infinite_at=17", r"the loss is (nan|inf) on rank [01], samples 17;"),
        ("model.extra=true", r"forgotten\.weight, model\.forgotten\.bias; use them in the loss"),
        ("model.fickle=true", r"fickle\.weight, model\.fickle\.bias; use them in the loss"),
        (
            "task.scale=1e12 parallel.reduction=exact",
            r"the loss reaches [\d.e+]+, beyond the 5\.73e\+09 that exact sums take",
        ),
        (
            "task.culprit=1 task.flip_at=20 task.flips_on=true parallel.check_every_steps=2 "
            "launch.nproc_per_node=3",
            r"^rank [012] .*: after step 6: rank 1 holds other weights than the 2 others, first",
        ),
        ("task.in_place=true", r"RuntimeError: .* modified by an inplace operation"),
        (
            "data.train.uneven=true",
            r"rank 1 \(.*\) has other data than rank 0 \(.*\): .*87 samples, not 86 samples",
        ),
        ("task.culprit=1 task.raise_at=20", r"^rank 1 .*step \d+, samples [\d, ]+: KeyError"),
        ("task.culprit=1 task.kill_at=20", r"^rank 1: was killed by SIGKILL"),
        (
            "data.train.samples=5 launch.nproc_per_node=1",
            r"has 5 samples, fewer than train\.global_batch_size=24",
        ),
        ("data.train.samples=0 launch.nproc_per_node=1", r"data\.train \(Sentences\): it is empty"),
        (
            "model.width=-3 launch.nproc_per_node=1",
            r"^.*model: could not build ragged\.Network: RuntimeError",
        ),
    ],
)
def test_first_error_is_the_last_line(project: Path, fault: str, expected: str) -> None:
    finished = run([*LAUNCHED, *SHORT, *fault.split()], project)
    refused = "could not build" in expected or "samples" in fault or "uneven" in fault
    assert finished.returncode == (2 if refused else 1)
    assert re.search(expected, last_line(finished)), finished.stderr
    (run_dir,) = (project / "runs" / "ragged").iterdir()
    if "kill_at" not in fault:
        logs = [file.read_text() for file in (run_dir / "logs").iterdir()]
        assert any(re.search(expected, line) for log in logs for line in log.splitlines())
    assert (
        not (run_dir / "result.json").exists()
        or "failed" in (json.loads((run_dir / "result.json").read_text())["status"])
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LostWorker("killed"), True),
        (PeerFailed("gone"), True),
        (OSError(errno.EIO, "away"), True),
        (DataAway("sample 3"), True),
        (caused(TrainingError("launched.yaml"), OSError(errno.EIO, "away")), True),
        (DataError("sample 3"), False),
        (OSError("the image is cut short"), False),
        (PermissionError(errno.EACCES, "not yours"), False),
        (KeyError("a bug"), False),
        (NonFiniteError("the loss"), False),
    ],
)
def test_what_may_pass_is_told_from_what_stays(error: Exception, expected: bool) -> None:
    assert may_pass(error) == expected


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ESTALE, "away"), DataAway),
        (TimeoutError("no answer"), DataAway),
        (FileNotFoundError(errno.ENOENT, "no such file"), DataError),
        (OSError("the image is cut short"), DataError),
        (ValueError("corrupt"), DataError),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_out_of_reach_is_told_from_one_that_is_corrupt(
    error: Exception, kind: type[DataError], workers: int
) -> None:
    source = Source("train", Failing(error), Plan(4, 4, 4))
    with pytest.raises(DataError, match="sample") as raised:
        list(Fetcher(source, torch.device("cpu"), workers).steps(0, 1, 0, 1))
    assert type(raised.value) is kind


class Failing(Dataset[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise self.error


LEAVE = """
import logging, sys, time
from torch.utils.data import DataLoader
from ddptrain.resilience.failure import leave_now
class Slow(logging.StreamHandler):
    def flush(self): time.sleep(0.5)
handler = Slow(sys.stdout)
batches = iter(DataLoader(range(100), num_workers=2))
next(batches)
leave_now(75)
"""
KILLED = """
import os, signal, time
from torch.utils.data import DataLoader
from ddptrain.resilience.failure import may_pass
batches = iter(DataLoader(range(100), num_workers=1))
next(batches)
try:
    os.kill(batches._workers[0].pid, signal.SIGKILL)
    time.sleep(60)
except RuntimeError as error:
    assert may_pass(error)
    os._exit(75)
"""


def test_a_worker_that_dies_at_any_moment_is_no_error_of_the_code() -> None:
    """torch raises where the main thread happens to be."""
    assert run([sys.executable, "-c", KILLED]).returncode == 75


def test_workers_that_end_with_their_rank_do_not_change_its_exit_code() -> None:
    """torch raises in the main thread, wherever that is, when a worker is killed."""
    assert run([sys.executable, "-c", LEAVE]).returncode == 75


def test_failing_worker_process_names_the_sample(project: Path) -> None:
    finished = run([*LAUNCHED, *SHORT, "data.workers=1", "data.train.fail_at=17"], project)
    assert finished.returncode == 1
    assert "sample 17: ValueError: the file is corrupt" in last_line(finished)


def test_torchrun_report_ends_with_the_error(project: Path) -> None:
    """What torchrun prints of its own ends in a ruler; the error stands right above it."""
    finished = run([*UNDER_TORCHRUN, *SHORT, "task.culprit=1", "task.raise_at=20"], project)
    assert finished.returncode == 1
    ruler, error = finished.stderr.strip().splitlines()[:-3:-1]
    assert set(ruler) == {"="}
    assert re.search(r"rank 1 .*step \d+, samples [\d, ]+: KeyError: 'a bug in user code'", error)


@pytest.mark.parametrize("launcher", [LAUNCHED, UNDER_TORCHRUN], ids=["ddptrain", "torchrun"])
def test_ranks_and_their_workers_end_with_the_agent(project: Path, launcher: list[str]) -> None:
    """However it ends: torch's own agent, if killed, leaves its ranks training."""
    endless = ["experiment=ragged", "train.max_steps=1000000", "data.workers=1"]
    agent = start([*launcher, *endless, f"run.dir={project / 'run'}"], project)
    metrics = project / "run" / "metrics.jsonl"
    deadline = time.monotonic() + LIMIT_SECONDS
    while not metrics.exists() or not metrics.stat().st_size:
        assert agent.poll() is None, agent.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes = tree(agent.pid)
    try:
        assert len(processes) >= 5  # the agent, two ranks, and a worker of each
        os.kill(agent.pid, signal.SIGKILL)
        agent.communicate()  # ends when all who hold its pipes have ended
        while any(Path(f"/proc/{process}").exists() for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def test_typo_under_torchrun_is_said_once(project: Path) -> None:
    finished = run([*UNDER_TORCHRUN, *SHORT, "train.max_step=3"], project)
    before_report = finished.stderr.split("Traceback")[0]
    assert before_report.count("did you mean train.max_steps?") == 1
    assert not (project / "runs").exists()


def test_too_many_ranks_are_refused_with_sizes_that_work(project: Path) -> None:
    finished = run([*DDPTRAIN, "train", *SHORT, "launch.nproc_per_node=13"], project)
    assert finished.returncode == 2
    assert "at most 12 ranks, or train.micro_batch_size=1 or less would do" in finished.stderr
    assert not (project / "runs").exists()


def test_skip_passes_over_a_bad_step_and_counts_it(project: Path) -> None:
    bad = ["data.train.infinite_at=17", "train.nonfinite=skip"]
    finished = run([*LAUNCHED, *SHORT, *bad], project)
    assert finished.returncode == 0, finished.stderr
    (run_dir,) = (project / "runs" / "ragged").iterdir()
    lines = list(map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()))
    skipped = [line.get("skipped_steps", 0) for line in lines if line["split"] == "train"]
    assert skipped[0] == 0
    assert skipped[-1] in (3, 4)  # once an epoch of four steps
    assert lines[-1]["loss"] is not None
