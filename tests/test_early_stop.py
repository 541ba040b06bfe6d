"""Evaluations that get no better lower the rate, or end the run, the same through a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import DDPTRAIN, LIMIT_SECONDS, PROJECT, kill_tree, read_result, run, start

from ddptrain.observe.loggers import read_json_lines

# By more than 10 nothing gets better, so that patience runs out where it is expected to.
GOES_BY = ["eval.every_steps=5", "train.max_steps=40", "parallel.reduction=exact"]
SHORT = ["experiment=ragged", *GOES_BY, "log.tensorboard=false", "checkpoint.keep_best=0"]
PLATEAU = ["schedule=plateau", "schedule.threshold=10", "schedule.patience=1"]
EARLY = [
    *("train.early_stop.metric=val/loss", "train.early_stop.mode=min"),
    *("train.early_stop.threshold=10", "train.early_stop.patience=4"),
]


def train(folder: Path, *overrides: str) -> str:
    done = run([*DDPTRAIN, "train", *SHORT, *overrides, f"run.dir={folder}"], PROJECT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_rate_falls_and_a_run_ends_the_same_through_a_kill_and_on_two_ranks(
    tmp_path: Path,
) -> None:
    told = train(tmp_path / "whole", *PLATEAU, *EARLY)
    whole = read_result(tmp_path / "whole")
    assert (whole["status"], whole["step"]) == ("completed", 25)
    assert "ends after step 25 of 40: val/loss has got no better in 4 evaluations (best " in told
    lines = read_json_lines(tmp_path / "whole" / "metrics.jsonl")
    rates = {line["step"]: line["lr"] for line in lines if line["split"] == "train"}
    falls = [step for step in range(2, 26) if rates[step] < 0.5 * rates[step - 1]]
    assert falls == [11, 16, 21]
    assert rates[25] == pytest.approx(rates[1] / 1000)

    assert "completed" in train(tmp_path / "whole", *PLATEAU, *EARLY)  # and takes no step more
    assert read_json_lines(tmp_path / "whole" / "metrics.jsonl") == lines

    slow = [*SHORT, *PLATEAU, *EARLY, f"run.dir={tmp_path / 'killed'}"]
    first = start([*DDPTRAIN, "train", *slow])
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while first.poll() is None:
        if any(line["step"] >= 13 for line in read_json_lines(metrics)):
            kill_tree(first.pid)
    first.communicate(timeout=LIMIT_SECONDS)
    train(tmp_path / "killed", *PLATEAU, *EARLY, "launch.nproc_per_node=2")
    killed = read_result(tmp_path / "killed")
    assert killed["weights_sha256"] == whole["weights_sha256"]
    assert (killed["step"], killed["world_size"]) == (25, 2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([*EARLY, "train.early_stop.metric=val/los"], "train.early_stop.metric=val/los: "),
        ([*EARLY, "eval.every_steps=null"], "but eval.every_steps is null"),
        (
            ["schedule=plateau", "schedule.metric=val/f1"],
            "schedule.metric=val/f1: the task has no such metric; there is",
        ),
        (
            ["schedule=plateau", "eval.every_steps=null"],
            "schedule.metric=val/loss needs evaluations",
        ),
        ([*EARLY, "train.early_stop.threshold=-1"], "train.early_stop.threshold=-1.0: expected 0"),
        (["schedule=step", "schedule.every=0"], "schedule: could not build ddptrain.optim.sch"),
    ],
)
def test_what_cannot_be_gone_by_is_refused_before_a_step(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    done = run([*DDPTRAIN, "train", *SHORT, *overrides, f"run.dir={tmp_path / 'run'}"], PROJECT)
    assert done.returncode == 2
    assert expected in done.stderr.strip().splitlines()[-1]
