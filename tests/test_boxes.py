"""launch/many-boxes.sh between machines of their own addresses, whose names nobody knows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from boxes import Boxes, unavailable
from launching import LIMIT_SECONDS, kill_tree, read_result, train

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
