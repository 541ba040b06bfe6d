"""What a launch is told before it starts: each check, how it came out, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from statistics import median

from rich.filesize import decimal

from ddptrain.launch.machine import LOOPBACK, Machine, by_machine
from ddptrain.launch.probes import SIZES, Probes

GB, MB = 10**9, 10**6
LEAST_DISK, SCANT_DISK = 50 * MB, 2 * GB
SCANT_SHARED = 256 * MB
"""Loading workers hand over batches there, and snapshots go there; Docker gives 64 MB."""
SCANT_MEMORY = GB
"""For each rank: torch alone takes a third of it."""
CLOCKS_SECONDS = 2.0
SLOW_FLUSH = 0.2
BUSY_GPU = 0.8
SLOW_LINK = 0.3
"""Of the link's speed; gloo reaches over 0.9 of it, a few large buffers at a time."""


class State(Enum):
    ok = "ok"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True)
class Finding:
    """One line of the table; ``remedy`` is empty where all is well."""

    check: str
    state: State
    found: str
    remedy: str = ""


def judge(machines: list[Machine], probes: list[Probes]) -> list[Finding]:
    """What the ranks say of themselves and have found together, in order of rank."""
    return [
        _ranks(machines),
        *_versions(machines),
        *_devices(machines),
        *_threads(machines),
        *_memory(machines),
        *_reach(machines, probes),
        *_clocks(machines, probes),
        *_disk(machines),
        *_folder(machines, probes),
    ]


def _ok(check: str, found: str) -> Finding:
    return Finding(check, State.ok, found)


def _warning(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, State.warning, found, remedy)


def _failed(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, State.failed, found, remedy)


def _ranks(machines: list[Machine]) -> Finding:
    counts = Counter(machine.name for machine in machines)
    told = ", ".join(f"{count} on {name}" for name, count in counts.items())
    return _ok("ranks", f"{len(machines)}: {told}")


