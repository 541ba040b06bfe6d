"""launch/many-boxes.sh between machines of their own addresses, whose names nobody knows."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from boxes import Boxes, unavailable
from launching import LIMIT_SECONDS, PROJECT, environment, kill_tree, read_result, train

from ddptrain.observe.loggers import read_json_lines

RUN = [
    *("experiment=ragged", "parallel.reduction=exact", "log.tensorboard=false", "data.val=null"),
    *("eval.every_steps=null", "checkpoint.keep_best=0", "checkpoint.every_steps=null"),
    *("train.max_steps=400", "resilience.hang_seconds=5"),
]


def wait_for_size(boxes: Boxes, run_dir: Path, size: int) -> None:
    """Until that many ranks have taken a few steps."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        starts = read_json_lines(run_dir / "attempts.jsonl")
        lines = read_json_lines(run_dir / "metrics.jsonl")
        is_there = bool(starts) and starts[-1]["world_size"] == size
        if is_there and lines and lines[-1]["step"] > starts[-1]["step"] + 3:
            return
        assert boxes.started[0].poll() is None, boxes.told()
        assert time.monotonic() < deadline, boxes.told()
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_machines_come_late_are_lost_and_come_back(tmp_path: Path) -> None:
    clean = train(tmp_path / "clean", 1, *RUN)
    boxes = Boxes(tmp_path)
    run_dir = tmp_path / "run"
    arguments = [*RUN, "data.train.seconds=0.005", f"run.dir={run_dir}"]
    with boxes.network():
        first = boxes.start(0, arguments, "1:3")
        wait_for_size(boxes, run_dir, 1)
        boxes.start(1, arguments, "1:3")
        wait_for_size(boxes, run_dir, 2)
        boxes.start(2, arguments, "1:3")
        wait_for_size(boxes, run_dir, 3)
        boxes.set_cable(2, "down")
        wait_for_size(boxes, run_dir, 2)
        kill_tree(boxes.started[2].pid)
        boxes.set_cable(2, "up")
        boxes.start(2, arguments, "1:3")
        wait_for_size(boxes, run_dir, 3)
        assert first.wait(LIMIT_SECONDS) == 0, boxes.told()
    told = read_result(run_dir)
    assert (told["status"], told["lost_steps"]) == ("completed", 0), boxes.told()
    assert told["weights_sha256"] == clean["weights_sha256"]


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_who_came_is_named_where_too_few_do(tmp_path: Path) -> None:
    boxes = Boxes(tmp_path)
    with boxes.network():
        came = [boxes.start(number, [*RUN, "launch.timeout=15"], "3") for number in (0, 2)]
        assert [box.wait(LIMIT_SECONDS) for box in came] == [1, 1], boxes.told()
    line = "ddptrain: of at least 3 machines 2 came to 10.214.0.1:29400 within 15 s: "
    told = [(tmp_path / f"box-{number}.txt").read_text() for number in (0, 2)]
    assert all(line in each and "Traceback" not in each for each in told), boxes.told()
    names = told[0].split(line)[1].split(";")[0].split(", ")
    assert sorted(names) == ["box0 (10.214.0.1)", "box2 (10.214.0.3)"]


def meet(endpoint: str, seconds: int = 1) -> list[str]:
    """What torchrun says that meets others there, and does not come to start a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    where = ["--rdzv-backend=ddptrain", f"--rdzv-endpoint={endpoint}"]
    told = subprocess.run(
        [*command, *where, f"--rdzv-conf=join_timeout={seconds}", "-m", "ddptrain"],
        cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    return [str(told.returncode), *told.stderr.splitlines()]


def test_an_endpoint_that_cannot_be_is_told_in_one_line() -> None:
    named = meet("localhost:29400")
    assert named[0] == "2"
    assert named[-1].startswith(f"ddptrain: localhost means 127.0.0.1 on {socket.gethostname()}")
    unknown = meet("nowhere.invalid:29400")
    assert unknown[0] == "2"
    assert unknown[-1].startswith("ddptrain: nowhere.invalid means nothing on ")
