"""A sweep's trials as jobs of submitit, which end with the sweep; one that is lost has failed."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.core import Job
from submitit.core.utils import UncompletedJobError
from submitit.local.local import LocalJob
from submitit.slurm.slurm import SlurmJob

from ddptrain.errors import Refused
from ddptrain.screen import say

LOOK_SECONDS = 10.0
"""Between two questions to Slurm. After two by which a job has gone, it leaves no result either."""
END_SECONDS = 60.0
"""So long jobs that are to end may take; Slurm gives them 30 s, if it is not told otherwise."""
FOLDER = ".submitit"
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "REVOKED", "TIMEOUT"}  # fmt: skip
"""States of Slurm in which a job is over, if it is not started again."""
TIMED_OUT = (
    "its job's time was up before it was done: give it more (hydra.launcher.timeout_min), or let "
    "it go on more often (hydra.launcher.max_num_timeout)"
)
Lost = Callable[[int, list[str], str], None]
"""Is told the number of a trial that left no result, its overrides, and why."""


def states() -> dict[str, str] | None:
    """This user's jobs, and what they are doing; None where Slurm does not say."""
    command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i %T"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(line.split(maxsplit=1) for line in told.splitlines() if line.strip())


def refuse_queued(folder: Path) -> None:
    """Raise ``Refused`` if jobs of a sweep outlived what started them: its trials would collide."""
    ids = {each.name for each in (folder / FOLDER).glob("*")}
    found = (states() or {}) if ids else {}
    if queued := sorted(ids & {job for job, state in found.items() if state not in ENDED}):
        jobs = " ".join(queued)
        raise Refused(
            f"{folder}: jobs of this sweep are still queued or running ({jobs}), and their trials "
            f"would be started twice; wait for them, or end them: scancel {jobs}"
        )


@dataclass
class Jobs:
    """Those that a sweep has started."""

    lost: Lost
    told: Callable[[int], str]
    """Of a trial that has ended, how."""
    silent: dict[int, Job[Any]] = field(default_factory=dict)
    started: list[Job[Any]] = field(default_factory=list)
    known: dict[str, str] | None = None
    looked: float = -math.inf

    def follow(self, jobs: list[Job[Any]]) -> list[Job[Any]]:
        """Have these wait for their results without being brought down by one that has none."""
        for job in jobs:
            job.results = partial(self._results, job, job.results)  # type: ignore[method-assign]
        self.started += jobs
        self.looked = -math.inf  # what was known before is not of these
        self.silent = {job.submission().args[2]: job for job in jobs}
        numbers = " ".join(job.job_id for job in jobs)
        say(f"jobs         {numbers}\noutput       {jobs[0].paths.folder.parent}/*/*_log.*")
        return jobs

    def end(self) -> None:
        """Have all save and leave, and wait until they have."""
        left = [job for job in self.started if not _has_result(job) and not self._is_over(job)]
        for job in left:
            if isinstance(job, LocalJob) and job._process is not None:
                job._process.terminate()  # which is handed on; its own way kills after a second
            else:
                job.cancel(check=False)
        until = time.monotonic() + END_SECONDS
        while left and time.monotonic() < until:
            time.sleep(0.2)
            left = [job for job in left if not self._is_over(job)]
        if left:
            say(f"still ending: jobs {' '.join(job.job_id for job in left)}", sys.stderr)

    def _results(self, job: Job[Any], results: Callable[[], list[Any]]) -> list[Any]:
        looks, looked = 0, self.looked
        while not _has_result(job) and looks < 2:
            time.sleep(0.2)
            self._tell_of_ended()
            is_over = self._is_over(job)
            if self.looked > looked or not isinstance(job, SlurmJob):
                looks, looked = looks + 1 if is_over else 0, self.looked
        why = f"its job {job.job_id} ended without a result ({self._state(job)})"
        if _has_result(job):
            self._tell_of_ended()
            try:
                (result,) = results()
                if not isinstance(result._return_value, UncompletedJobError):
                    return [result]
                why = TIMED_OUT
            except UncompletedJobError as error:
                lines = [line for line in str(error).splitlines() if line.strip(" -")]
                why = next((line for line in reversed(lines) if _is_told(line)), lines[0])
        chosen, _, number, *_ = job.submission().args
        self.lost(number, list(chosen), f"trial {number}: {why}; see {job.paths.stdout}")
        return [JobReturn(_return_value=math.nan, status=JobStatus.COMPLETED)]

    def _tell_of_ended(self) -> None:
        for number, job in list(self.silent.items()):
            if _has_result(job):
                del self.silent[number]
                if told := self.told(number):
                    say(told)

    def _is_over(self, job: Job[Any]) -> bool:
        if not isinstance(job, SlurmJob):
            return job.done()
        if time.monotonic() > self.looked + LOOK_SECONDS:
            self.known, self.looked = states(), time.monotonic()
        if self.known is None:
            return job.done()
        return self.known.get(job.job_id, "CANCELLED") in ENDED

    def _state(self, job: Job[Any]) -> str:
        if not isinstance(job, SlurmJob):
            return job.state
        return (self.known or {}).get(job.job_id, "no longer known to Slurm")


def _has_result(job: Job[Any]) -> bool:
    with suppress(OSError):
        os.listdir(job.paths.folder)  # some network file systems look again only then
    return job.paths.result_pickle.exists()


def _is_told(line: str) -> bool:
    return not line.startswith((" ", "You can check", "or at paths"))


@contextmanager
def followed(lost: Lost, told: Callable[[int], str]) -> Iterator[None]:
    """Follow what submitit's launchers start meanwhile, and end it. Raises ``Refused``."""
    jobs = Jobs(lost, told)
    plain = submitit.AutoExecutor

    class Executor(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            with _refusals():
                super().__init__(*arguments, **settings)

        def update_parameters(self, **settings: Any) -> None:
            with _refusals():
                super().update_parameters(**settings)

        def map_array(self, *arguments: Any, **settings: Any) -> list[Job[Any]]:
            with _refusals(), _without_interrupts():
                return jobs.follow(super().map_array(*arguments, **settings))

    setattr(submitit, plain.__name__, Executor)
    try:
        yield
    finally:
        setattr(submitit, plain.__name__, plain)
        jobs.end()


@contextmanager
def _refusals() -> Iterator[None]:
    """What submitit, and then sbatch, has against a launcher's settings."""
    try:
        yield
    except (NameError, RuntimeError, ValueError) as error:  # its own are RuntimeErrors
        raise Refused(f"hydra/launcher: {' '.join(str(error).split())}") from None


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Have what is started here left alone by Ctrl-C, which is for the sweep to hand on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
