"""Every way a run can end badly, each with its exit code and one line for the user."""

from __future__ import annotations

EXIT_COMPLETED = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75


class TrainingError(Exception):
    """A failure whose message is complete: what, where, what was expected, what to do."""

    exit_code = EXIT_FAILED


class Stopped(TrainingError):
    """The run was asked to stop, and did, with a checkpoint; started again it goes on."""

    exit_code = EXIT_STOPPED


class Superseded(TrainingError):
    """Another job has taken over the run's directory while this one was cut off."""


class Refused(TrainingError):
    """The config or the environment cannot work; nothing was started."""

    exit_code = EXIT_REFUSED


class Disagreement(Refused):
    """Ranks that have to be alike are not: each of them says the same, which names both."""


class DataError(TrainingError):
    """A data set failed at a sample; the message names the data set and the index."""


class DataAway(DataError):
    """A data set could not reach a disk or a network at a sample; it may be back."""


class LostWorker(DataError):
    """A loading worker was killed, or killed itself, over no sample in particular."""


class NonFiniteError(TrainingError):
    """Loss or gradient became NaN or infinite; the message names step, rank and samples."""


class DivergenceError(TrainingError):
    """Replicas that must be equal are not; the message names the ranks and the first tensor.

    ``step`` is the number of steps after which they were compared.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class CheckpointError(TrainingError):
    """No checkpoint can be loaded, or one cannot be written."""


class DamagedError(CheckpointError):
    """A checkpoint was read, and is not what was written; it will not get better."""


class PeerFailed(TrainingError):
    """This rank is fine, but another one has left; that one's error is the one to show."""
