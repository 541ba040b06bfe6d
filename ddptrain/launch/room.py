"""How much memory a rank has used at most, and what it may still have."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from ddptrain.launch.machine import free_memory

HEADROOM = 0.1
"""The share of what there is that a training should leave free: not all micro-batches are alike."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SAYINGS = (
    "out of memory", "can't allocate memory", "bad_alloc", "cannot allocate memory",
    "alloc_failed", "could not create a memory",
)  # fmt: skip
"""What torch and its libraries say when there is no memory left, in lower case."""


class Room(Protocol):
    """The memory of a rank's device, in bytes."""

    def begin(self) -> None:
        """Give back what is only kept, and forget the peak."""

    def peak(self) -> int:
        """The most that was used since ``begin``."""

    def spare(self) -> int:
        """What a try has to leave free of a limit at which an allocation fails."""

    def left(self) -> int | None:
        """What more may be used before the kernel ends the process.

        None if an allocation fails first.
        """

    def used(self) -> int:
        """What is used now."""


class OnGPU:
    """As torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def spare(self) -> int:
        return int(HEADROOM * torch.cuda.mem_get_info(self.device)[1])

    def left(self) -> int | None:
        return None

    def used(self) -> int:
        return torch.cuda.memory_allocated(self.device)


class OnCPU:
    """Of the process, which shares the machine with ``ranks`` of the launch."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def begin(self) -> None:
        with suppress(OSError):  # then the peak is that of all tries, of which the last is largest
            CLEAR.write_text("5")

    def peak(self) -> int:
        return _told("VmHWM")

    def spare(self) -> int:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return 0 if limit == resource.RLIM_INFINITY else int(HEADROOM * limit)

    def left(self) -> int | None:
        free = free_memory()
        return None if free is None else int((1 - HEADROOM) * free / self.ranks)

    def used(self) -> int:
        return _told("VmRSS")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that there is no memory left."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(s in str(error).lower() for s in SAYINGS):
            return True
        error = error.__cause__
    return False


def forget_frames(error: BaseException | None) -> None:
    """Let go of the frames that an error came through: they hold what was computed so far."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def in_words(size: int) -> str:
    """Bytes as MB, or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _told(name: str) -> int:
    """What Linux says of this process, in bytes; 0 elsewhere."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0
