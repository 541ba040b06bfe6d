"""What ranks try together before a launch: to reach each other, to share a folder, to add."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from ddptrain.claim import Lock
from ddptrain.launch.machine import Machine, by_machine
from ddptrain.parallel.ranks import Ranks

REACH_SECONDS = 3.0
AT_ONCE = 64
VISIBLE_SECONDS = 3.0
"""Network file systems may keep the list of a folder for so long; most keep it for less."""
SIZES = (1 << 12, 1 << 20, 1 << 24, 1 << 26)
"""Bytes: a few statistics, a small bucket, DDP's bucket, a large one."""
SIZE_SECONDS, MOST = 1.0, 50


@dataclass(frozen=True)
class Probes:
    """What came of it, as one rank saw it; its clock in seconds since the epoch."""

    unreached: list[str] = field(default_factory=list)
    clock: float = 0.0
    sees_folder: bool = True
    lock_holds: bool | None = None
    flush_seconds: float | None = None


def probe(ranks: Ranks, machines: list[Machine]) -> list[Probes]:
    """What all ranks found of reach, clocks and the folder, in rank order, on every rank.

    The first rank of each machine tries for it. Needs no process group: what would keep one from
    being formed is found here.
    """
    here = machines[ranks.rank]
    firsts = by_machine(machines)
    with _listening(here.address) as port:
        ports = [int(told["port"]) for told in ranks.tell({"port": port})]
        others = [machine for machine in firsts if machine is not here and here in firsts]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            reached = list(pool.map(lambda machine: _reaches(machine, ports), others))
        unreached = [one for one, is_reached in zip(others, reached, strict=True) if not is_reached]
        ranks.tell({})  # nobody stops listening before all have tried
    clock = time.time()
    sees, holds, seconds = _try_folder(ranks, here)
    own = Probes([m.name for m in unreached], clock, sees, holds, seconds)
    return [Probes(**told) for told in ranks.tell(vars(own))]


@contextmanager
def _listening(address: str) -> Iterator[int]:
    """Listen at a port of the address by which others are to reach this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=1024) as server:
        yield server.getsockname()[1]


def _reaches(machine: Machine, ports: list[int]) -> bool:
    with suppress(OSError):
        socket.create_connection((machine.address, ports[machine.rank]), REACH_SECONDS).close()
        return True
    return False


def _try_folder(ranks: Ranks, here: Machine) -> tuple[bool, bool | None, float | None]:
    """Whether this rank sees what rank 0 writes, and is kept out by its lock; a flush's seconds.

    Of a rank that does not see the folder, and of rank 0, nothing can be said of the lock.
    """
    folder = Path(here.folder)
    file = folder / f".ddptrain-{ranks.attempt.name}"
    lock, seconds = Lock(file), None
    if ranks.is_first:
        with suppress(OSError):
            seconds = _flush(file)
            lock.is_ours()  # last: closing the file once gives up all locks on it
    ranks.tell({})
    sees = ranks.is_first or _appears(file)
    holds = None
    if sees and not ranks.is_first:
        with suppress(OSError):
            holds = lock.is_taken()
    ranks.tell({})
    lock.give_up()
    if ranks.is_first:
        with suppress(OSError):
            file.unlink()
    return sees, holds, seconds


def _appears(file: Path) -> bool:
    until = time.monotonic() + VISIBLE_SECONDS
    while not file.exists():
        if time.monotonic() > until:
            return False
        with suppress(OSError):
            os.listdir(file.parent)  # some network file systems look again only then
        time.sleep(0.05)
    return True


def _flush(file: Path) -> float:
    """Seconds until a page is on disk, the median of five."""
    taken = []
    with file.open("wb", buffering=0) as opened:
        for _ in range(5):
            began = time.perf_counter()
            opened.write(b"x" * 4096)
            os.fsync(opened.fileno())
            taken.append(time.perf_counter() - began)
    return sorted(taken)[2]


def all_reduce(ranks: Ranks, seconds: float) -> dict[int, float]:
    """Median seconds of an all-reduce of so many bytes, as rank 0 measures it, for some sizes.

    Those that would not be over within so many ``seconds`` of all are left out.
    """
    found: dict[int, float] = {}
    until = time.monotonic() + seconds
    for last, size in zip((0, *SIZES), SIZES, strict=False):
        # What takes the smallest is on the way, whatever the link carries.
        expected = found.get(last, 0.0) * (size / last if last > SIZES[0] else 1)
        if ranks.gather(2 * expected > until - time.monotonic())[0]:
            break
        buffer = torch.zeros(size // 4, device=ranks.device)
        _timed(buffer)
        rounds = min(max(int(SIZE_SECONDS / ranks.gather(_timed(buffer))[0]), 1), MOST)
        found[size] = sorted(_timed(buffer) for _ in range(rounds))[rounds // 2]
    return found


def _timed(buffer: torch.Tensor) -> float:
    began = time.perf_counter()
    dist.all_reduce(buffer)
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)
    return time.perf_counter() - began
