"""launch/many-boxes.sh between machines of their own addresses, whose names nobody knows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import LIMIT_SECONDS, PROJECT, environment, kill_tree, read_result, train

from ddptrain.observe.loggers import read_json_lines

SCRIPT = Path(__file__).parents[1] / "launch" / "many-boxes.sh"
RUN = [
    *("experiment=ragged", "parallel.reduction=exact", "log.tensorboard=false", "data.val=null"),
    *("eval.every_steps=null", "checkpoint.keep_best=0", "checkpoint.every_steps=null"),
    *("train.max_steps=400", "resilience.hang_seconds=5"),
]
ENTER = 'mount --bind "$0" /dev/shm && hostname "$1" && ip link set lo up && shift && exec "$@"'
Box = subprocess.Popen[str]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def unavailable() -> str:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need root, and ip and unshare"
    name = f"try{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this kernel does not allow network namespaces here"
    made = subprocess.run(["ip", "-n", name, "link", "add", "name", "bridge", "type", "bridge"])
    ip("netns", "del", name)
    return "" if made.returncode == 0 else "this kernel has no bridges"


class Boxes:
    """Three machines and a switch; ``cut`` pulls a cable, ``join`` plugs it in again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spaces = [f"b{os.getpid()}-{number}" for number in range(3)]
        self.switch = f"b{os.getpid()}-s"
        self.started: list[Box] = []

    @contextmanager
    def network(self) -> Iterator[None]:
        for space in (self.switch, *self.spaces):
            ip("netns", "add", space)
        try:
            ip("-n", self.switch, "link", "add", "name", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "dev", "bridge", "up")
            for number, space in enumerate(self.spaces):
                ip("link", "add", "cable", "netns", space, "type", "veth",
                   "peer", "name", f"port{number}", "netns", self.switch)  # fmt: skip
                ip("-n", self.switch, "link", "set", f"port{number}", "master", "bridge", "up")
                ip("-n", space, "address", "add", f"10.214.0.{number + 1}/24", "dev", "cable")
                ip("-n", space, "link", "set", "cable", "up")
            yield
        finally:
            for box in self.started:
                kill_tree(box.pid)
                box.communicate()
            for space in (self.switch, *self.spaces):
                ip("netns", "del", space)

    def start(self, number: int, run_dir: Path) -> Box:
        memory = self.folder / f"memory-{number}"
        memory.mkdir(exist_ok=True)
        space = self.spaces[number]
        enter = ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "sh", "-c", ENTER]
        command = [*enter, str(memory), f"box{number}", str(SCRIPT), "10.214.0.1"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = environment() | {"NODES": "1:3", "WAIT": "2", "PATH": path}
        slow = "data.train.seconds=0.005"
        output = (self.folder / f"box-{number}.txt").open("a")
        box = subprocess.Popen(
            [*command, *RUN, slow, f"run.dir={run_dir}"],
            cwd=PROJECT, env=variables, text=True, stdout=output, stderr=output,
        )  # fmt: skip
        output.close()
        self.started.append(box)
        return box

    def set_cable(self, number: int, state: str) -> None:
        ip("-n", self.switch, "link", "set", f"port{number}", state)

    def wait_for_size(self, run_dir: Path, size: int) -> None:
        """Until that many ranks have taken a few steps."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while True:
            starts = read_json_lines(run_dir / "attempts.jsonl")
            lines = read_json_lines(run_dir / "metrics.jsonl")
            is_there = bool(starts) and starts[-1]["world_size"] == size
            if is_there and lines and lines[-1]["step"] > starts[-1]["step"] + 3:
                return
            assert self.started[0].poll() is None, self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def told(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in self.folder.glob("box-*.txt"))


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_machines_come_late_are_lost_and_come_back(tmp_path: Path) -> None:
    clean = train(tmp_path / "clean", 1, *RUN)
    boxes = Boxes(tmp_path)
    run_dir = tmp_path / "run"
    with boxes.network():
        first = boxes.start(0, run_dir)
        boxes.wait_for_size(run_dir, 1)
        boxes.start(1, run_dir)
        boxes.wait_for_size(run_dir, 2)
        boxes.start(2, run_dir)
        boxes.wait_for_size(run_dir, 3)
        boxes.set_cable(2, "down")
        boxes.wait_for_size(run_dir, 2)
        kill_tree(boxes.started[2].pid)
        boxes.set_cable(2, "up")
        boxes.start(2, run_dir)
        boxes.wait_for_size(run_dir, 3)
        assert first.wait(LIMIT_SECONDS) == 0, boxes.told()
    told = read_result(run_dir)
    assert (told["status"], told["lost_steps"]) == ("completed", 0), boxes.told()
    assert told["weights_sha256"] == clean["weights_sha256"]
