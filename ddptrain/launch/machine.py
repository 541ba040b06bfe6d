"""What a rank can tell of the machine that it is on, for comparing and judging before a launch."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddptrain.config import Config
from ddptrain.origin import versions
from ddptrain.place import Place, interface_of, own_address
from ddptrain.run_directory import NODE_MEMORY

CGROUP = Path("/sys/fs/cgroup")
LOOPBACK = ("127.", "::1")


@dataclass(frozen=True)
class Machine:
    """As one rank sees it; sizes in bytes.

    None is what cannot be told. ``folder`` is where runs go, ``disk`` what is free there, and
    ``unwritable`` why nothing can be written there; ``speed`` is of ``interface`` in bit/s.
    """

    rank: int
    host: str
    address: str
    interface: str | None
    speed: float | None
    versions: dict[str, str]
    device: str
    gpu_memory: tuple[int, int] | None
    cpus: int
    threads: int
    memory: int | None
    shared_memory: int | None
    folder: str
    disk: int | None
    unwritable: str | None

    @property
    def name(self) -> str:
        """Of the machine: hosts in containers and namespaces may share theirs."""
        return self.host if self.address.startswith(LOOPBACK) else f"{self.host} ({self.address})"

    @staticmethod
    def here(config: Config, place: Place, device: torch.device) -> Machine:
        """That of this rank, whose part in the launch is ``place``."""
        address = own_address(config.launch.interface) or "127.0.0.1"
        interface = config.launch.interface or interface_of(address)
        folder = folder_of_runs(config)
        on_gpu = device.type == "cuda"
        return Machine(
            rank=place.rank,
            host=socket.gethostname(),
            address=address,
            interface=interface,
            speed=_speed(interface),
            versions=_versions(on_gpu),
            device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
            gpu_memory=torch.cuda.mem_get_info(device) if on_gpu else None,
            cpus=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            memory=free_memory(),
            shared_memory=_free(NODE_MEMORY),
            folder=str(folder),
            disk=_free(folder),
            unwritable=_unwritable(folder) if place.rank == 0 else None,
        )

    @staticmethod
    def of(told: dict[str, Any]) -> Machine:
        """The inverse of ``dataclasses.asdict`` and of what JSON makes of it."""
        gpu_memory = told["gpu_memory"]
        return Machine(**told | {"gpu_memory": gpu_memory and tuple(gpu_memory)})


def by_machine(machines: list[Machine]) -> list[Machine]:
    """The first rank of each machine."""
    return list({machine.name: machine for machine in reversed(machines)}.values())[::-1]


def folder_of_runs(config: Config) -> Path:
    """Where the run is to be: its directory, or what there is above it."""
    folder = Path(config.run.dir or Path("runs") / str(config.run.name)).absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _versions(on_gpu: bool) -> dict[str, str]:
    if not on_gpu:
        return versions()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return versions() | {"CUDA": str(torch.version.cuda), "NCCL": nccl}


def _speed(interface: str | None) -> float | None:
    """What the driver says of the link; loopback and many virtual ones say nothing."""
    try:
        megabits = int(Path(f"/sys/class/net/{interface}/speed").read_text())
    except (OSError, ValueError):
        return None
    return megabits * 1e6 if megabits > 0 else None


def free_memory() -> int | None:
    """What this process can still have: of the machine's, or less in a control group."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = dict(line.split(":", 1) for line in lines)
        free = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    with suppress(OSError):
        return min([free, *room_in_groups(Path("/proc/self/cgroup").read_text(), CGROUP)])
    return free


def room_in_groups(groups: str, root: Path) -> list[int]:
    """How many bytes each control group that limits a process leaves it, as its kernel lists them.

    One that is named may be out of sight, in a container; what is at the ``root`` then counts. What
    the kernel only caches is free.
    """
    found = []
    for line in groups.splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        base, limit, used, cache = root, "memory.max", "memory.current", "inactive_file"
        if kinds:  # version 1 of the interface
            base, cache = root / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        named = base / path.lstrip("/")
        for folder in (named, *named.parents):
            if folder.is_relative_to(base):
                with suppress(OSError, ValueError, KeyError):  # "max", or not there
                    lines = (folder / "memory.stat").read_text().splitlines()
                    told = dict(one.split() for one in lines)
                    in_use = int((folder / used).read_text()) - int(told[cache])
                    found.append(max(0, int((folder / limit).read_text()) - in_use))
    return found


def _free(folder: Path) -> int | None:
    try:
        told = os.statvfs(folder)
    except OSError:
        return None
    return told.f_bavail * told.f_frsize


def _unwritable(folder: Path) -> str | None:
    file = folder / f".ddptrain-{os.getpid()}-{time.monotonic_ns()}"
    try:
        file.write_bytes(b"x" * 4096)
        file.unlink()
    except OSError as error:
        return str(error.strerror)
    return None
