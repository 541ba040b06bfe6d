"""A sweep's trials as jobs of submitit, which end with the sweep; one that is lost has failed."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from hydra.core.utils import JobReturn, JobStatus
from submitit.core.core import Job
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
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
    """Those that a sweep has started; ``lost`` tells of the ones that left no result."""

    started: list[Job[Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    known: dict[str, str] | None = None
    looked: float = -math.inf

    def follow(self, jobs: list[Job[Any]]) -> list[Job[Any]]:
        """Have these wait for their results without being brought down by one that has none."""
        for job in jobs:
            job.results = partial(self._results, job, job.results)  # type: ignore[method-assign]
        self.started += jobs
        self.looked = -math.inf  # what was known before is not of these
        return jobs

    def end(self) -> None:
        """Have all save and leave, and wait until they have."""
        left = [job for job in self.started if not _has_result(job) and not self._is_over(job)]
        for job in left:
            job.cancel(check=False)
        until = time.monotonic() + END_SECONDS
        while left and time.monotonic() < until:
            time.sleep(0.2)
            left = [job for job in left if not self._is_over(job)]

    def _results(self, job: Job[Any], results: Any) -> list[Any]:
        looks, looked = 0, self.looked
        while not _has_result(job) and looks < 2:
            time.sleep(0.2)
            is_over = self._is_over(job)
            if self.looked > looked or not isinstance(job, SlurmJob):
                looks, looked = looks + 1 if is_over else 0, self.looked
        why = f"its job {job.job_id} ended without a result ({self._state(job)})"
        if _has_result(job):
            try:
                return list(results())
            except (UncompletedJobError, FailedJobError) as error:
                lines = [line for line in str(error).splitlines() if line.strip(" -")]
                why = next((line for line in reversed(lines) if _is_told(line)), lines[0])
        self.lost.append(f"trial {job.submission().args[2]}: {why}; see {job.paths.stdout}")
        say(f"\n{self.lost[-1]}")
        return [JobReturn(_return_value=math.nan, status=JobStatus.COMPLETED)]

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
    job.paths.folder.stat()
    return job.paths.result_pickle.exists()


def _is_told(line: str) -> bool:
    return not line.startswith((" ", "You can check", "or at paths"))


@contextmanager
def followed() -> Iterator[Jobs]:
    """Follow what submitit's launchers start meanwhile. Raises ``Refused`` if they cannot."""
    jobs = Jobs()
    plain = submitit.AutoExecutor

    class Executor(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            try:
                super().__init__(*arguments, **settings)
            except RuntimeError as error:
                raise Refused(f"hydra/launcher: {error}") from None

        def map_array(self, *arguments: Any, **settings: Any) -> list[Job[Any]]:
            try:
                return jobs.follow(super().map_array(*arguments, **settings))
            except (FailedSubmissionError, FailedJobError) as error:  # the second is of sbatch
                raise Refused(f"hydra/launcher: {' '.join(str(error).split())}") from None

    setattr(submitit, plain.__name__, Executor)
    try:
        yield jobs
    finally:
        setattr(submitit, plain.__name__, plain)
