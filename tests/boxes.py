"""Machines of their own addresses, whose names nobody knows: network namespaces at a bridge."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launching import PROJECT, environment, kill_tree

SCRIPT = Path(__file__).parents[1] / "launch" / "many-boxes.sh"
ENTER = (
    'mount --bind "$0" /dev/shm && hostname "$1" && ip link set lo up && shift && '
    '{ [ -z "$HIDDEN" ] || mount -t tmpfs none "$HIDDEN"; } && exec "$@"'
)
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
    """Three machines and a switch; ``set_cable`` pulls a cable, or plugs it in again.

    Their addresses are ``network`` with a number from 1 on after it.
    """

    def __init__(self, folder: Path, network: str = "10.214.0.") -> None:
        self.folder = folder
        self.addresses = [f"{network}{number + 1}" for number in range(3)]
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
                address = f"{self.addresses[number]}/{64 if ':' in self.addresses[0] else 24}"
                ip("-n", space, "address", "add", address, "dev", "cable", "nodad")
                ip("-n", space, "link", "set", "cable", "up")
            yield
        finally:
            for box in self.started:
                kill_tree(box.pid)
                box.communicate()
            for space in (self.switch, *self.spaces):
                ip("netns", "del", space)

    def start(
        self, number: int, arguments: list[str], nodes: str, hidden: Path | None = None
    ) -> Box:
        """Run launch/many-boxes.sh there, where another file system may hide a folder."""
        memory = self.folder / f"memory-{number}"
        memory.mkdir(exist_ok=True)
        space = self.spaces[number]
        enter = ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "sh", "-c", ENTER]
        command = [*enter, str(memory), f"box{number}", str(SCRIPT), self.addresses[0]]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = environment() | {"NODES": nodes, "WAIT": "2", "PATH": path}
        variables["HIDDEN"] = str(hidden or "")
        output = (self.folder / f"box-{number}.txt").open("a")
        box = subprocess.Popen(
            [*command, *arguments],
            cwd=PROJECT, env=variables, text=True, stdout=output, stderr=output,
        )  # fmt: skip
        output.close()
        self.started.append(box)
        return box

    def set_cable(self, number: int, state: str) -> None:
        ip("-n", self.switch, "link", "set", f"port{number}", state)

    def slow_down(self, number: int, rate: str) -> None:
        """Let a machine send so much a second at most, such as 10mbit."""
        limit = ("tbf", "rate", rate, "burst", "64k", "latency", "400ms")
        command = ["tc", "-n", self.spaces[number], "qdisc", "add", "dev", "cable", "root", *limit]
        subprocess.run(command, check=True, capture_output=True)

    def part(self, *numbers: int) -> None:
        """Let these machines reach the others only, and not each other."""
        for number in numbers:
            port = f"port{number}"
            ip("-n", self.switch, "link", "set", port, "type", "bridge_slave", "isolated", "on")

    def told(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in self.folder.glob("box-*.txt"))
