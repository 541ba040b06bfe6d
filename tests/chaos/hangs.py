"""Faults in which nothing dies: a rank that is stopped, a data loader that waits forever."""

from __future__ import annotations

from dataclasses import dataclass
from signal import SIGSTOP

from chaos.faults import Signal, any_rank
from chaos.operator import Context, Fault

SECONDS = 5
OVERRIDES = (f"resilience.hang_seconds={SECONDS}",)


@dataclass(frozen=True)
class Sleep:
    """The next sample that is loaded is waited for forever; the one who waits is not told again."""

    name: str = "data loader that sleeps"
    stops: bool = False
    spares: bool = True

    def inject(self, context: Context) -> bool:
        (context.setting.notes / "sleep").touch()
        return True


ALL: list[Fault] = [Signal("SIGSTOP of a rank", SIGSTOP, any_rank), Sleep()]
