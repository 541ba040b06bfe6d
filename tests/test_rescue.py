"""Whatever ends a run, started again it goes on from its last step, and ends with the same bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import (
    DDPTRAIN,
    LIMIT_SECONDS,
    PROJECT,
    TORCHRUN,
    environment,
    kill_tree,
    ranks_below,
    read_metrics,
    read_result,
    start,
    train,
    tree,
)

from ddptrain.data.plan import Plan
from ddptrain.observe.loggers import read_json_lines
from ddptrain.run_directory import RunDirectory

STEPS = 80
EXACT = ["experiment=ragged", "parallel.reduction=exact", "log.tensorboard=false"]
ALONE = ["data.val=null", "eval.every_steps=null", "checkpoint.keep_best=0"]
QUIET = [*ALONE, "checkpoint.memory_every_steps=null"]
RUN = [*EXACT, *QUIET, "log.fingerprint_every=1", f"train.max_steps={STEPS}"]
UNDER_TORCHRUN = [*TORCHRUN, "2", "--max-restarts=2", "-m", "ddptrain"]
LAUNCHED = [*DDPTRAIN, "train", "launch.nproc_per_node=2"]
HOLD_AT = 215  # a rank's forward, in step 38 or 40 of two ranks: no run is over before its fault
Started = subprocess.Popen[str]
Inject = Callable[[Started], None]


def signal_rank(rank: int, number: signal.Signals) -> Inject:
    return lambda agent: os.kill(ranks_below(agent.pid)[rank], number)


def signal_agent(number: signal.Signals) -> Inject:
    return lambda agent: agent.send_signal(number)


def signal_all(number: signal.Signals) -> Inject:
    """Every process of the run, loading workers as well: what scancel and Ctrl-C do."""

    def inject(agent: Started) -> None:
        for process in tree(agent.pid):
            os.kill(process, number)

    return inject


def steps_of(run_dir: Path) -> list[int]:
    lines = read_json_lines(run_dir / "fingerprints.jsonl")
    return [line["step"] for line in lines[1:]]


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The log lines; of what a task logs, a rank that was killed took its share with it."""
    return [{k: v for k, v in line.items() if k != "accuracy"} for line in read_metrics(run_dir)]


def held(folder: Path) -> list[str]:
    """Options with which a run waits for the file ``go`` in a folder."""
    return [f"task.hold_at={HOLD_AT}", f"task.hold={folder / 'go'}"]


def wait_for(run_dir: Path, step: int, agent: Started) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not steps_of(run_dir) or steps_of(run_dir)[-1] < step:
        assert agent.poll() is None, agent.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(agent: Started) -> tuple[int, str]:
    """The exit code and stderr of a command that ends by itself."""
    try:
        _, err = agent.communicate(timeout=LIMIT_SECONDS)
    finally:
        kill_tree(agent.pid)
    return agent.returncode, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    return train(run_dir, 1, *RUN), run_dir


@pytest.mark.parametrize(
    ("launcher", "inject", "code"),
    [
        pytest.param(UNDER_TORCHRUN, signal_rank(0, signal.SIGKILL), 0, id="rank 0 is killed"),
        pytest.param(LAUNCHED, signal_rank(0, signal.SIGUSR2), 75, id="SIGUSR2 to one rank"),
        pytest.param(
            *(UNDER_TORCHRUN, signal_agent(signal.SIGTERM), 1),
            **{"id": "SIGTERM to torchrun", "marks": pytest.mark.long},
        ),
        pytest.param(
            *(UNDER_TORCHRUN, signal_agent(signal.SIGKILL), -9),
            **{"id": "torchrun is killed", "marks": pytest.mark.long},
        ),
        pytest.param(
            *(LAUNCHED, signal_all(signal.SIGINT), 75),
            **{"id": "Ctrl-C", "marks": pytest.mark.long},
        ),
    ],
)
def test_no_step_is_lost(
    undisturbed: tuple[dict[str, Any], Path],
    tmp_path: Path,
    launcher: list[str],
    inject: Inject,
    code: int,
) -> None:
    clean, clean_dir = undisturbed
    run_dir = tmp_path / "run"
    command = [*launcher, *RUN, *held(tmp_path), "data.workers=1", f"run.dir={run_dir}"]
    agent = start(command)
    wait_for(run_dir, 30, agent)
    inject(agent)
    (tmp_path / "go").touch()
    ended, err = finish(agent)
    assert ended == code, err[-3000:]
    if launcher == LAUNCHED:
        assert f"with run.dir={run_dir}" in err
    if code:
        ended, err = finish(start(command))
        assert ended == 0, err[-3000:]
    told = read_result(run_dir)
    assert told["weights_sha256"] == clean["weights_sha256"]
    assert (told["restarts"], told["lost_steps"]) == (1, 0)
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    assert read_json_lines(run_dir / "fingerprints.jsonl") == read_json_lines(
        clean_dir / "fingerprints.jsonl"
    )
    assert lines_of(run_dir) == lines_of(clean_dir)
    assert not any(folder.exists() for folder in RunDirectory(run_dir).memories())


