"""Sees that a job hangs, says which rank holds up the others and where, and ends it."""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from ddptrain import pulse
from ddptrain.parallel.roll_call import Process
from ddptrain.place import Place
from ddptrain.processes import is_gone, kill_if_stopped
from ddptrain.resilience.board import Board, Messenger
from ddptrain.resilience.flight import unfinished
from ddptrain.resilience.verdict import Sign, explain, hangs

POLL_SECONDS = 0.5
ASLEEP_SECONDS = 3.0
"""A thread that is late by so much was asleep with its process; so long it takes to hear anew."""
PARTING_SECONDS = 2.0
"""So long the last message of a rank may take."""
GONE_SECONDS = 3.0
"""So long a rank that waits for one that has ended may take to notice by itself."""
LAST_RESORT_SECONDS = 30.0
STACK_SECONDS = 2.0
"""So long a rank waits at most for what the others were doing."""

logger = logging.getLogger(__name__)


class Watchdog:
    """A thread per rank that tells the others what its rank does, and reads what they do.

    It costs a step nothing: the step says what it does in a variable (see ``pulse``), which the
    thread looks at twice a second. ``leave`` saves what can be saved and ends the process.
    """

    def __init__(
        self,
        place: Place,
        board: Board | None,
        processes: Sequence[Process],
        hang_seconds: float,
        leave: Callable[[str, bool], None],
    ) -> None:
        self.place = place
        self.woken = threading.Event()
        self.messenger = Messenger(board, place.rank, place.world_size, self.woken.set)
        self.hang_seconds = hang_seconds
        self.leave = leave
        self.ended = False
        self.is_leaving = False
        self.failed = False
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.gone_since: dict[int, float] = {}
        self.processes = processes
        self.space = processes[place.rank].space
        self.began = time.monotonic()
        self.awake_since = self.began - ASLEEP_SECONDS

    def start(self) -> None:
        """Begin to watch."""
        self.messenger.start()
        self.thread.start()

    def end(self, failed: bool = False) -> None:
        """Watch no more: the rank has finished, or is about to leave by itself.

        If it has ``failed``, the others may still wait for it, and are not told that they need not.
        After an alarm it does not come back: a collective that breaks because the stopped rank is
        killed at last says less than the report, which ends this process.
        """
        self.failed, self.ended = failed, True
        self.woken.set()
        if failed and self.is_leaving:
            self.thread.join(LAST_RESORT_SECONDS)

    def has_ended(self) -> bool:
        """Whether its threads are gone: Python must not end while one of them uses a store."""
        self.thread.join(PARTING_SECONDS)
        return not self.thread.is_alive() and self.messenger.has_ended(PARTING_SECONDS)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ends_within(POLL_SECONDS):
            now = time.monotonic()
            if now - looked > ASLEEP_SECONDS:
                self.awake_since = now  # this process was stopped, and knows nothing of that time
            looked = now
            if now - self.awake_since > ASLEEP_SECONDS:
                self._look()
        self.messenger.end(self._told(finished=not self.failed, failed=self.failed))

    def _ends_within(self, seconds: float) -> bool:
        self.woken.wait(seconds)  # or until there is an alarm
        self.woken.clear()
        return self.ended

    def _look(self) -> None:
        self.messenger.say(self._told())
        signs = self._signs()
        if self.messenger.alarm or hangs(signs, self.hang_seconds):
            self._raise_alarm()
        elif (gone := self._gone(signs)) is not None:
            mine = signs[self.place.rank]
            faulthandler.dump_traceback_later(LAST_RESORT_SECONDS, exit=True)
            self.leave(
                f"rank {gone} has gone, and this rank still waits for it in {mine.phase} of step "
                f"{mine.step}",
                False,
            )

    def _told(self, **more: Any) -> str:
        return json.dumps(asdict(replace(self._own_sign(), **more)))

    def _own_sign(self) -> Sign:
        beat = pulse.now
        idle = time.monotonic() - beat.since
        return self._named(Sign(self.place.rank, beat.phase, beat.step, idle))

    def _named(self, sign: Sign) -> Sign:
        process = self.processes[sign.rank]
        return replace(sign, host=process.host, pid=process.pid, born=process.born)

    def _signs(self) -> list[Sign]:
        """What is known of every rank, in order; this one knows best of itself."""
        now = time.monotonic()
        heard = dict(self.messenger.heard)
        signs = []
        for rank in range(self.place.world_size):
            if rank == self.place.rank:
                signs.append(self._own_sign())
            elif rank in heard:
                text, when = heard[rank]
                sign = Sign(**json.loads(text.partition(" ")[2]))
                signs.append(replace(sign, idle=sign.idle + now - when, silent=now - when))
            else:
                silent = now - self.began
                signs.append(self._named(Sign(rank, pulse.START_UP, -1, silent, silent)))
        return signs

    def _is_near(self, sign: Sign) -> bool:
        return self.processes[sign.rank].space == self.space

    def _gone(self, signs: list[Sign]) -> int | None:
        """A rank of this machine that has ended while this one waits and waits."""
        now = time.monotonic()
        for sign in signs:
            is_near = self._is_near(sign) and not sign.finished
            if not is_near or not is_gone(sign.pid, sign.born):
                self.gone_since.pop(sign.rank, None)
                continue
            since = self.gone_since.setdefault(sign.rank, now)
            idle = signs[self.place.rank].idle
            if now - since > GONE_SECONDS and idle > GONE_SECONDS:
                return sign.rank
        return None

    def _raise_alarm(self) -> None:
        """Report, end whoever is stopped, and leave; every rank that can does so."""
        self.is_leaving = True
        faulthandler.dump_traceback_later(LAST_RESORT_SECONDS, exit=True)
        stack = self._write_stacks()
        told = self._told(stack=stack)
        speaks = self.messenger.raise_alarm(told, self._all_have_told, STACK_SECONDS)
        known = [s if s.rank != self.place.rank else replace(s, stack=stack) for s in self._signs()]
        for sign in known:
            if self._is_near(sign):
                kill_if_stopped(sign.pid, sign.born)
        report = f"no progress for {self.hang_seconds:g} s (resilience.hang_seconds): "
        self.leave(report + explain(known) + unfinished(), speaks)

    def _all_have_told(self) -> bool:
        """Whether each rank that still answers has said what it was doing."""
        others = [sign for sign in self._signs() if sign.rank != self.place.rank]
        at_work = [sign for sign in others if sign.answers and not sign.finished]
        return all(sign.stack for sign in at_work)

    def _write_stacks(self) -> str:
        """Write every thread's Python stack to this rank's log; return the main thread's line."""
        beat = pulse.now
        seconds = time.monotonic() - beat.since
        where = beat.phase, beat.step, seconds, unfinished()
        logger.info("in %s of step %s for %.0f s%s", *where)
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        main = threading.main_thread().ident
        for ident in sorted(frames, key=lambda ident: ident != main):
            lines = "".join(traceback.format_stack(frames[ident]))
            logger.debug("thread %s:\n%s", names.get(ident, ident), lines)
        own = traceback.extract_stack(frames[main]) if main in frames else []
        return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else ""
