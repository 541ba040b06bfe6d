"""What a person sees: a live bar on a terminal, plain and few lines where there is none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from launching import DDPTRAIN, PROJECT, environment, run

RUN = [*DDPTRAIN, "experiment=ragged", "log.every_steps=50", "log.tensorboard=false"]


def on_terminal(command: list[str]) -> tuple[int, bytes]:
    """Run a command on a terminal; return its exit code and all that it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment() | {"TERM": "xterm-256color", "COLUMNS": "120"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:
        pass  # Linux says EIO when the other end closes
    os.close(ours)
    return process.wait(), seen


def test_terminal_gets_a_live_bar(tmp_path: Path) -> None:
    code, seen = on_terminal([*RUN, f"run.dir={tmp_path}"])
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"step +200/200 .*loss \d\.\d+  lr .*samples/s", plain), plain[-2000:]
    assert "step 100  val/loss" in plain
    assert plain.count("completed after 200 steps") == 1


@pytest.mark.long
def test_the_cursor_is_back_after_a_rank_with_a_bar_was_killed(tmp_path: Path) -> None:
    command = [*DDPTRAIN, "train", *RUN[len(DDPTRAIN) :], f"run.dir={tmp_path}"]
    ranks = ["launch.nproc_per_node=2", "launch.max_restarts=0"]
    code, seen = on_terminal([*command, *ranks, "task.culprit=0", "task.kill_at=100"])
    assert code == 1
    assert -1 < seen.rfind(b"\x1b[?25l") < seen.rfind(b"\x1b[?25h")


@pytest.mark.long
def test_a_run_whose_output_is_closed_goes_on(tmp_path: Path) -> None:
    few = ["experiment=ragged", "train.max_steps=8", "log.tensorboard=false"]
    command = [*DDPTRAIN, "train", *few, f"run.dir={tmp_path}"]
    closed = run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], PROJECT)
    assert closed.returncode == 0
    first = (tmp_path / "result.json").read_text()
    assert '"status": "completed"' in first
    again = run(command, PROJECT)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "result.json").read_text() == first


def test_pipe_gets_one_line_per_interval(tmp_path: Path) -> None:
    out = run([*RUN, f"run.dir={tmp_path}"]).stdout
    steps = re.findall(r"^step (\d+)/200  loss", out, re.MULTILINE)
    assert steps == ["50", "100", "150", "200"]
    assert "\x1b" not in out
    assert "\r" not in out
