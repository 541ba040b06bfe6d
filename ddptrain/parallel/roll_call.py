"""Which processes are in this attempt: its ranks meet at the store before they form a group.

The launcher's store outlives its ranks, and what the dead have left there looks like what the
living say. A count of restarts does not tell them apart: an agent that starts its ranks again
because another node's have failed does not count that. So every process has a name of its own.
Rank 0 calls the roll, each process answers to exactly the roll that its name is on, and only the
living do. As it begins when all have answered, it cannot begin with a process that has gone.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Protocol
from uuid import uuid4

from ddptrain.errors import PeerFailed
from ddptrain.processes import born, space

FIRST_PAUSE, LONGEST_PAUSE = 0.002, 0.05
ROLL = "roll"
BEGUN = "begun"
AFTER_RANK_0 = 2.0
"""So much longer than rank 0 the others wait, for it knows who is missing."""


class Board(Protocol):
    """Where ranks leave words for each other: torch's store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Process:
    """One rank's process; ``born`` is the kernel's start time, so that it is told for good.

    ``space`` says where ``pid`` counts: containers may share the name of their host.
    """

    host: str = field(default_factory=socket.gethostname)
    space: str = field(default_factory=space)
    pid: int = field(default_factory=os.getpid)
    born: str = field(default_factory=lambda: born(os.getpid()))
    name: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class Attempt:
    """The processes of all ranks, by rank, and a name for what they do together."""

    processes: tuple[Process, ...]
    name: str

    @staticmethod
    def of(roll: str) -> Attempt:
        processes = tuple(Process(**json.loads(one)) for one in json.loads(roll))
        return Attempt(processes, sha256(roll.encode()).hexdigest()[:16])


def meet(board: Board, rank: int, world_size: int, seconds: float | None) -> Attempt:
    """Return once all ranks are there. Raises ``TrainingError`` if not after ``seconds``."""
    own = json.dumps(asdict(Process()))
    board.set(f"here-{rank}", own)
    if rank == 0:
        return Attempt.of(_call(board, world_size, seconds))
    return Attempt.of(
        _answer(board, rank, own, None if seconds is None else seconds + AFTER_RANK_0)
    )


def _call(board: Board, world_size: int, seconds: float | None) -> str:
    ranks = range(world_size)
    here, yes = [f"here-{rank}" for rank in ranks], [f"yes-{rank}" for rank in ranks]
    told = ""

    def turn() -> str | None:
        nonlocal told
        if not board.check(here):
            return None
        roll = json.dumps([one.decode() for one in board.multi_get(here)])
        if roll != told:
            told = roll
            board.set(ROLL, roll)
            board.set(yes[0], roll)
        if board.check(yes) and all(one.decode() == roll for one in board.multi_get(yes)):
            board.set(BEGUN, roll)
            return roll
        return None

    begun = _repeat(turn, seconds)
    if begun is not None:
        return begun
    missing = [
        rank
        for rank in ranks[1:]
        if not (told and board.check([yes[rank]]) and board.get(yes[rank]).decode() == told)
    ]
    raise PeerFailed(
        f"of {world_size} ranks {', '.join(map(str, missing))} did not come within {seconds:g} s; "
        "see what holds that machine up, or give it more time (resilience.hang_seconds)"
    )


def _answer(board: Board, rank: int, own: str, seconds: float | None) -> str:
    said = ""

    def names_me(roll: str) -> bool:
        names: list[str] = json.loads(roll)
        return rank < len(names) and names[rank] == own

    def turn() -> str | None:
        nonlocal said
        if not board.check([ROLL]) or not names_me(roll := board.get(ROLL).decode()):
            return None
        if roll != said:
            said = roll
            board.set(f"yes-{rank}", roll)
        if board.check([BEGUN]) and names_me(begun := board.get(BEGUN).decode()):
            return begun
        return None

    begun = _repeat(turn, seconds)
    if begun is None:
        raise PeerFailed(f"rank 0 did not begin within {seconds:g} s; see its log")
    return begun


def _repeat(turn: Callable[[], str | None], seconds: float | None) -> str | None:
    """What ``turn`` returns in the end, None if nothing within ``seconds``."""
    until = None if seconds is None else time.monotonic() + seconds
    pause = FIRST_PAUSE
    while (result := turn()) is None:
        if until is not None and time.monotonic() > until:
            return None
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
    return result