def _versions(machines: list[Machine]) -> Iterator[Finding]:
    first = machines[0].versions
    for machine in by_machine(machines)[1:]:
        other = machine.versions
        if differs := [
            f"{name} {other.get(name, 'missing')}, not {first.get(name, 'missing')}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]:
            remedy = "install the same on all machines"
            yield _failed("versions", f"{machine.name}: {'; '.join(differs)}", remedy)
            return
    yield _ok("versions", ", ".join(f"{name} {first[name]}" for name in sorted(first)))


def _devices(machines: list[Machine]) -> Iterator[Finding]:
    kinds = Counter(machine.device for machine in machines)
    told = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
    if len(kinds) > 1:
        remedy = "each step waits for the slowest; start on machines that are alike"
        yield _warning("devices", told, remedy)
    else:
        yield _ok("devices", told)
    for machine in machines:
        if (
            machine.gpu_memory is not None
            and machine.gpu_memory[0] < BUSY_GPU * machine.gpu_memory[1]
        ):
            free, total = map(decimal, machine.gpu_memory)
            found = f"rank {machine.rank} on {machine.name}: {free} of {total} are free"
            yield _warning("devices", found, "see who has the rest (nvidia-smi), and end it")


def _threads(machines: list[Machine]) -> Iterator[Finding]:
    there = Counter(machine.name for machine in machines)
    for machine in by_machine(machines):
        ranks = there[machine.name]
        wanted = machine.threads * ranks
        if wanted > machine.cpus and machine.threads > 1:
            found = (
                f"{machine.name}: {ranks} ranks of {machine.threads} threads on {machine.cpus} CPUs"
            )
            most = max(1, machine.cpus // ranks)
            yield _warning("threads", found, f"export OMP_NUM_THREADS={most}")
            return
    first = machines[0]
    yield _ok("threads", f"{first.threads} a rank; {first.cpus} CPUs for {there[first.name]}")


def _memory(machines: list[Machine]) -> Iterator[Finding]:
    there = Counter(machine.name for machine in machines)
    firsts = by_machine(machines)
    for machine in firsts:
        if machine.memory is not None and machine.memory < SCANT_MEMORY * there[machine.name]:
            found = f"{machine.name}: {decimal(machine.memory)} for {there[machine.name]} ranks"
            yield _warning("memory", found, "end what has the rest, or ask for more (--mem)")
        if machine.shared_memory is not None and machine.shared_memory < SCANT_SHARED:
            found = f"{machine.name}: /dev/shm has {decimal(machine.shared_memory)} left"
            remedy = "loading workers and snapshots need it: docker run --shm-size=8g, or clear it"
            yield _warning("memory", found, remedy)
    least = min((m.memory for m in firsts if m.memory is not None), default=None)
    shared = min((m.shared_memory for m in firsts if m.shared_memory is not None), default=None)
    told = [
        f"{decimal(size)} {where}"
        for size, where in ((least, "free"), (shared, "in /dev/shm"))
        if size
    ]
    yield _ok("memory", f"at least {', '.join(told)}" if told else "not known")


def _reach(machines: list[Machine], probes: list[Probes]) -> Iterator[Finding]:
    for machine, found in zip(machines, probes, strict=True):
        for other in found.unreached:
            interface = machine.interface or "no interface of its own"
            yield _failed(
                "network",
                f"{machine.name} does not reach {other} from {interface}",
                "open all ports between them, or choose another interface (launch.interface)",
            )
    if any(found.unreached for found in probes):
        return
    firsts = by_machine(machines)
    if len(firsts) == 1:
        yield _ok("network", f"one machine; ranks meet over {firsts[0].interface}")
    elif any(machine.address.startswith(LOOPBACK) for machine in firsts):
        told = next(m.host for m in firsts if m.address.startswith(LOOPBACK))
        remedy = "give rank 0's address (MASTER_ADDR), not a name that is 127.0.0.1 there"
        yield _failed("network", f"{told} would be 127.0.0.1 to the others", remedy)
    else:
        told = ", ".join(f"{machine.host} over {machine.interface}" for machine in firsts)
        yield _ok("network", f"all machines reach each other: {told}")


def _clocks(machines: list[Machine], probes: list[Probes]) -> Iterator[Finding]:
    middle = median(found.clock for found in probes)
    furthest = max(machines, key=lambda machine: abs(probes[machine.rank].clock - middle))
    off = probes[furthest.rank].clock - middle
    if abs(off) > CLOCKS_SECONDS:
        how = "ahead of" if off > 0 else "behind"
        found = f"{furthest.name} is {abs(off):.0f} s {how} the others"
        yield _warning(
            "clocks", found, "times in logs mislead, time limits are missed: set it (NTP)"
        )
    else:
        yield _ok("clocks", f"within {max(abs(off), 0.01):.2f} s")


def _disk(machines: list[Machine]) -> Iterator[Finding]:
    first = machines[0]
    told = f"{first.folder}: {decimal(first.disk)} free" if first.disk is not None else first.folder
    remedy = "name another folder (run.dir, checkpoint.dir)"
    if first.unwritable is not None:
        yield _failed("disk", f"{first.folder}: {first.unwritable}", remedy)
    elif first.disk is not None and first.disk < LEAST_DISK:
        yield _failed("disk", told, f"make room, or {remedy}")
    elif first.disk is not None and first.disk < SCANT_DISK:
        yield _warning("disk", told, f"see that it takes a few checkpoints, or {remedy}")
    else:
        yield _ok("disk", told)


def _folder(machines: list[Machine], probes: list[Probes]) -> Iterator[Finding]:
    first = probes[0]
    if machines[0].unwritable is not None:
        return  # told already
    if first.flush_seconds is not None and first.flush_seconds > SLOW_FLUSH:
        found = f"a flush takes {first.flush_seconds * 1e3:.0f} ms"
        remedy = "a checkpoint flushes each file: a faster disk, or checkpoint.dir on one"
        yield _warning("folder", found, remedy)
    blind = [m.name for m in by_machine(machines) if not probes[m.rank].sees_folder]
    if blind:
        yield _warning(
            "folder",
            f"{', '.join(blind)}: not the folder that rank 0 writes to",
            "put run.dir on a file system that all share, or losing rank 0's machine loses the run",
        )
    holds = [found.lock_holds for found in probes if found.lock_holds is not None]
    if not all(holds):
        remedy = "mount it with locks (NFS: without nolock), and never start a run twice at once"
        yield _warning("folder", "its locks keep nobody out", remedy)
    if not blind and all(holds):
        flush = (
            ""
            if first.flush_seconds is None
            else f"; a flush takes {first.flush_seconds * 1e3:.1f} ms"
        )
        seen = "seen by all ranks, and its locks hold" if holds else "locks not tried with one rank"
        yield _ok("folder", seen + flush)


def judge_speed(machines: list[Machine], taken: dict[int, float]) -> list[Finding]:
    """How long all-reduces took, and whether the network between machines is used."""
    ranks = len(machines)
    # What each rank sends, whatever the algorithm: see the nccl-tests' notes on performance.
    speeds = {size: 2 * (ranks - 1) / ranks * size / seconds for size, seconds in taken.items()}
    told = "; ".join(
        f"{decimal(size)} in {taken[size] * 1e3:.2f} ms, {decimal(int(speeds[size]))}/s"
        for size in taken
    )
    if left_out := [decimal(size) for size in SIZES if size > max(taken)]:
        told += f"; {' and '.join(left_out)} would take too long"
        remedy = "a step waits for its gradients: take a faster link, or name it (launch.interface)"
        return [_warning("all-reduce", told, remedy)]
    links = [machine.speed for machine in by_machine(machines) if machine.speed is not None]
    if len(by_machine(machines)) == 1 or not links:
        return [_ok("all-reduce", told)]
    share = max(speeds.values()) * 8 / min(links)
    told += f"; {share:.0%} of the slowest link's {min(links) / 1e9:g} Gbit/s"
    if share < SLOW_LINK and all(machine.gpu_memory is None for machine in machines):
        remedy = "see who else uses it, and that launch.interface is the fast one"
        return [_warning("all-reduce", told, remedy)]
    return [_ok("all-reduce", told)]
