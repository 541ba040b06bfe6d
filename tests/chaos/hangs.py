"""Faults in which nothing dies: a rank that is stopped, a data loader that waits forever."""

from __future__ import annotations

import time
from dataclasses import dataclass
from signal import SIGKILL, SIGSTOP

from chaos.events import Context, Fault
from chaos.faults import all_ranks, any_rank
from chaos.processes import send

SECONDS = 5
OVERRIDES = (f"resilience.hang_seconds={SECONDS}",)
LIMIT_SECONDS = SECONDS + 5.0
"""So long after its last step a job that hangs may still be there."""


@dataclass(frozen=True)
class Stop:
    """SIGSTOP of a rank."""

    name: str = "SIGSTOP of a rank"
    stops: bool = False
    spares: bool = True

    def inject(self, context: Context) -> bool:
        ranks, chosen = all_ranks(context), any_rank(context)
        if not chosen:
            return False
        send(SIGSTOP, chosen)
        context.doom((p.pid for p in ranks), LIMIT_SECONDS, once_idle=True)
        return True


@dataclass(frozen=True)
class StopInStart:
    """SIGKILL of a rank, and SIGSTOP of one of those that are started in its place."""

    name: str = "SIGSTOP of a rank that starts"
    seconds: float = 4.0
    """A start takes longer."""
    stops: bool = False
    spares: bool = True

    def inject(self, context: Context) -> bool:
        before = {p.pid for p in context.processes()}
        killed = any_rank(context)
        if not killed:
            return False
        send(SIGKILL, killed)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            if any(p.pid not in before for p in all_ranks(context)):
                time.sleep(context.random.uniform(0.0, self.seconds))
                self._stop_one(context, before)
                return True
            time.sleep(0.02)
        return True  # the run was over: nothing is started again

    def _stop_one(self, context: Context, before: set[int]) -> None:
        started = [p for p in all_ranks(context) if p.pid not in before]
        if started:
            send(SIGSTOP, [context.random.choice(started)])
            context.doom((p.pid for p in started), LIMIT_SECONDS, once_idle=True)


@dataclass(frozen=True)
class Sleep:
    """The next sample that is loaded is waited for forever; the one who waits is not told again."""

    name: str = "data loader that sleeps"
    stops: bool = False
    spares: bool = True

    def inject(self, context: Context) -> bool:
        (context.setting.notes / "sleep").touch()
        ranks = all_ranks(context)
        if any(a.begun for a in context.trace.attempts if a.pid in {p.pid for p in ranks}):
            context.doom((p.pid for p in ranks), LIMIT_SECONDS, once_idle=True)
        return True


AT_WORK: list[Fault] = [Stop(), Sleep()]
ALL: list[Fault] = [*AT_WORK, StopInStart()]
