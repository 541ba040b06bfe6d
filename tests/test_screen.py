"""What a person sees: a live bar on a terminal, plain and few lines where there is none."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

from launching import DDPTRAIN, PROJECT, environment, run

RUN = [*DDPTRAIN, "experiment=ragged", "log.every_steps=50", "log.tensorboard=false"]


def test_terminal_gets_a_live_bar(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*RUN, f"run.dir={tmp_path}"],
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
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"step +200/200 .*loss \d\.\d+  lr .*samples/s", plain), plain[-2000:]
    assert "step 100  val/loss" in plain
    assert plain.count("completed after 200 steps") == 1


def test_pipe_gets_one_line_per_interval(tmp_path: Path) -> None:
    out = run([*RUN, f"run.dir={tmp_path}"]).stdout
    steps = re.findall(r"^step (\d+)/200  loss", out, re.MULTILINE)
    assert steps == ["50", "100", "150", "200"]
    assert "\x1b" not in out
    assert "\r" not in out
