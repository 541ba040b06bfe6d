"""Starts a run, injects faults, and starts it again until it is completed, as Slurm's requeue does.

It knows nothing of the framework but its command line and its exit codes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from chaos.attribution import attribute
from chaos.events import Doom, Event, Fault, Moment
from chaos.processes import Process, command_of, is_alive, kill_all, of_story, send
from chaos.setting import Setting
from chaos.trace import Reader
from ddptrain.errors import EXIT_COMPLETED, EXIT_REFUSED, EXIT_STOPPED

POLL_SECONDS = 0.005
STALL_SECONDS = 120.0
"""A run that begins no step and starts no rank for so long hangs."""
STRAGGLER_SECONDS = 10.0
"""How long the agent of one node may outlive that of another."""


@dataclass
class Start:
    """One start of the command."""

    number: int
    agents: list[subprocess.Popen[bytes]]
    output: Path
    began: float
    code: int | None = None
    ended: float = 0.0


class StoryFailed(AssertionError):
    """The run did not end as it must; the message says what to do to see it again."""


@dataclass
class Operator:
    """One story: a setting, the faults to come, and what has happened so far."""

    setting: Setting
    faults: deque[tuple[Fault, Moment]]
    seed: int = 0
    events: list[Event] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    excused_until: float = 0.0
    repairs: list[Callable[[], None]] = field(default_factory=list)
    dooms: list[Doom] = field(default_factory=list)
    outlived: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.trace = Reader(self.setting.notes / "rank-0.trace")
        self.passed_at: float | None = None
        self.last_news = time.monotonic()

    def processes(self) -> list[Process]:
        return of_story(self.setting.mark)

    def agents(self) -> list[int]:
        return [a.pid for a in self.starts[-1].agents if a.returncode is None]

    def doom(self, pids: Iterable[int], seconds: float, once_idle: bool = False) -> None:
        """Demand that processes are gone in time; ``once_idle`` counts from the last step begun."""
        kind = self.faults[0][0].name
        self.dooms.append(Doom(kind, frozenset(pids), time.monotonic(), seconds, once_idle))

    def postpone(self, seconds: float) -> None:
        for doom in self.dooms:
            if doom.took is None and doom.once_idle:
                doom.since = time.monotonic() + seconds

    def run(self) -> None:
        """Tell the story to its end. Raises ``StoryFailed``."""
        try:
            while not self.starts or self.starts[-1].code != EXIT_COMPLETED:
                self.one_start()
        finally:
            over = self.starts[-1].ended or time.monotonic()
            attribute(self.events, self.trace.attempts, over)
            kill_all(self.setting.mark)

    def one_start(self) -> None:
        number = len(self.starts)
        while self.repairs:
            self.repairs.pop()()
        output = self.setting.folder / f"start-{number}.txt"
        self.last_news = began = time.monotonic()
        start = Start(number, self.setting.start(output), output, began)
        self.starts.append(start)
        self.passed_at = None
        while any([agent.poll() is None for agent in start.agents]):
            self.follow(start)
            if self.is_due():
                self.inject()
            time.sleep(POLL_SECONDS)
        start.ended = time.monotonic()
        start.code = _together([int(agent.returncode) for agent in start.agents])
        self.follow(start)
        self.judge(start)

    def follow(self, start: Start) -> None:
        """Read the trace; notice who has gone, and a run that hangs."""
        if self.trace.update():
            self.last_news = time.monotonic()
        for attempt in self.trace.attempts:
            if attempt.ended is None and not is_alive(attempt.pid):
                attempt.ended = time.monotonic()
        self.watch_the_doomed()
        if time.monotonic() - self.last_news > STALL_SECONDS:
            where = self.stacks(start)
            raise StoryFailed(f"nothing has happened for {STALL_SECONDS:g} s\n{where}")
        ended = [agent for agent in start.agents if agent.returncode is not None]
        if ended and len(ended) < len(start.agents):
            start.ended = start.ended or time.monotonic()
            if time.monotonic() - start.ended > STRAGGLER_SECONDS:
                kill_all(self.setting.mark)

    def watch_the_doomed(self) -> None:
        """Notice when those are gone that have to be, and whose time is over."""
        for doom in self.dooms:
            if doom.took is not None:
                continue
            took = max(0.0, time.monotonic() - doom.began(self.trace.last_begun))
            left = [pid for pid in doom.pids if is_alive(pid)]
            if left and took <= doom.seconds:
                continue
            doom.took = took
            what = f"{doom.kind}: after {doom.seconds:g} s there still is process"
            self.outlived += [f"{what} {pid}: {command_of(pid)}" for pid in left]

    def stacks(self, start: Start) -> str:
        """Where every thread of every rank is: SIGABRT makes Python say so."""
        send(signal.SIGABRT, [p for p in self.processes() if p.is_rank])
        until = time.monotonic() + 5
        while any(p.is_rank for p in self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        return start.output.read_text(errors="replace")[-8000:]

    def is_due(self) -> bool:
        if not self.faults:
            return False
        moment = self.faults[0][1]
        last = self.events[-1] if self.events else None
        if moment.by_clock:
            return time.monotonic() >= (last.at if last else self.starts[0].began) + moment.seconds
        if moment.steps is None:
            since = max(self.starts[-1].began, last.at if last else 0.0)
            return time.monotonic() >= since + moment.seconds
        target = min((last.frontier if last else -1) + moment.steps, self.setting.steps - 1)
        if self.passed_at is None and self.trace.frontier >= target:
            self.passed_at = time.monotonic()
        return self.passed_at is not None and time.monotonic() >= self.passed_at + moment.seconds

    def inject(self) -> None:
        fault, moment = self.faults[0]
        at, frontier = time.monotonic(), self.trace.frontier
        began = self.starts[-1].began
        begun = sum(len(a.begun) for a in self.trace.attempts if a.started > began)
        excused, self.excused_until = self.excused_until, 0.0
        is_done = fault.inject(self)
        lasts = max(0.0, self.excused_until - at)
        self.excused_until = max(excused, self.excused_until)
        if not is_done:
            return
        self.faults.popleft()
        self.passed_at = None
        self.last_news = time.monotonic()
        number = self.starts[-1].number
        told = fault.name, fault.stops, moment, number, at, frontier, begun, fault.spares
        self.events.append(Event(*told, lasts=lasts))

    def says_so(self) -> bool:
        """Whether the run itself says that it stopped, or was over when the signal came.

        torchrun exits with 1 whatever its ranks exit with, and dies of signals that it does not
        know, its ranks with it.
        """
        result = self.setting.run / "result.json"
        if self.setting.launcher != "torchrun":
            return False
        if self.starts[-1].code in (-signal.SIGUSR1, -signal.SIGUSR2):
            return True
        return result.exists() and bool(
            json.loads(result.read_text())["status"] in ("stopped", "completed")
        )

    def judge(self, start: Start) -> None:
        """Whether a start may end as this one did. Raises ``StoryFailed``."""
        mine = [event for event in self.events if event.start == start.number]
        tail = start.output.read_text(errors="replace")[-4000:]
        if start.code == EXIT_COMPLETED:
            return
        if start.code == EXIT_REFUSED:
            raise StoryFailed(f"start {start.number} was refused\n{tail}")
        if not mine and start.began > self.excused_until:
            raise StoryFailed(f"start {start.number} ended with {start.code}, undisturbed\n{tail}")
        alone = len(mine) == 1 and mine[0].stops and mine[0].begun_before > 1
        if alone and start.code != EXIT_STOPPED and not self.says_so():
            what = f"start {start.number} ended with {start.code} after {mine[0].kind}, not with 75"
            raise StoryFailed(f"{what}\n{tail}")


def _together(codes: Sequence[int]) -> int:
    """The exit code of a start on several nodes."""
    for telling in (EXIT_REFUSED, EXIT_STOPPED):
        if telling in codes:
            return telling
    return next((code for code in codes if code), EXIT_COMPLETED)
