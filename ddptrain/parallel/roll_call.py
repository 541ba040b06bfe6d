"""Which processes are in this attempt: its ranks meet at the store before they form a group.

The launcher's store outlives its ranks, and what the dead have left there looks like what the
living say. A count of restarts does not tell them apart: an agent that starts its ranks again
because another node's have failed does not count that. So every process has a name of its own.
Rank 0 calls the roll of who is there, each process answers to exactly the roll that its name is on,
and only the living do. As it begins when all are on it and have answered, it cannot begin with a
process that has gone; and if it cannot begin, rank 0 knows who is missing, and tells.
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
GIVEN_UP = "given up"
AFTER_RANK_0 = 2.0
"""So much longer than rank 0 the others wait, for it knows who is missing; and so long rank 0, in
whose process the store may be, stays for those to whom it has told that."""


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


def exchange(
    board: Board, rank: int, world_size: int, mine: str, seconds: float | None = None
) -> list[str]:
    """What each rank of an attempt has to say, in rank order; what many say is sent once.

    The ``board`` is of these ranks and for this once. Raises ``PeerFailed`` if one has said nothing
    after ``seconds``: before, it may import the user's modules from a slow disk.
    """
    digests = [f"digest-{other}" for other in range(world_size)]
    own = sha256(mine.encode()).hexdigest()
    board.set(f"said-{rank}", mine)
    board.set(digests[rank], own)
    told = {own: mine}
    if _repeat(lambda: own if board.check(digests) else None, seconds) is None:
        silent = [str(other) for other, key in enumerate(digests) if not board.check([key])]
        raise PeerFailed(
            f"of {world_size} ranks {', '.join(silent)} came, and said nothing within {seconds:g} "
            "s; see what holds that machine up, or give it more time (launch.timeout)"
        )
    order = [digest.decode() for digest in board.multi_get(digests)]
    for other, digest in enumerate(order):
        if digest not in told:
            told[digest] = board.get(f"said-{other}").decode()
    board.set(f"read-{rank}", "1")
    if rank == 0:  # the store may end with it
        board.multi_get([f"read-{other}" for other in range(world_size)])
    return [told[digest] for digest in order]


def _call(board: Board, world_size: int, seconds: float | None) -> str:
    ranks = range(world_size)
    here, yes = [f"here-{rank}" for rank in ranks], [f"yes-{rank}" for rank in ranks]
    told = ""

    def turn() -> str | None:
        nonlocal told
        come: list[str | None]
        if board.check(here):
            come = [one.decode() for one in board.multi_get(here)]
        else:
            come = [board.get(key).decode() if board.check([key]) else None for key in here]
        roll = json.dumps(come)
        if roll != told:
            told = roll
            board.set(ROLL, roll)
            board.set(yes[0], roll)
        if None in come or not board.check(yes):
            return None
        if all(one.decode() == roll for one in board.multi_get(yes)):
            board.set(BEGUN, roll)
            return roll
        return None

    begun = _repeat(turn, seconds)
    if begun is not None:
        return begun
    present = [rank for rank in ranks[1:] if _has_answered(board, yes[rank], told, rank)]
    missing = [str(rank) for rank in ranks[1:] if rank not in present]
    why = (
        f"of {world_size} ranks {', '.join(missing)} did not come within {seconds:g} s; see what "
        "holds that machine up, or give it more time (launch.timeout)"
    )
    board.set(GIVEN_UP, json.dumps([told, why]))
    heard = [f"heard-{rank}" for rank in present]
    _repeat(lambda: "all" if not heard or board.check(heard) else None, AFTER_RANK_0)
    raise PeerFailed(why)


def _has_answered(board: Board, key: str, told: str, rank: int) -> bool:
    """Whether the rank that is on the last roll has answered to one of this call of the roll."""
    if not board.check([key]):
        return False
    answered, last = json.loads(board.get(key).decode()), json.loads(told)
    return (answered[0], answered[rank : rank + 1]) == (last[0], [last[rank]])


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
        if board.check([GIVEN_UP]):
            last, why = json.loads(board.get(GIVEN_UP).decode())
            if names_me(last):
                board.set(f"heard-{rank}", "1")
                raise PeerFailed(why)
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
