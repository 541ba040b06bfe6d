"""Starts the ranks of a run on this machine, again if they fail, and tells how they ended."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path

from ddptrain.checkpoint.progress import Progress
from ddptrain.config import Config
from ddptrain.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    TrainingError,
)
from ddptrain.launch.agent import DDPTRAIN, Asked, Failure, start_ranks
from ddptrain.observe.loggers import read_json_lines
from ddptrain.resilience.crashes import LAUNCH, Crashes
from ddptrain.run_directory import RunDirectory

RESTARTS = 3
"""``launch.max_restarts`` of several ranks, if the config does not say."""


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
    in between. The error of the rank that failed first is the last thing printed.
    """
    os.environ[LAUNCH] = uuid.uuid4().hex
    progress = Progress(run.memories()[0])
    wanted = config.launch.max_restarts
    allowed = left = RESTARTS if wanted is None else wanted
    first = before = progress.read()
    known = len(read_json_lines(run.attempts))
    command = [*DDPTRAIN, "worker", str(run.path)]
    while True:
        try:
            failure = start_ranks(command, ranks)
        except Asked as asked:  # the ranks were told, and had time to heed it
            begun = read_json_lines(run.attempts)[known:]
            has_begun = any(progress.read() > line["step"] for line in begun[-1:])
            return _stopped(run, asked.signal, has_begun)
        if failure is None:
            return EXIT_COMPLETED
        log = next(Path(run.logs).glob(f"rank-{failure.rank}.*"), run.logs)
        code = print_failure(failure, f"its log: {log}")
        now = progress.read()
        left = allowed if now > before else left
        was_raised = now <= first and failure.exit_code > 0
        if code != EXIT_FAILED or left == 0 or _is_hopeless(run, was_raised):
            return code
        before, left = now, left - 1
        # Where a step was done, or noted, run.resume has been held against what there is.
        if now > first or len(read_json_lines(run.attempts)) > known:
            command = [*DDPTRAIN, "worker", str(run.path), "--again"]
        print(f"starting the ranks again; {left} more times without progress", file=sys.stderr)


def _is_hopeless(run: RunDirectory, was_raised: bool) -> bool:
    """Whether to start again would give the same.

    A step fails again and again; or ``was_raised``: an error came before the first step was out.
    """
    crashes = Crashes(run.crashes)
    try:
        crashes.refuse_loop()
    except TrainingError as error:
        print(f"ddptrain: {error}", file=sys.stderr)
        return True
    known = crashes.of_launch()
    return was_raised and (not known or (known[-1].is_cause and known[-1].finished == 0))


def _stopped(run: RunDirectory, asked: signal.Signals, has_begun: bool) -> int:
    """The exit code of a launch that ``asked`` has ended; it ``has_begun`` once a step is done."""
    status = run.outcome().get("status")
    otherwise = (EXIT_FAILED, "ended unfinished")
    if not has_begun:
        otherwise = EXIT_STOPPED, "stopped before a step was done; start it again to go on"
    code, how = {
        "completed": (EXIT_COMPLETED, "it was completed all the same"),
        "stopped": (EXIT_STOPPED, "stopped, with a checkpoint; start it again to go on"),
    }.get(str(status), otherwise)
    print(f"{asked.name}: {run.path}: {how}", file=sys.stderr)
    return code


def print_failure(failure: Failure, otherwise: str) -> int:
    """Print the failure, last; return the exit code that it stands for.

    ``otherwise`` is what to say of a rank that left no message.
    """
    code = failure.exit_code
    if failure.message is not None:
        print(failure.message, file=sys.stderr)
    else:
        how = f"exited {code}" if code > 0 else f"was killed by {_name(-code)}"
        print(f"rank {failure.rank}: {how}, without a word; {otherwise}", file=sys.stderr)
    return code if code in (EXIT_REFUSED, EXIT_STOPPED) else EXIT_FAILED


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Python has no name for it
        return f"signal {number}"
