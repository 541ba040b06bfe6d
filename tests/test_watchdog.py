"""A job that hangs says which rank holds it up and where, within the limit, and goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import (
    DDPTRAIN,
    LIMIT_SECONDS,
    TORCHRUN,
    kill_tree,
    ranks_below,
    read_result,
    run,
    start,
    train,
)
from torch.distributed import HashStore

from ddptrain import pulse
from ddptrain.observe.loggers import read_json_lines
from ddptrain.processes import born, is_gone, kill_if_stopped
from ddptrain.resilience.board import Messenger
from ddptrain.resilience.flight import describe
from ddptrain.resilience.stopped import START_SECONDS
from ddptrain.resilience.verdict import PATIENCE, PATIENT, SILENT_SECONDS, Sign, explain, hangs

EXACT = ["experiment=ragged", "parallel.reduction=exact", "log.tensorboard=false"]
LONG = [*EXACT, "checkpoint.keep_best=0", "train.max_steps=60"]
SHORT = [*LONG, "data.val=null", "eval.every_steps=null"]


# --- the verdict -------------------------------------------------------------------------------


def test_the_rank_that_loads_data_is_named() -> None:
    waiting = [Sign(rank, pulse.REDUCING, 812, 60.5) for rank in range(3)]
    loading = Sign(3, pulse.LOADING, 812, 61.2, stack="data.py:7 in __getitem__")
    assert explain([*waiting, loading]) == (
        "rank 3 has been in data loading of step 812 for 61 s (data.py:7 in __getitem__); "
        "ranks 0–2 wait for it in backward and all-reduce of step 812"
    )


def test_a_rank_that_does_not_answer_is_named_with_its_process() -> None:
    stopped = Sign(1, pulse.FORWARD, 5, 33.0, silent=33.0, host="a", pid=4711)
    told = explain([Sign(0, pulse.REDUCING, 5, 33.0), stopped])
    assert told.startswith("rank 1 (process 4711 on a) has not answered for 33 s")
    assert told.endswith("rank 0 waits for it in backward and all-reduce of step 5")


def test_if_all_wait_it_is_the_network() -> None:
    told = explain([Sign(rank, pulse.REDUCING, 5, 40.0) for rank in (0, 1)])
    assert "ranks 0 and 1 are in backward and all-reduce of step 5" in told
    assert "the network between them is broken" in told


SIGNS = st.lists(
    st.builds(
        Sign,
        st.integers(0, 9),
        st.sampled_from([pulse.LOADING, pulse.REDUCING, pulse.TOGETHER, *PATIENT]),
        st.integers(-1, 99),
        st.floats(0, 1000),
        st.floats(0, 1000),
        finished=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@given(SIGNS)
def test_nobody_is_accused_while_somebody_gets_on(signs: list[Sign]) -> None:
    answering = [s for s in signs if not s.finished and s.silent <= SILENT_SECONDS]
    is_silent = any(s.silent > 60 for s in signs if not s.finished)
    for seconds in (60, 60 * PATIENCE):
        if hangs(signs, seconds) and not is_silent:
            assert all(s.idle > seconds for s in answering)
    if any(s.phase in PATIENT and s.idle < 60 * PATIENCE for s in answering):
        assert hangs(signs, 60) == is_silent
    if [s for s in signs if not s.finished]:
        assert explain(signs)


def test_a_rank_that_is_silent_is_no_progress_whatever_the_others_do() -> None:
    """Stopped while another loads its data set, or writes a checkpoint, which may take long."""
    stopped = Sign(1, pulse.START_UP, -1, 61, silent=61)
    for phase in (*PATIENT, pulse.LOADING):
        assert hangs([Sign(0, phase, -1, 1.0), stopped], 60)
        assert not hangs([Sign(0, phase, -1, 1.0), stopped], 62)


def test_the_flight_recorder_says_what_is_unfinished() -> None:
    done = {"collective_seq_id": 6, "profiling_name": "nccl:all_reduce", "state": "completed"}
    begun = {"collective_seq_id": 7, "profiling_name": "nccl:all_gather", "state": "started"}
    told = describe({"entries": [done, begun]})
    assert told == "; on this rank nccl:all_gather, the 7th collective, is started"
    assert describe({"entries": [done]}) == describe({}) == ""


def test_only_a_stopped_process_of_that_birth_is_killed() -> None:
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    when = born(child)
    assert not is_gone(child, when)
    assert is_gone(child, "another")
    assert not kill_if_stopped(child, when)
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    assert not kill_if_stopped(child, "another")
    assert kill_if_stopped(child, when)
    os.waitpid(child, 0)
    assert is_gone(child, when)


def test_an_alarm_lasts_no_longer_than_until_all_have_been_heard() -> None:
    board = HashStore()
    alarmed = [threading.Event() for _ in range(2)]
    first, second = (Messenger(board, rank, 2, alarmed[rank].set) for rank in range(2))
    for messenger in (first, second):
        messenger.say("at work")
        messenger.start()
    speaks: dict[int, bool] = {}

    def raise_alarm(messenger: Messenger, other: int) -> None:
        def is_heard() -> bool:
            return "a stack" in messenger.heard.get(other, ("", 0.0))[0]

        speaks[messenger.rank] = messenger.raise_alarm("a stack", is_heard, 2 * LIMIT_SECONDS)

    threads = [threading.Thread(target=raise_alarm, args=(first, 1))]
    threads[0].start()
    assert alarmed[1].wait(LIMIT_SECONDS)
    assert not speaks  # the other has not been heard
    threads.append(threading.Thread(target=raise_alarm, args=(second, 0)))
    threads[1].start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert speaks == {0: True, 1: False}
    for messenger in (first, second):
        messenger.end("over")
        assert messenger.has_ended(LIMIT_SECONDS)


AGENT = """
import os, signal, subprocess, sys, time
watched = "import time; from ddptrain.resilience.stopped import end_if_stopped as end; " + (
    "end(0.5); print(flush=True); time.sleep(600)")
