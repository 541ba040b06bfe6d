"""Turns a signal that asks a run to end into a stop between two steps, with a checkpoint."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ddptrain import parent, pulse
from ddptrain.errors import EXIT_FAILED, EXIT_STOPPED
from ddptrain.parent import SIGNALS
from ddptrain.place import Place
from ddptrain.resilience.failure import tell_agent

SIDE_SHARE = 0.3
"""The last part of the grace, in which a rank that could not stop saves from the side."""
LEAVING_SECONDS = 1.0
"""Before the end of the grace, in which to leave."""
AGENT_SECONDS = 25.0
"""A grace that is longer is no use under torch's agent, which kills ranks 30 s after it asked."""
ECHO_SECONDS = 0.5
"""A second Ctrl-C within so long is the first, handed on by the agent that got it as well."""
ORPHAN_SECONDS = 1.5
"""An orphan has so long to save its state in memory; by then it has ended in any case."""

Rescue = Callable[[float, float], str | None]
"""Saves until the first moment, and copies to the store until the second."""


def listen(place: Place) -> StopRequest:
    """Heed signals from the first moment on; the agent's end is one, too."""
    stop_request = StopRequest(place)
    stop_request.listen()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent.end_with_parent(signal.SIGTERM)
    return stop_request


class StopRequest:
    """Whether this rank was asked to stop, and by which signal.

    The kernel writes each signal's number to a pipe, which a thread reads: it hears of it also
    while the main thread waits in a collective, where no Python handler runs. The thread only
    takes note; the ranks agree on the step after which they stop (see ``Step.stop_is_agreed``).
    Whoever cannot, in a hung collective or a long evaluation, saves the state of the last finished
    step from the side when the grace runs out, and leaves.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.grace_seconds = 25.0
        self.signal = ""
        self.since = 0.0
        self.heard = threading.Event()
        self.rescue: Rescue | None = None
        self.has_begun = False
        self.parent = os.getppid()

    def listen(self) -> None:
        """Take note of signals from here on; only the main thread may call it."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in heeded():
            signal.signal(number, _nothing)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_unlisten)
        threading.Thread(target=self._hear, args=[reader], name="signals", daemon=True).start()

    def begin(self, rescue: Rescue) -> None:
        """From here on there is something to save, with ``rescue``."""
        self.rescue, self.has_begun = rescue, True

    @property
    def came(self) -> bool:
        return bool(self.signal)

    def _hear(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number in SIGNALS:
                    self._take_note(signal.Signals(number))

    def _take_note(self, number: signal.Signals) -> None:
        if os.getppid() != self.parent and parent.sweep is None:
            self._leave_orphaned()
        if self.came:
            if number == signal.SIGINT and time.monotonic() - self.since > ECHO_SECONDS:
                self._leave("interrupted again: leaves at once", EXIT_FAILED)
            return  # torchrun's agent sends one more to whoever is slower than another rank
        self.since = time.monotonic()
        self.signal = number.name
        self.heard.set()
        if not self.has_begun:
            # Not after a step: it may wait for a rank that has gone, and is told so by its agent.
            why = f"{self.signal}: leaves before its first step"
            tell_agent(f"{self.place.name}: {why}", is_cause=False)
            self._leave(why, EXIT_STOPPED)
        self._say(f"{self.signal}: stops after this step")
        threading.Thread(target=self._watch_the_clock, name="grace", daemon=True).start()

    def _watch_the_clock(self) -> None:
        """If the main thread does not stop in time, save in its stead."""
        grace = self.grace_seconds
        if "TORCHELASTIC_RUN_ID" in os.environ:
            grace = min(grace, AGENT_SECONDS)
        until = time.monotonic() + grace
        time.sleep(grace * (1 - SIDE_SHARE))
        within = f"within {grace:g} s of {self.signal} (resilience.grace_seconds)"
        faulthandler.dump_traceback_later(max(0.1, until - time.monotonic()), exit=True)
        place = self._save(until, until - LEAVING_SECONDS)
        while pulse.now.phase in (pulse.SAVING, pulse.TOGETHER) and (
            time.monotonic() < until - LEAVING_SECONDS
        ):
            time.sleep(0.1)  # the main thread, or that of another rank, is writing the checkpoint
        if place is not None:
            why = f"could not stop {within}; the last finished step is saved in {place}"
            self._leave(why, EXIT_STOPPED)
        self._leave(f"could not stop {within}; the checkpoint before stands", EXIT_FAILED)

    def _leave_orphaned(self) -> None:
        """The agent was killed: nobody will look after this rank, and another may take over."""
        faulthandler.dump_traceback_later(ORPHAN_SECONDS, exit=True)
        until = time.monotonic() + ORPHAN_SECONDS / 2
        place = self._save(until, until)
        saved = f"the last finished step is saved in {place}" if place else "nothing new to save"
        self._leave(f"the process that started this rank has gone; {saved}", EXIT_FAILED)

    def _save(self, until: float, copy_until: float) -> str | None:
        """Rescue, and have the log say so: for who has set a time at which to end in any case."""
        place = None
        with suppress(Exception):  # there is a line to say, and a process to end
            place = self.rescue(until, copy_until) if self.rescue is not None else None
        for handler in logging.getLogger("ddptrain").handlers:
            with suppress(Exception):
                handler.flush()
        return place

    def _leave(self, why: str, code: int) -> None:
        self._say(why)
        os._exit(code)

    def _say(self, what: str) -> None:
        """Without Python's buffers, which another thread may hold."""
        with suppress(OSError):
            os.write(2, f"{self.place.name}: {what}\n".encode())


def heeded() -> list[signal.Signals]:
    """The signals that ask this process to stop: SIGHUP does not under ``nohup``."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not is_nohup]


def _nothing(*_: object) -> None:
    """A handler of Python's own has to be there, or the number is not written."""


def _unlisten() -> None:
    """A child must not tell its parent of signals that only the child got."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _nothing:
            signal.signal(number, signal.SIG_DFL)
