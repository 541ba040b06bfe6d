"""A trial of a sweep: a whole run in processes of its own, which leaves its outcome there."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddptrain.claim import outwait
from ddptrain.compose import compose
from ddptrain.config import EXECUTION_ONLY
from ddptrain.errors import EXIT_STOPPED, Refused, TrainingError
from ddptrain.files import replace_text
from ddptrain.launch.agent import DDPTRAIN, POLL_SECONDS, heard
from ddptrain.observe.loggers import read_json_lines
from ddptrain.overrides import override
from ddptrain.parent import OF_SWEEP
from ddptrain.processes import is_gone
from ddptrain.run_directory import RunDirectory

FOLDER = "hydra.sweep.dir"
SWEEP = "DDPTRAIN_SWEEP"
"""The variable that has the process of the sweep, and when it was born."""
LOOK_SECONDS = 0.5
"""Between two looks at what a trial has evaluated."""
Judge = Callable[[int, float], bool]
"""Is told the metric after so many steps; whether to give up the trial."""


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: ``completed``, ``failed`` (and why) or ``pruned``.

    ``told`` is what sets it apart from the sweep's others. ``value`` is ``checkpoint.metric``; None
    if the run has no such metric, or not yet.
    """

    number: int
    told: str
    overrides: list[str]
    status: str
    value: float | None = None
    why: str = ""

    def leave(self, run_dir: Path) -> None:
        """Put it into the trial's directory."""
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(RunDirectory(run_dir).trial, json.dumps(asdict(self)))

    @staticmethod
    def read(run_dir: Path) -> Outcome | None:
        """What was left in a trial's directory; None if it has not ended."""
        try:
            return Outcome(**json.loads(RunDirectory(run_dir).trial.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def run_of(folder: Path, number: int) -> Path:
    """The directory of the run that is a sweep's trial of that number."""
    return folder / str(number)


def run_trial(
    folder: Path,
    number: int,
    overrides: list[str],
    fixed: set[str],
    needs_value: bool,
    judge: Judge | None = None,
) -> Outcome:
    """Train with these overrides; one that has ended well before is not run again.

    Those of ``fixed`` keys are alike in all trials.
    Raises ``Refused`` if it is another sweep's, ``KeyboardInterrupt`` if it was stopped.
    """
    run_dir = run_of(folder, number)
    before = Outcome.read(run_dir)
    if before is not None and computing(before.overrides) != computing(overrides):
        told = f"{folder} holds another sweep, in which trial {number} was: {before.told}"
        raise Refused(f"{told}; name another {FOLDER}")
    told = apart(overrides, fixed)
    if before is not None and before.status != "failed":
        print(f"\ntrial {number}: {told}: {before.status} before", flush=True)
        return before
    print(f"\ntrial {number}: {told}", flush=True)
    status, value, why = _train(run_dir, told, overrides, judge)
    if status == "completed" and needs_value and (value is None or not math.isfinite(value)):
        what = "none of its metrics" if value is None else str(value)
        why = f"{told}: checkpoint.metric is {what}"
        status, value = "failed", None
    outcome = Outcome(number, told, overrides, status, value, why)
    outcome.leave(run_dir)
    return outcome


def computing(overrides: list[str]) -> list[str]:
    """Those that say what is computed and compared; the others may change when a sweep goes on."""
    compared = ("checkpoint.metric", "checkpoint.mode")
    keys = [line.lstrip("+~") for line in overrides]
    return [key for key in keys if key.startswith(compared) or not key.startswith(EXECUTION_ONLY)]


def apart(overrides: list[str], fixed: set[str]) -> str:
    """What sets a trial apart from the others, which have values of ``fixed`` keys in common."""
    plain = [line.lstrip("+") for line in overrides]
    return " ".join(line for line in plain if line.partition("=")[0] not in fixed)


def _train(
    run_dir: Path, told: str, overrides: list[str], judge: Judge | None
) -> tuple[str, float | None, str]:
    """Run it; its status, its metric and, if it failed, why."""
    where = override("run.dir", run_dir)
    try:
        metric = compose([*overrides, where]).checkpoint.metric
    except TrainingError as error:
        return "failed", None, f"{told}: {error}"
    run = RunDirectory(run_dir)
    outwait(run_dir)  # if a sweep was killed, what it was at saves, or is on a node that was lost
    with heard() as came:
        command = [*DDPTRAIN, "train", *overrides, where]
        variables = os.environ | {OF_SWEEP: str(os.getpid())}
        process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE)
        last = LastLine(process)
        asked: signal.Signals | None = None
        is_pruned, look = False, 0.0
        try:
            while process.poll() is None:
                if asked is None and _is_orphaned():
                    came.append(signal.SIGTERM)
                while came:
                    asked = came.popleft()
                    process.send_signal(asked)
                if judge is not None and not is_pruned and time.monotonic() > look:
                    look = time.monotonic() + LOOK_SECONDS
                    if is_pruned := _is_given_up(run, metric, judge):
                        print(f"given up: {told}", flush=True)
                        process.send_signal(signal.SIGTERM)
                time.sleep(POLL_SECONDS)
        finally:
            process.terminate()  # it must not train on beside the next trial
            process.wait()
            reason = last.of_process()
        asked = asked or next(iter(came), None)  # it came as the run ended, perhaps of it, too
    if process.returncode == EXIT_STOPPED and is_pruned and asked is None:
        return "pruned", None, ""
    if asked is not None or process.returncode == EXIT_STOPPED:
        _stop(asked)
    if process.returncode:
        return "failed", None, f"{told} exited {process.returncode}: {reason or f'see {run.logs}'}"
    metrics = run.outcome()["metrics"]
    value = metrics.get(metric, None)
    if value is None and metric in metrics:
        value = math.nan
    return "completed", value, ""


class LastLine:
    """Hands on what a process says of errors, the last line of which is the first error."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.end = b""
        self.thread = threading.Thread(target=self._hand_on, args=[process.stderr], daemon=True)
        self.thread.start()

    def of_process(self) -> str:
        """Once it has ended; what it has left behind may have the pipe open still."""
        self.thread.join(LOOK_SECONDS)
        lines = [line for line in self.end.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip().removeprefix("ddptrain: ") if lines else ""

    def _hand_on(self, stream: Any) -> None:
        with suppress(OSError, ValueError):
            while some := os.read(stream.fileno(), 1 << 16):
                self.end = (self.end + some)[-(1 << 12) :]
                with suppress(OSError):
                    os.write(2, some)


def _stop(asked: signal.Signals | None) -> None:
    """End what runs the trial as it was asked to: submitit starts a job again on its signal."""
    handler = None if asked is None else signal.getsignal(asked)
    if asked is not None and callable(handler) and handler is not signal.default_int_handler:
        signal.raise_signal(asked)
    raise KeyboardInterrupt


def _is_orphaned() -> bool:
    """Whether this is a job on the sweep's own machine, and the sweep has gone."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "local":
        return False
    pid, _, birth = os.environ[SWEEP].partition(" ")
    return is_gone(int(pid), birth)


def _is_given_up(run: RunDirectory, metric: str, judge: Judge) -> bool:
    split, _, name = metric.partition("/")
    for line in read_json_lines(run.metrics):
        value = line.get(name) if line.get("split") == split else None
        if value is not None and judge(line["step"], float(value)):
            return True
    return False