os.environ["TORCHELASTIC_RUN_ID"] = "1"
ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
         for code in (watched, "import time; time.sleep(600)")]
ranks[0].stdout.readline()
os.kill(ranks[1].pid, signal.SIGSTOP)
ranks[0].kill()
print(ranks[1].wait(), flush=True)
time.sleep(1)
late = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.kill(late.pid, signal.SIGSTOP)
print(late.wait(), flush=True)
"""


def test_a_rank_stopped_in_mid_start_is_killed_also_when_the_others_have_left() -> None:
    """torch's agent waits for 30 s until it kills a rank that it has asked to end.

    The last one has never had anybody of its own to watch over it.
    """
    agent = start([sys.executable, "-c", AGENT])
    assert agent.stdout is not None
    try:
        for _ in range(2):
            assert agent.stdout.readline().strip() == str(-signal.SIGKILL)
        agent.stdout.read()
        until = time.monotonic() + START_SECONDS / 2
        while left := keepers_of(agent.pid):  # also while nobody has heard that it is over
            assert time.monotonic() < until, left
    finally:
        kill_tree(agent.pid)
        agent.communicate()


KILLED_AGENT = """
import os, signal, subprocess, sys
watched = "import time; from ddptrain.resilience.stopped import end_if_stopped as end; " + (
    "end(600.0); print(flush=True); time.sleep(600)")
