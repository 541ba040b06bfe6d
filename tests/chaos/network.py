"""Two nodes on one machine, each with a network, a memory and a name of its own; a link to cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chaos.events import Context
from chaos.setting import Setting

PORT = 29400
ENTER = 'mount --bind "$0" /dev/shm && hostname "$1" && ip link set lo up && shift && exec "$@"'


def unavailable() -> str | None:
    if os.geteuid() != 0:
        return "network namespaces can be made by root alone"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "ip and unshare are needed (apt-get install iproute2 util-linux)"
    name = f"try{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this kernel does not allow network namespaces here"
    _ip("netns", "del", name)
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class TwoNodes(Setting):
    """One rank on each of two nodes, started by torchrun."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.launcher = "torchrun"
        for node in range(self.ranks):
            (self.folder / f"memory-{node}").mkdir()

    def space(self, node: int) -> str:
        return f"c{self.mark[:6]}{node}"

    def address(self, node: int) -> str:
        return f"10.213.77.{node + 1}"

    def memories(self) -> list[Path]:
        shared = self.directory.memories()[0].relative_to("/dev/shm")
        return [self.folder / f"memory-{node}" / shared for node in range(self.ranks)]

    def commands(self) -> list[list[str]]:
        return [self._command(node) for node in range(self.ranks)]

    def _command(self, node: int) -> list[str]:
        space = self.space(node)
        enter = ["ip", "netns", "exec", space, "unshare", "--mount", "--uts", "sh", "-c", ENTER]
        memory = str(self.folder / f"memory-{node}")
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={self.ranks}",
            "--nproc-per-node=1",
            f"--max-restarts={self.restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.address(0)}:{PORT}",
            f"--rdzv-id={self.mark}",
            f"--rdzv-conf=is_host={int(node == 0)},join_timeout=10,read_timeout=10",
            f"--local-addr={self.address(node)}",
        ]
        interface = ["env", f"GLOO_SOCKET_IFNAME={space}"]
        name = f"node{node}"
        return [*enter, memory, name, *interface, *torchrun, "-m", "ddptrain", *self.arguments()]

    @contextmanager
    def network(self) -> Iterator[None]:
        """The link between the nodes, until the block ends."""
        spaces = [self.space(node) for node in range(2)]
        for space in spaces:
            _ip("netns", "add", space)
        try:
            _ip("link", "add", spaces[0], "netns", spaces[0], "type", "veth",
                "peer", "name", spaces[1], "netns", spaces[1])  # fmt: skip
            for node, space in enumerate(spaces):
                _ip("-n", space, "address", "add", f"{self.address(node)}/24", "dev", space)
                _ip("-n", space, "link", "set", space, "up")
            yield
        finally:
            for space in spaces:
                _ip("netns", "del", space)

    def link(self, state: str) -> None:
        """Set the link ``up`` or ``down``."""
        _ip("-n", self.space(1), "link", "set", self.space(1), state)


@dataclass(frozen=True)
class Cut:
    """The link is down for some seconds; None until the run is started again, on other cables."""

    seconds: float | None
    stops: bool = False
    spares: bool = True

    @property
    def name(self) -> str:
        return "link cut for good" if self.seconds is None else f"link cut for {self.seconds:g} s"

    def inject(self, context: Context) -> bool:
        setting = context.setting
        assert isinstance(setting, TwoNodes)
        setting.link("down")
        if self.seconds is None:
            context.repairs.append(lambda: setting.link("up"))
        else:
            context.excused_until = time.monotonic() + self.seconds
            threading.Timer(self.seconds, setting.link, ["up"]).start()
        return True
