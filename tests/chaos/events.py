"""What happens in a story: kinds of faults, the moments they come at, and what each one did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from chaos.processes import Process
from chaos.setting import Setting
from chaos.trace import Reader


@dataclass(frozen=True)
class Moment:
    """When a fault comes: ``steps`` new steps after the last one and ``seconds`` more.

    With ``steps`` None, ``seconds`` after the last fault or start, whichever was later: that is
    how a fault hits a start, a restore, or what another fault has set off. ``by_clock``, after the
    last fault, whatever has happened since: that is how faults come to a machine.
    """

    steps: int | None
    seconds: float
    by_clock: bool = False


class Context(Protocol):
    """What a fault may use."""

    setting: Setting
    random: Random
    trace: Reader
    excused_until: float
    """Until then a start may fail that began while a fault lasts (monotonic seconds)."""
    repairs: list[Callable[[], None]]
    """What is to be done before the next start."""

    def processes(self) -> list[Process]: ...

    def agents(self) -> list[int]: ...

    def doom(self, pids: Iterable[int], seconds: float, once_idle: bool = False) -> None:
        """Demand that processes are gone in time; ``once_idle`` counts from the last step begun."""

    def postpone(self, seconds: float) -> None:
        """Let what hangs, and waits for a node that is lost now, begin to count so much later."""


class Fault(Protocol):
    """A kind of fault.

    ``stops`` tells one that asks a run to stop. ``spares`` tells one after which a replica lives
    and can be reached, so that no finished step may be lost.
    """

    @property
    def name(self) -> str: ...

    @property
    def stops(self) -> bool: ...

    @property
    def spares(self) -> bool: ...

    def inject(self, context: Context) -> bool:
        """Do it; False if there is nothing yet to do it to."""


@dataclass
class Event:
    """A fault that was injected."""

    kind: str
    stops: bool
    moment: Moment
    start: int
    at: float
    frontier: int
    begun_before: int
    """Steps that this start of rank 0 had begun."""
    spares: bool = False
    regained: float | None = None
    """Seconds until the run was further than it had been."""
    lost: int = 0
    """Finished steps that were done again on its account."""
    lasts: float = 0.0
    """Seconds until what is broken works again, whatever the run does meanwhile."""

    @property
    def over(self) -> float:
        """When it was made good."""
        regained = self.regained if self.regained is not None else float("inf")
        return self.at + max(regained, self.lasts)


@dataclass
class Doom:
    """Processes that have to be gone in time, and the fault on whose account."""

    kind: str
    pids: frozenset[int]
    since: float
    seconds: float
    once_idle: bool
    took: float | None = None
    """Seconds until they were gone, beyond the last step that was begun if ``once_idle``."""

    def began(self, last_step: float) -> float:
        """When the time that they have begins to run, if the last step was begun then."""
        return max(self.since, last_step) if self.once_idle else self.since