os.environ["TORCHELASTIC_RUN_ID"] = "1"
rank = subprocess.Popen([sys.executable, "-c", watched], stdout=subprocess.PIPE)
rank.stdout.readline()
os.kill(rank.pid, signal.SIGSTOP)
print(rank.pid, born := __import__("ddptrain.processes").processes.born(rank.pid), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stopped_rank_does_not_outlive_its_agent() -> None:
    """It was told to end, which it would not hear of before somebody continues it."""
    ended = run([sys.executable, "-c", KILLED_AGENT])
    assert ended.returncode == -signal.SIGKILL
    rank, when = ended.stdout.split()
    until = time.monotonic() + LIMIT_SECONDS
    while not is_gone(int(rank), when):
        assert time.monotonic() < until
        time.sleep(0.01)


def keepers_of(agent: int) -> list[list[str]]:
    commands = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            commands.append(process.read_text().split("\0"))
    return [c for c in commands if "stopped.py" in "".join(c) and str(agent) in c]


# --- real ranks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = train(tmp_path_factory.mktemp("clean") / "run", 1, *SHORT)
    return str(result["weights_sha256"])


def test_a_stopped_rank_is_named_and_killed_and_the_run_goes_on(
    tmp_path: Path, expected: str
) -> None:
    run_dir = tmp_path / "run"
    launcher = [*TORCHRUN, "3", "--max-restarts=2", "-m", "ddptrain"]
    agent = start([*launcher, *SHORT, f"run.dir={run_dir}", "resilience.hang_seconds=6"])
    deadline = time.monotonic() + LIMIT_SECONDS
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 10:
        assert agent.poll() is None, agent.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stopped = ranks_below(agent.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    try:
        _, err = agent.communicate(timeout=LIMIT_SECONDS)
    finally:
        kill_tree(agent.pid)
    assert agent.returncode == 0, err
    assert re.search(rf"rank 1 \(process {stopped} on .*\) has not answered for", err), err
    assert "ranks 0 and 2 wait for it in" in err
    assert not Path(f"/proc/{stopped}").exists()
    result = read_result(run_dir)
    assert result["weights_sha256"] == expected
    assert (result["restarts"], result["lost_steps"]) == (1, 0)
    logs = "".join(file.read_text() for file in (run_dir / "logs").iterdir())
    assert "thread MainThread:" in logs


@pytest.mark.long
def test_a_data_set_that_sleeps_is_named_and_the_run_goes_on(tmp_path: Path, expected: str) -> None:
    run_dir, once = tmp_path / "run", tmp_path / "once"
    sleeping = ["data.train.sleep_at=17", f"data.train.once={once}", "resilience.hang_seconds=6"]
    launcher = [*DDPTRAIN, "train", "launch.nproc_per_node=2"]
    finished = run([*launcher, *SHORT, *sleeping, f"run.dir={run_dir}"])
    if "starting the ranks again" not in finished.stderr:  # it slept in the very first step
        finished = run([*launcher, *SHORT, *sleeping, f"run.dir={run_dir}"])
    assert finished.returncode == 0, finished.stderr
    told = r"rank \d has been in data loading of step \d+ for \d+ s \(.*ragged\.py:\d+ in __getit"
    assert re.search(told, finished.stderr), finished.stderr
    assert read_result(run_dir)["weights_sha256"] == expected


def test_a_collective_that_one_rank_alone_calls_is_named(tmp_path: Path, expected: str) -> None:
    run_dir, once = tmp_path / "run", tmp_path / "once"
    wrong = ["task.culprit=1", "task.barrier_at=50", f"task.once={once}"]
    launcher = [*DDPTRAIN, "train", "launch.nproc_per_node=2", "resilience.hang_seconds=6"]
    finished = run([*launcher, *SHORT, *wrong, f"run.dir={run_dir}"])
    assert finished.returncode == 0, finished.stderr
    told = (
        r"rank 1 has been in forward and backward of step \d+ for \d+ s \(.* in barrier\); rank 0"
    )
    assert re.search(told, finished.stderr), finished.stderr
    for rank in (0, 1):
        (log,) = (run_dir / "logs").glob(f"rank-{rank}.*")
        assert "thread MainThread:" in log.read_text()
    assert read_result(run_dir)["weights_sha256"] == expected


@pytest.mark.long
def test_a_long_evaluation_raises_no_alarm(tmp_path: Path) -> None:
    """Longer than the limit as a whole, though none of its micro-batches is."""
    slow = ["data.val.seconds=0.5", "eval.every_steps=30", "resilience.hang_seconds=4"]
    launcher = [*DDPTRAIN, "train", "launch.nproc_per_node=2", "launch.max_restarts=0"]
    finished = run([*launcher, *LONG, *slow, f"run.dir={tmp_path / 'run'}"])
    assert finished.returncode == 0, finished.stderr
    assert len(read_json_lines(tmp_path / "run" / "attempts.jsonl")) == 1
