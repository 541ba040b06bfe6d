"""Faults in which nothing dies: a rank that is stopped, a data loader that waits forever."""

from __future__ import annotations

from dataclasses import dataclass, fields
from signal import SIGSTOP

from chaos.faults import Signal, any_rank
from chaos.operator import Context, Fault
from ddptrain.config import ResilienceConfig

WATCHED = any(field.name == "hang_seconds" for field in fields(ResilienceConfig))
"""Whether this version notices a hang."""
UNWATCHED = "resilience.hang_seconds: there is no such key, so nobody ends a hang"
OVERRIDES = ("resilience.hang_seconds=5",) if WATCHED else ()


@dataclass(frozen=True)
class Sleep:
    """The next sample that is loaded is waited for forever; the one who waits is not told again."""

    name: str = "data loader that sleeps"
    stops: bool = False

    def inject(self, context: Context) -> bool:
        (context.setting.notes / "sleep").touch()
        return True


ALL: list[Fault] = [Signal("SIGSTOP of a rank", SIGSTOP, any_rank), Sleep()]
HANGS: list[Fault] = ALL if WATCHED else []
