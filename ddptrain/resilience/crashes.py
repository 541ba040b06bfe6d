"""What made a run fail, on record; a step that fails again and again ends its restarts."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from ddptrain.errors import TrainingError
from ddptrain.processes import born

TIMES = 3
"""How often the same step may fail before nobody starts the run again by itself."""
LAUNCH = "DDPTRAIN_LAUNCH"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Crash:
    """How one rank ended. ``is_cause`` is False for a rank that only lost another one.

    ``is_final`` says that a new start would come to the same end: the config decides it.
    """

    launch: str
    start: str
    rank: int
    step: int
    finished: int
    is_cause: bool
    error: str
    time: float
    is_final: bool = False


def launch() -> str:
    """What stays the same over the restarts that nobody asks for by hand, and over no others.

    Over Slurm's requeues as well, where the job's number is torchrun's ``--rdzv-id``.
    """
    if LAUNCH in os.environ:
        return os.environ[LAUNCH]
    agent = os.environ.get("TORCHELASTIC_RUN_ID")
    if agent is None:
        return uuid4().hex  # no agent: whoever starts it again is a person
    parent = os.getppid()
    return agent if agent != "none" else f"{socket.gethostname()} {parent} {born(parent)}"


class Crashes:
    """The crashes of a run, a line each, in the order of their starts."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.launch = launch()

    def add(
        self,
        start: str,
        rank: int,
        step: int,
        finished: int,
        is_cause: bool,
        error: str,
        is_final: bool = False,
    ) -> None:
        """Note that ``rank`` failed in ``step``, after ``finished`` steps of this start."""
        now = time.time()
        crash = Crash(self.launch, start, rank, step, finished, is_cause, error, now, is_final)
        with self.file.open("a") as stream:
            stream.write(json.dumps(asdict(crash)) + "\n")

    def of_launch(self) -> list[Crash]:
        """One crash for each start of this launch that had any: the cause, if a rank knew it."""
        first: dict[str, Crash] = {}
        try:
            lines = self.file.read_text(errors="replace").splitlines()
        except OSError:  # none yet, or its disk is away
            return []
        for line in lines:
            try:
                crash = Crash(**json.loads(line))
            except (ValueError, TypeError):
                continue  # cut short by a crash
            known = first.get(crash.start)
            if crash.launch == self.launch and (
                known is None or (crash.is_cause and not known.is_cause)
            ):
                first[crash.start] = crash
        return list(first.values())

    def refuse_loop(self) -> None:
        """Raise ``TrainingError`` if the last ``TIMES`` starts of this launch failed alike.

        Or if the last one failed for good.
        """
        last = self.of_launch()[-TIMES:]
        if last and last[-1].is_final:
            raise TrainingError(
                f"it would fail again, so this run is not started again by itself: {last[-1].error}"
            )
        if len(last) < TIMES or len({crash.step for crash in last}) > 1:
            return
        told = next((crash for crash in reversed(last) if crash.is_cause), last[-1])
        raise TrainingError(
            f"step {told.step} has failed {TIMES} times in a row, so this run is not started "
            f"again by itself: {told.error}"
        )
