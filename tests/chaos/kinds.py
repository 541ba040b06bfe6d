"""All kinds of faults that come at random moments of one run, by name."""

from __future__ import annotations

from collections.abc import Sequence
from errno import EACCES, EIO, EROFS

from chaos import machine, network
from chaos.damage import DAMAGE
from chaos.events import Fault
from chaos.faults import KILLS, LOADING, STOPS
from chaos.hangs import ALL as HANGS

KINDS: list[Fault] = [*KILLS, *STOPS, *DAMAGE, *LOADING, *HANGS]
if machine.disk_unavailable() is None:
    KINDS += [machine.Full(seconds=6.0), machine.FullMemory(seconds=6.0)]
if machine.preload_unavailable() is None:
    KINDS += [machine.Jump(3600), machine.Jump(-3600)]
    KINDS += [machine.Broken(4.0, error) for error in (EIO, EROFS, EACCES)]
if machine.memory_unavailable() is None:
    KINDS += [machine.OutOfMemory()]
ON_TWO_NODES: list[Fault] = []
if network.unavailable() is None:
    ON_TWO_NODES += [*KILLS[:2], KILLS[3], *HANGS, network.Cut(5.0), network.Cut(None)]


def left_out() -> list[str]:
    """Why some kinds cannot be had on this machine."""
    reasons = [
        machine.disk_unavailable(),
        machine.preload_unavailable(),
        machine.memory_unavailable(),
        network.unavailable(),
    ]
    return [reason for reason in reasons if reason is not None]


def named(*parts: str) -> list[Fault]:
    """The kinds whose name contains one of ``parts``; all without any. Raises ``ValueError``."""
    found = [k for k in KINDS if not parts or any(part in k.name for part in parts)]
    if not found:
        names = "; ".join(kind.name for kind in KINDS)
        raise ValueError(f"no kind of fault is named like {', '.join(parts)}; there are: {names}")
    return found


def needs_workers(kinds: Sequence[Fault]) -> bool:
    return any(kind in LOADING for kind in kinds)
