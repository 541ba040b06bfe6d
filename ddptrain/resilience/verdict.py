"""Whether a job hangs, and which rank holds up the others, from what the ranks say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ddptrain.pulse import COMPILING, COMPUTING, REDUCING, SAVING, START_UP, TOGETHER

SILENT_SECONDS = 3.0
"""A rank that has not spoken for so long is taken to be stopped, or cut off."""
WAITING = (REDUCING, TOGETHER)
"""What a rank does while it waits for others."""
PATIENT = (START_UP, COMPILING, SAVING, COMPUTING)
"""Phases that may take ``PATIENCE`` times as long, with nothing to see from outside."""
PATIENCE = 12


@dataclass(frozen=True)
class Sign:
    """What is known of a rank: what it does, for how long, and for how long it has been silent.

    ``host``, ``pid`` and ``born`` (the kernel's start time) name its process; ``stack`` is the
    innermost line of its main thread, where that is known. A rank that ``failed`` is about to
    leave, and those that wait for it wait in vain.
    """

    rank: int
    phase: str
    step: int
    idle: float
    silent: float = 0.0
    host: str = ""
    pid: int = 0
    born: str = ""
    finished: bool = False
    failed: bool = False
    stack: str = ""

    @property
    def answers(self) -> bool:
        return self.silent <= SILENT_SECONDS


def hangs(signs: Iterable[Sign], seconds: float) -> bool:
    """Whether no rank has made any progress for ``seconds``, or one has not answered for so long.

    A rank that waits for a slow one raises no alarm while that one gets on. One that does not
    answer makes no progress, whatever the others may still have to do before they wait for it.
    """
    unfinished = [sign for sign in signs if not sign.finished and not sign.failed]
    if any(sign.silent > seconds for sign in unfinished):
        return True
    at_work = [sign for sign in unfinished if sign.answers]
    if any(sign.phase in PATIENT for sign in at_work):
        seconds *= PATIENCE
    return min((sign.idle for sign in at_work), default=0.0) > seconds


def explain(signs: Sequence[Sign]) -> str:
    """Which rank holds up the others, and where, in plain words."""
    at_work = [sign for sign in signs if not sign.finished]
    culprits = [sign for sign in at_work if sign.failed or not sign.answers]
    culprits = culprits or [sign for sign in at_work if sign.phase not in WAITING]
    if not culprits:
        step = max(sign.step for sign in at_work)
        places = _joined(sorted({_doing(sign) for sign in at_work}))
        return (
            f"{_ranks([s.rank for s in at_work])} {_be(at_work)} {places}, and none gets on since "
            f"{min(s.idle for s in at_work):.0f} s (step {step}): the network between them is "
            "broken, or they called collectives in a different order"
        )
    told = "; ".join(map(_told, culprits))
    waiting = [sign for sign in at_work if sign not in culprits]
    if waiting:
        places = _joined(sorted({_doing(sign) for sign in waiting}))
        verb = "waits" if len(waiting) == 1 else "wait"
        those = "it" if len(culprits) == 1 else "them"
        told += f"; {_ranks([s.rank for s in waiting])} {verb} for {those} in {places}"
    return told


def _told(sign: Sign) -> str:
    if sign.failed:
        return f"rank {sign.rank} failed in {_doing(sign)}, see its log"
    if not sign.answers:
        return (
            f"rank {sign.rank} (process {sign.pid} on {sign.host}) has not answered for "
            f"{sign.silent:.0f} s, stopped or cut off; it was last in {_doing(sign)}"
        )
    where = f" ({sign.stack})" if sign.stack else ""
    return f"rank {sign.rank} has been in {_doing(sign)} for {sign.idle:.0f} s{where}"


def _doing(sign: Sign) -> str:
    return f"{sign.phase} of step {sign.step}" if sign.step >= 0 else sign.phase


def _be(signs: Sequence[Sign]) -> str:
    return "is in" if len(signs) == 1 else "are in"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0–2``, ``ranks 0, 2 and 5``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}–{ranks[-1]}"
    return f"ranks {_joined([str(rank) for rank in ranks])}"