@pytest.mark.long
def test_all_ranks_killed_at_once_go_on_from_the_snapshot_in_memory(
    undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Nobody is left to save, so what is lost is less than ``checkpoint.memory_every_steps``."""
    run_dir = tmp_path / "run"
    every = "checkpoint.memory_every_steps=8"
    agent = start([*LAUNCHED, *RUN, *held(tmp_path), every, f"run.dir={run_dir}"])
    wait_for(run_dir, 30, agent)
    ranks = ranks_below(agent.pid)
    for process in ranks.values():
        os.kill(process, signal.SIGKILL)
    (tmp_path / "go").touch()
    ended, err = finish(agent)
    assert ended == 0, err[-3000:]
    told = read_result(run_dir)
    assert told["weights_sha256"] == undisturbed[0]["weights_sha256"]
    assert told["restarts"] == 1
    assert 0 <= told["lost_steps"] <= 8 + 8  # the newest may not have been sealed yet
    assert steps_of(run_dir) == list(range(1, STEPS + 1))


def test_the_cause_is_told_before_what_comes_of_it_and_again_in_the_end(tmp_path: Path) -> None:
    killed = ["task.culprit=1", "task.kill_at=60", "launch.max_restarts=0"]
    ended, err = finish(start([*LAUNCHED, *RUN, *killed, f"run.dir={tmp_path / 'run'}"]))
    assert ended == 1
    lines = err.splitlines()
    assert lines[0] == "rank 1: was killed by SIGKILL; the others save and leave"
    assert lines[-1].startswith("rank 1: was killed by SIGKILL, without a word; its log: ")


@pytest.mark.long
def test_a_terminal_that_is_closed_stops_a_run_and_loses_nothing(
    undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = [*UNDER_TORCHRUN, *RUN, *held(tmp_path), "data.workers=1", f"run.dir={run_dir}"]
    ours, terminal = os.openpty()
    agent = subprocess.Popen(
        ["setsid", "--ctty", *command],
        cwd=PROJECT,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    wait_for(run_dir, 30, agent)
    os.close(ours)
    (tmp_path / "go").touch()
    ended, _ = finish(agent)
    assert ended != 0
    done = steps_of(run_dir)[-1]
    assert read_result(run_dir)["status"] == "stopped"
    ended, err = finish(start(command))
    assert ended == 0, err[-3000:]
    told = read_result(run_dir)
    assert told["weights_sha256"] == undisturbed[0]["weights_sha256"]
    assert (told["restarts"], told["lost_steps"]) == (1, 0)
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    assert read_json_lines(run_dir / "attempts.jsonl")[1]["step"] == done


@pytest.mark.long
def test_a_worker_killed_in_the_first_step_is_no_reason_to_give_up(
    undisturbed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """Nor is a screen that takes no line."""
    run_dir = tmp_path / "run"
    plan = Plan(86, 24, 2)
    first = plan.indices(plan.micro_batches(0)[0])[0]
    killed = [f"data.train.kill_at={first}", f"data.train.once={tmp_path / 'once'}"]
    command = [*LAUNCHED, *RUN, *killed, "data.workers=1", f"run.dir={run_dir}"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=PROJECT, env=environment(), stdout=full, stderr=full, check=False
        )
    assert done.returncode == 0
    assert (tmp_path / "once").exists()
    told = read_result(run_dir)
    assert told["weights_sha256"] == undisturbed[0]["weights_sha256"]
    assert told["restarts"] == 1


@pytest.mark.long
def test_a_signal_between_two_starts_is_heeded(tmp_path: Path) -> None:
    """Every start is killed; from the second on there is a pause."""
    killed = ["data.train.kill_at=0", "launch.max_restarts=9", f"run.dir={tmp_path / 'run'}"]
    agent = start([*LAUNCHED, *RUN, *killed])
    assert agent.stderr is not None
    while "starting the ranks again; at most 6 more times" not in (line := agent.stderr.readline()):
        assert line, agent.wait()
    agent.terminate()
    ended, err = finish(agent)
    assert ended == 75, err
    assert err.splitlines()[-1].startswith("SIGTERM: ")
    assert "stopped between two starts" in err


@pytest.mark.long
def test_a_loss_scale_and_running_statistics_are_rescued_as_well(tmp_path: Path) -> None:
    options = [*RUN, "train.precision=fp16", "model.batch_norm=true", "train.max_steps=40"]
    clean = train(tmp_path / "clean", 1, *options)
    killed = ["task.culprit=1", "task.kill_at=75", f"task.once={tmp_path / 'once'}"]
    ended, err = finish(start([*LAUNCHED, *options, *killed, f"run.dir={tmp_path / 'killed'}"]))
    assert ended == 0, err[-3000:]
    told = read_result(tmp_path / "killed")
    assert (told["restarts"], told["lost_steps"]) == (1, 0)
    assert told["weights_sha256"] == clean["weights_sha256"]


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """While the first waits for a step that never ends."""
    run_dir = tmp_path / "run"
    sleeping = ["data.train.sleep_at=3", "experiment=ragged", f"run.dir={run_dir}"]
    alone = start([*DDPTRAIN, *sleeping, "log.tensorboard=false"], PROJECT)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (run_dir / "attempts.jsonl").exists():
        assert alone.poll() is None, alone.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    alone.send_signal(signal.SIGINT)
    assert alone.stderr is not None
    assert "SIGINT: stops after this step" in alone.stderr.readline()
    while alone.poll() is None:  # the first of them are taken for echoes
        alone.send_signal(signal.SIGINT)
        time.sleep(0.1)
    ended, err = finish(alone)
    assert ended == 1
    assert "interrupted again" in err


@pytest.mark.long
def test_a_rank_that_cannot_stop_saves_from_the_side(tmp_path: Path) -> None:
    """A data set that sleeps in step 3 holds up the stop until the grace is over."""
    run_dir = tmp_path / "run"
    once = tmp_path / "once"
    command = [*DDPTRAIN, *RUN, f"run.dir={run_dir}", "resilience.grace_seconds=2"]
    command += ["data.train.sleep_at=17", f"data.train.once={once}"]
    alone = start(command)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not once.exists():
        assert alone.poll() is None, alone.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    alone.send_signal(signal.SIGTERM)
    ended, err = finish(alone)
    assert ended == 75, err
    assert "could not stop within 2 s of SIGTERM" in err
    done = steps_of(run_dir)
    ended, err = finish(start(command))
    assert ended == 0, err
    assert read_result(run_dir)["lost_steps"] == 0
    assert json.loads((run_dir / "attempts.jsonl").read_text().splitlines()[1])["step"] == done[-1]


@pytest.mark.long
def test_a_step_that_fails_three_times_ends_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [*LAUNCHED, *RUN, f"run.dir={run_dir}", "launch.max_restarts=9"]
    ended, err = finish(start([*command, "data.train.fail_at=60", "data.shuffle=false"]))
    assert ended == 1
    starts = read_json_lines(run_dir / "attempts.jsonl")
    assert [line["step"] for line in starts] == [0, 2, 2]
    last = err.strip().splitlines()[-1]
    assert last.startswith("ddptrain: step 2 has failed 3 times in a row, so this run is not")
    assert re.search(r"samples \d+.*: sample 60: ValueError: the file is corrupt$", last)
    assert 'raise ValueError("the file is corrupt")' in err  # the user's own traceback
