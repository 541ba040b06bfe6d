"""Which CPUs a rank computes on: a share of its own of those that the launch has, near its GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddptrain.errors import Refused
from ddptrain.place import Place

SYSTEM = Path("/sys")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Core:
    """The CPUs of one core (two, if it is hyperthreaded), and its node of memory."""

    node: int
    cpus: tuple[int, ...]


def bind_cpus(place: Place, device: torch.device) -> None:
    """Keep this rank, and all that it starts, on its share. Raises ``Refused``."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1" if place.world_size == 1 else None)
    if told is None:
        raise Refused(
            "launch.bind_cpus=true: expected LOCAL_WORLD_SIZE, the number of ranks on this "
            "machine, which torchrun and `ddptrain train` set; set it, or leave the binding out"
        )
    ranks = int(told)
    nodes = [_node_of_gpu(gpu) if device.type == "cuda" else None for gpu in range(ranks)]
    cpus = shares(cores(os.sched_getaffinity(0)), nodes)[place.local_rank]
    for thread in os.listdir("/proc/self/task"):  # those that have been started before
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cpus)
    logger.info("on CPUs %s", ", ".join(map(str, cpus)))


def shares(there: Sequence[Core], nodes: Sequence[int | None]) -> list[list[int]]:
    """The CPUs of each rank, whose GPUs are at these nodes; None is a rank without a preference.

    Ranks of a node divide its cores, the others divide all. Where there are fewer cores than ranks
    they divide the cores' CPUs, and where there are fewer CPUs they have them in common.
    """
    known = {core.node for core in there}
    wanted = [node if node in known else None for node in nodes]
    found = []
    for rank, node in enumerate(wanted):
        number, count = wanted[:rank].count(node), wanted.count(node)
        near = sorted(core for core in there if node in (None, core.node))
        parts: list[tuple[int, ...]] = [core.cpus for core in near]
        if len(parts) < count:
            parts = [(cpu,) for core in near for cpu in core.cpus]
        if len(parts) < count:
            number, count = 0, 1
        part = parts[number * len(parts) // count : (number + 1) * len(parts) // count]
        found.append(sorted(cpu for cpus in part for cpu in cpus))
    return found


def cores(allowed: set[int], system: Path = SYSTEM) -> list[Core]:
    """The cores of the ``allowed`` CPUs; one for each CPU, at node 0, where nothing is told."""
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in (system / "devices/system/node").glob("node[0-9]*")
        for cpu in _listed(folder / "cpulist")
    }
    found = set()
    for cpu in allowed:
        topology = system / f"devices/system/cpu/cpu{cpu}/topology"
        siblings = set(_listed(topology / "thread_siblings_list")) | {cpu}
        found.add(Core(nodes.get(cpu, 0), tuple(sorted(siblings & allowed))))
    return sorted(found)


def _listed(file: Path) -> Iterator[int]:
    """The numbers of a list such as ``0-3,8``; none if there is no such file."""
    with suppress(OSError):
        for part in filter(None, file.read_text().strip().split(",")):
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)


def _node_of_gpu(gpu: int) -> int | None:
    """The node of memory that a GPU is at; None if it has none, or none is told."""
    told: Any = torch.cuda.get_device_properties(gpu)
    address = f"{told.pci_domain_id:04x}:{told.pci_bus_id:02x}:{told.pci_device_id:02x}.0"
    with suppress(OSError, ValueError):
        node = int((SYSTEM / f"bus/pci/devices/{address}/numa_node").read_text())
        return node if node >= 0 else None
    return None
