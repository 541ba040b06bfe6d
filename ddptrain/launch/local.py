"""Starts the ranks of a run on this machine, again if they fail, and tells how they ended."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddptrain import parent
from ddptrain.checkpoint.progress import Progress
from ddptrain.config import Config
from ddptrain.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    TrainingError,
)
from ddptrain.launch.agent import DDPTRAIN, Asked, Failure, heard, start_ranks
from ddptrain.observe.loggers import read_json_lines
from ddptrain.resilience.crashes import LAUNCH, Crashes
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say, show_cursor

RESTARTS = 3
"""``launch.max_restarts`` of several ranks, if the config does not say."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two starts without progress, from the second such on; doubled each time."""

UNFINISHED = EXIT_FAILED, "ended unfinished"
BEFORE_A_STEP = EXIT_STOPPED, "stopped before a step was done; start it again to go on"
BETWEEN_STARTS = EXIT_STOPPED, "stopped between two starts; start it again to go on"


def count_ranks(config: Config) -> int:
    """``launch.nproc_per_node``, with ``auto`` taken as one rank per GPU, one without GPUs."""
    wanted = config.launch.nproc_per_node
    if wanted != "auto":
        return int(wanted)
    import torch

    return max(1, torch.cuda.device_count()) if config.train.device.name != "cpu" else 1


def launch_ranks(run: RunDirectory, config: Config, ranks: int) -> int:
    """Run ``ranks`` workers on the stored config to their end; return the exit code.

    After a failure they are started again, ``launch.max_restarts`` times without a finished step
    in between, after a pause that grows. The error of the rank that failed first is the last thing
    printed.
    """
    os.environ[LAUNCH] = uuid.uuid4().hex
    progress = Progress(run.memories()[0])
    wanted = config.launch.max_restarts
    allowed = left = RESTARTS if wanted is None else wanted
    first = before = progress.read()
    known = len(_starts(run))
    command = [*DDPTRAIN, "worker", str(run.path)]
    with heard() as signals:
        while True:
            try:
                failure = start_ranks(command, ranks, signals=signals)
            except Asked as asked:  # the ranks were told, and had time to heed it
                show_cursor()
                has_begun = _has_begun(run, known, progress)
                return _stopped(run, asked.signal, UNFINISHED if has_begun else BEFORE_A_STEP)
            if failure is None:
                return EXIT_COMPLETED
            show_cursor()
            code = print_failure(failure, f"its log: {_log_of(run, failure.rank)}")
            now = progress.read()
            left = allowed if now > before else left
            was_raised = now <= first and failure.exit_code > 0 and not failure.may_pass
            if code != EXIT_FAILED or left == 0:
                return code
            if _is_hopeless(run, was_raised):
                if failure.message is None:  # of that one, others know only that it has gone
                    print_failure(failure, f"its log: {_log_of(run, failure.rank)}")
                return code
            before, left = now, left - 1
            # Where a step was done, or noted, run.resume has been held against what there is.
            if now > first or len(_starts(run)) > known:
                command = [*DDPTRAIN, "worker", str(run.path), "--again"]
            more = f"at most {left} more times, unless steps are finished"
            say(f"starting the ranks again; {more}", sys.stderr)
            if _pause(allowed - left, signals):
                return _stopped(run, signals[0], BETWEEN_STARTS)


def try_ranks(arguments: list[str], ranks: int) -> int:
    """Run a command as so many ranks, which say themselves what is wrong; return the exit code."""
    try:
        failure = start_ranks([*DDPTRAIN, *arguments], ranks)
    except Asked as asked:
        raise TrainingError(f"{asked}: not tried to the end") from None
    if failure is None:
        return EXIT_COMPLETED
    if failure.message is not None:
        return failure.exit_code
    return print_failure(failure, "see what it printed")


def _pause(failures: int, signals: Sequence[signal.Signals]) -> bool:
    """After ``failures`` without progress, give what is in the way time; return if told to end."""
    seconds = min(FIRST_PAUSE * 2.0 ** min(failures - 2, 9), LONGEST_PAUSE) if failures > 1 else 0
    until = time.monotonic() + seconds
    while time.monotonic() < until and not signals:
        time.sleep(0.05)
    return bool(signals)


def _starts(run: RunDirectory) -> list[dict[str, Any]]:
    """What is on record of the run's starts; nothing while its disk is away."""
    try:
        return read_json_lines(run.attempts)
    except OSError:
        return []


def _has_begun(run: RunDirectory, known: int, progress: Progress) -> bool:
    """Whether the last start, if it is a later one than the ``known``, has finished a step."""
    return any(progress.read() > line["step"] for line in _starts(run)[known:][-1:])


def _log_of(run: RunDirectory, rank: int) -> Path:
    try:
        return next(run.logs.glob(f"rank-{rank}.*"), run.logs)
    except OSError:
        return run.logs


def _is_hopeless(run: RunDirectory, was_raised: bool) -> bool:
    """Whether to start again would give the same.

    A step fails again and again; or ``was_raised``: an error came before the first step was out.
    """
    crashes = Crashes(run.crashes)
    try:
        crashes.refuse_loop()
    except TrainingError as error:
        say(f"ddptrain: {error}", sys.stderr)
        return True
    known = crashes.of_launch()
    return was_raised and (not known or (known[-1].is_cause and known[-1].finished == 0))


def _stopped(run: RunDirectory, asked: signal.Signals, otherwise: tuple[int, str]) -> int:
    """The exit code of a launch that ``asked`` has ended, and if it has no result ``otherwise``."""
    status = run.outcome().get("status")
    code, how = {
        "completed": (EXIT_COMPLETED, "it was completed all the same"),
        "stopped": (EXIT_STOPPED, "stopped, with a checkpoint; start it again to go on"),
    }.get(str(status), otherwise)
    again = f"start it again with {run.argument}"
    how = how.partition(";")[0] if parent.sweep else how.replace("start it again", again)
    say(f"{asked.name}: {run.path}: {how}", sys.stderr)
    return code


def print_failure(failure: Failure, otherwise: str) -> int:
    """Print the failure, last; return the exit code that it stands for.

    ``otherwise`` is what to say of a rank that left no message.
    """
    code = failure.exit_code
    if failure.message is not None:
        say(failure.message, sys.stderr)
    else:
        say(f"rank {failure.rank}: {failure.how}, without a word; {otherwise}", sys.stderr)
    return code if code in (EXIT_REFUSED, EXIT_STOPPED) else EXIT_FAILED
