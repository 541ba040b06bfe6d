"""Passes messages between watchdogs; a store that cannot be reached holds up none of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

POLL_SECONDS = 0.5
ALARMED_SECONDS = 0.2
"""So often once there is an alarm, for the others to hear before this rank leaves."""
ALARM = "alarm"
SPEAKERS = "speakers"

logger = logging.getLogger(__name__)


class Board(Protocol):
    """Where ranks leave messages: torch's store, through a connection of the watchdog's own."""

    def set(self, key: str, value: str) -> None: ...

    def add(self, key: str, amount: int) -> int: ...

    def check(self, keys: list[str]) -> bool: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class Messenger:
    """Exchanges messages with the other ranks' watchdogs, in a thread; with none if alone.

    What is read from it is what was heard last, and when; asking takes no time. ``alarmed`` is
    called when another rank has raised the alarm.
    """

    def __init__(
        self, board: Board | None, rank: int, world_size: int, alarmed: Callable[[], None]
    ) -> None:
        self.board = board
        self.rank = rank
        self.keys = [f"rank-{number}" for number in range(world_size)]
        self.own = ""
        self.number = 0
        self.heard: dict[int, tuple[str, float]] = {}
        self.alarm = False
        self.alarmed = alarmed
        self.raises_alarm = False
        self.may_speak: bool | None = None
        self.others_are_there = False
        self.hurry = threading.Event()
        self.changed = threading.Condition()
        self.ended = False
        self.thread = threading.Thread(target=self._work, name="messenger", daemon=True)

    def start(self) -> None:
        """Begin to exchange messages, if there is anybody to exchange them with."""
        if self.board is None:
            self.ended, self.may_speak = True, True
            return
        self.thread.start()

    def say(self, text: str) -> None:
        """Tell the others ``text``, from the next exchange on."""
        self.own = text

    def end(self, text: str) -> None:
        """Tell the others a last ``text``."""
        self.own, self.ended = text, True
        self.hurry.set()

    def has_ended(self, seconds: float) -> bool:
        """Whether the last message has left, within ``seconds`` from now."""
        if self.thread.is_alive():
            self.thread.join(seconds)
        return not self.thread.is_alive()

    def raise_alarm(self, text: str, heard_all: Callable[[], bool], seconds: float) -> bool:
        """Alarm the others, and wait until this rank has ``heard_all``, at most so long.

        Returns whether it is the one that speaks for all, as it is if nobody says otherwise.
        """
        self.own, self.raises_alarm = text, True
        self.hurry.set()
        with self.changed:
            self.changed.wait_for(lambda: self.may_speak is not None and heard_all(), seconds)
        return self.may_speak is not False

    def _work(self) -> None:
        ending = False
        while not ending:
            ending = self.ended
            try:
                self._exchange()
            except Exception as error:  # the store has gone with its agent, which ends us as well
                logger.debug("messenger: %s", error)
                time.sleep(POLL_SECONDS)
            with self.changed:
                self.changed.notify_all()
            if not ending:
                self.hurry.wait(ALARMED_SECONDS if self.alarm else POLL_SECONDS)
                self.hurry.clear()

    def _exchange(self) -> None:
        assert self.board is not None
        text, number = self.own, self.number + 1
        if text:
            self.board.set(self.keys[self.rank], f"{number} {text}")
        if self.raises_alarm and self.may_speak is None:
            self.board.set(ALARM, "1")
            self.may_speak = self.board.add(SPEAKERS, 1) == 1
        is_alarm = self.board.check([ALARM])
        self.others_are_there = self.others_are_there or self.board.check(self.keys)
        texts = self.board.multi_get(self.keys) if self.others_are_there else []
        now = time.monotonic()
        for rank, told in enumerate(texts):
            if rank not in self.heard or self.heard[rank][0] != told.decode():
                self.heard[rank] = told.decode(), now
        self.number = number
        if is_alarm and not self.alarm:
            self.alarm = True
            self.alarmed()
