"""Faults of the machine: a disk that fills up or breaks, a clock that jumps, no memory left.

Each of them needs something of the machine; ``…_unavailable`` says why it cannot be had, if so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from chaos.events import Context
from chaos.setting import Setting

OWN_CLOCK, OWN_DISK, DISK_AT = "CHAOS_CLOCK", "CHAOS_DISK", "CHAOS_DISK_AT"
CGROUPS = Path("/sys/fs/cgroup")
ENTER = 'mount --bind "$0" /dev/shm && exec "$@"'
ALLOWANCE = 256 * 2**20
"""Bytes that a process in the small memory may allocate."""


def disk_unavailable() -> str | None:
    return None if os.geteuid() == 0 else "a small tmpfs can be mounted by root alone"


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own at ``folder``, until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={mebibytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "chaos", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@dataclass
class SmallMachine(Setting):
    """A run whose disk and whose node's memory are so small that they can be filled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.memory = self.folder / "memory"

    def memories(self) -> list[Path]:
        return [self.memory / path.relative_to("/dev/shm") for path in super().memories()]

    def commands(self) -> list[list[str]]:
        enter = ["unshare", "--mount", "sh", "-c", ENTER, str(self.memory)]
        return [[*enter, *command] for command in super().commands()]

    @contextlib.contextmanager
    def disks(self) -> Iterator[None]:
        """What is small, until the block ends."""
        with small_disk(self.run, mebibytes=16), small_disk(self.memory, mebibytes=16):
            yield


@dataclass(frozen=True)
class Full:
    """The disk of the run directory has no byte left, for some seconds."""

    seconds: float
    name: str = "full disk"
    stops: bool = False
    spares: bool = True

    def place(self, context: Context) -> Path:
        return context.setting.run

    def inject(self, context: Context) -> bool:
        filler = self.place(context) / "filler"
        with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            for size in (2**16, 2**12, 1):
                _fill(stream.fileno(), b"\0" * size)
        context.excused_until = time.monotonic() + self.seconds
        threading.Timer(self.seconds, filler.unlink, [True]).start()  # the run may be over
        return True


@dataclass(frozen=True)
class FullMemory(Full):
    """The node's memory has no byte left, for some seconds: not for batches of workers either."""

    name: str = "full memory"

    def place(self, context: Context) -> Path:
        setting = context.setting
        return setting.memory if isinstance(setting, SmallMachine) else setting.folder


def _fill(descriptor: int, block: bytes) -> None:
    try:
        while True:
            os.write(descriptor, block)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def preload_unavailable() -> str | None:
    return None if which("cc") else "a C compiler is needed, for a clock and a disk of its own"


def preloaded(folder: Path) -> dict[str, str]:
    """Variables that give a process a wall clock that can be set, and a disk that can break.

    No other clock moves, and no other disk breaks than that of ``folder / "run"``.
    """
    library = folder / "machine.so"
    source = Path(__file__).with_name("machine.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    files = {OWN_CLOCK: folder / "clock", OWN_DISK: folder / "disk", DISK_AT: folder / "run"}
    return {"LD_PRELOAD": str(library), **{name: str(file) for name, file in files.items()}}


@dataclass(frozen=True)
class Broken:
    """Nothing can be changed on the disk of the run directory, for some seconds."""

    seconds: float
    error: int
    stops: bool = False
    spares: bool = True

    @property
    def name(self) -> str:
        return f"disk with {errno.errorcode[self.error]}"

    def inject(self, context: Context) -> bool:
        file = Path(context.setting.variables[OWN_DISK])
        _replace(file, str(self.error))
        context.excused_until = time.monotonic() + self.seconds
        threading.Timer(self.seconds, file.unlink, [True]).start()  # the run may be over
        return True


def _replace(file: Path, text: str) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(file)


@dataclass(frozen=True)
class Jump:
    """The wall clock of all processes of the run is set, by so many seconds from the true time."""

    seconds: int
    stops: bool = False
    spares: bool = True

    @property
    def name(self) -> str:
        return f"clock set by {self.seconds:+d} s"

    def inject(self, context: Context) -> bool:
        _replace(Path(context.setting.variables[OWN_CLOCK]), f"{self.seconds:+d}")
        return True


def memory_unavailable() -> str | None:
    if os.geteuid() != 0:
        return "a memory cgroup can be made by root alone"
    if _small_group() is None:
        return f"there is no memory cgroup that can be written to under {CGROUPS}"
    return None


def _small_group() -> tuple[Path, str] | None:
    """The memory cgroup that this process may make, and the name of its limit."""
    candidates = [(CGROUPS / "memory", "memory.limit_in_bytes"), (CGROUPS, "memory.max")]
    for parent, limit in candidates:
        group = parent / f"ddptrain-{os.getpid()}-try"
        try:
            group.mkdir()
        except OSError:
            continue
        there = (group / limit).exists()
        group.rmdir()
        if there:
            return parent / f"ddptrain-{os.getpid()}", limit
    return None


@contextlib.contextmanager
def small_memory() -> Iterator[None]:
    """A memory cgroup that allows little, until the block ends."""
    available = _small_group()
    assert available is not None
    group, limit = available
    group.mkdir()
    try:
        (group / limit).write_text(str(ALLOWANCE))
        yield
    finally:
        group.rmdir()


@dataclass(frozen=True)
class OutOfMemory:
    """A rank in ``small_memory`` allocates in its next step until the kernel kills it."""

    name: str = "out of memory"
    stops: bool = False
    spares: bool = True

    def inject(self, context: Context) -> bool:
        ranks = [p for p in context.processes() if p.is_rank]
        if not ranks:
            return False
        chosen = context.random.choice(ranks)
        available = _small_group()
        assert available is not None
        (available[0] / "cgroup.procs").write_text(str(chosen.pid))
        (context.setting.notes / f"grow-{chosen.rank}").touch()
        return True
