"""Ranks are started, told to leave, and waited for; the first failure is the one that is told."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import LIMIT_SECONDS

from ddptrain.launch import agent
from ddptrain.launch.agent import Failure, start_ranks
from ddptrain.processes import is_gone

BEGINNING = """
import json, os, pathlib, signal, subprocess, sys, time
from ddptrain.processes import born
from ddptrain.resilience.failure import tell_agent
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
def say(name): (folder / f"{rank}-{name}").touch()
def until(name):
    while not (folder / name).exists(): time.sleep(0.005)
def heard(number, _):
    say(signal.Signals(number).name)
    sys.exit(5)
"""
LAUNCHER = """
import os, sys
from ddptrain.launch.agent import Asked, start_ranks
try:
    start_ranks(sys.argv[1:], 2)
except Asked as asked:
    print(asked.signal.name, flush=True)
    os._exit(0)
"""


def script(folder: Path, text: str) -> list[str]:
    file = folder / "rank.py"
    file.write_text(BEGINNING + text)
    return [sys.executable, str(file), str(folder)]


def test_ranks_find_each_other(tmp_path: Path) -> None:
    """Also those that are there before the store is, and with what torchrun would set."""
    text = """
import torch.distributed as dist
dist.init_process_group("gloo")
values = [None, None, None]
here = os.environ["LOCAL_RANK"] + os.environ["LOCAL_WORLD_SIZE"]
dist.all_gather_object(values, (here, os.environ["TORCHELASTIC_RUN_ID"]))
print([here for here, _ in values], len({run for _, run in values}))
dist.destroy_process_group()
"""
    assert start_ranks(script(tmp_path, text), 3, tmp_path / "output") is None
    for rank in range(3):
        output = (tmp_path / "output" / str(rank) / "stdout.log").read_text()
        assert output == "['03', '13', '23'] 1\n"


def test_the_first_to_fail_is_told_and_the_others_leave(tmp_path: Path) -> None:
    text = """
signal.signal(signal.SIGTERM, heard)
say("there")
if rank == 1:
    until("0-there"), until("2-there")
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""
    assert start_ranks(script(tmp_path, text), 3) == Failure(1, -signal.SIGKILL, None)
    assert {file.name for file in tmp_path.glob("*-SIGTERM")} == {"0-SIGTERM", "2-SIGTERM"}


def test_who_knows_why_comes_before_who_had_to_leave(tmp_path: Path) -> None:
    """Although it takes longer to end."""
    text = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
say("there")
if rank == 0:
    until("1-there")
    tell_agent("rank 1 has gone", is_cause=False)
    say("told")
    sys.exit(75)
until("0-told")
tell_agent("a division by zero")
sys.exit(1)
"""
    assert start_ranks(script(tmp_path, text), 2) == Failure(1, 1, "a division by zero")


@pytest.mark.parametrize("culprit", [0, 1])
def test_others_are_told_as_soon_as_one_has_ended(tmp_path: Path, culprit: int) -> None:
    """Whichever it is, and although it had left word before."""
    text = f"""
signal.signal(signal.SIGTERM, heard)
if rank == {culprit}:
    until("{1 - culprit}-there")
    tell_agent("a division by zero")
    time.sleep(0.2)
    sys.exit(1)
say("there")
signal.pause()
"""
    assert start_ranks(script(tmp_path, text), 2) == Failure(culprit, 1, "a division by zero")
    assert (tmp_path / f"{1 - culprit}-SIGTERM").exists()


def test_who_does_not_leave_is_killed_and_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "GRACE_SECONDS", 0.2)
    text = """
child = subprocess.Popen(["sleep", "1000"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"{rank}-born").write_text(f"{child.pid} {born(child.pid)}")
(folder / f"{rank}-child").touch()
if rank == 0:
    signal.pause()
until("0-child")
sys.exit(2)
"""
    assert start_ranks(script(tmp_path, text), 2) == Failure(1, 2, None)
    for rank in (0, 1):
        process, when = (tmp_path / f"{rank}-born").read_text().split()
        until = time.monotonic() + LIMIT_SECONDS
        while not is_gone(int(process), when):
            assert time.monotonic() < until


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_handed_on_and_told(tmp_path: Path, number: signal.Signals) -> None:
    text = f"""
signal.signal({int(number)}, heard)
say("there")
signal.pause()
"""
    command = [sys.executable, "-c", LAUNCHER, *script(tmp_path, text)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("*-there"))) < 2:
        assert launcher.poll() is None
    launcher.send_signal(number)
    assert launcher.communicate(timeout=LIMIT_SECONDS)[0] == f"{number.name}\n"
    assert len(list(tmp_path.glob(f"*-{number.name}"))) == 2


def test_a_store_that_cannot_be_had_ends_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = agent.Store()
    store.listener.close()
    monkeypatch.setattr(agent, "Store", lambda: store)
    with pytest.raises(RuntimeError, match="socket"):
        start_ranks(script(tmp_path, "signal.pause()"), 2)
