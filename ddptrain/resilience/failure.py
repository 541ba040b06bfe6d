"""A rank that fails says why: in its log, on the screen, and to the agent that started it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ddptrain import files
from ddptrain.errors import (
    EXIT_FAILED,
    DataAway,
    DataError,
    Disagreement,
    LostWorker,
    PeerFailed,
    TrainingError,
)
from ddptrain.place import Place
from ddptrain.screen import say

COLLECTIVE_CODE = ("torch/distributed/", "torch/nn/parallel/")
MAYBE_COLLECTIVE_CODE = ("torch/autograd/graph.py", "torch/futures/", "ddptrain/")
LATER_SECONDS = 3600
IS_CAUSE, MAY_PASS = "is_cause", "may_pass"
PEER_SECONDS = 3.0
"""How long a rank whose collective failed waits to be stopped, or to hear of the real cause."""

logger = logging.getLogger("ddptrain")


def note(error: BaseException) -> None:
    """Write ``error`` to this rank's log, before anything else can fail."""
    logger.debug("failed:\n%s", _traceback(error))


def exit_with(
    error: BaseException, place: Place, context: str, on_screen: bool, told: threading.Event
) -> int:
    """Report ``error`` where people and launchers look for it; return the exit code.

    A rank whose collective broke is rarely the cause: it waits for the agent to end it, which sets
    ``told``, so that the rank with the real error is the one that is shown.
    """
    if place.world_size > 1 and is_of_peer(error):
        told.wait(PEER_SECONDS)
        error = PeerFailed(
            f"a collective failed, most likely because another rank has left ({summary(error)}); "
            "the first error is in that rank's log"
        )
    speaker = "ddptrain" if isinstance(error, Disagreement) else place.name
    line = f"{speaker}: {context}{summary(error)}"
    details = _details(error)
    logger.debug("reported:\n%s", line)
    tell_agent(f"{details}{line}", may_pass=may_pass(error))
    if on_screen:
        say(f"{details}{line}", sys.stderr)
    return getattr(error, "exit_code", EXIT_FAILED)


def leave_now(code: int) -> NoReturn:
    """End this process without waiting for peers, whose half of a teardown will never come."""
    ignore_children()
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def ignore_children() -> None:
    """Have torch raise nothing more, wherever the main thread is, when a loading worker ends."""
    with suppress(ValueError):  # in another thread, where nothing is raised
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def may_pass(error: BaseException) -> bool:
    """Whether the same start, made again, may come to another end.

    It may if a process has gone or a disk was away, and does not if a file is not there or the code
    is wrong.
    """
    if isinstance(error, DataAway | LostWorker | PeerFailed) or _is_of_worker(error):
        return True
    is_ours = isinstance(error, TrainingError) and not isinstance(error, DataError)
    return files.may_pass(error.__cause__ if is_ours else error)


def _is_of_worker(error: BaseException) -> bool:
    """Whether torch raised it, wherever the main thread was, because a loading worker has died."""
    return _innermost(error).endswith("torch/utils/data/_utils/signal_handling.py")


def _innermost(error: BaseException) -> str:
    """The file of the Python code in which it was raised, with slashes."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename.replace("\\", "/") if frames else ""


def tell_agent(message: str, is_cause: bool = True, may_pass: bool = False) -> None:
    """Leave the error where torch's elastic agent looks for it, so that its report ends with it.

    What is no cause comes after all that are, and does not take the place of one.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or (not is_cause and Path(file).exists()):
        return
    when = int(time.time()) + (0 if is_cause else LATER_SECONDS)
    told = {"py_callstack": message, "timestamp": str(when)}
    extra = {**told, IS_CAUSE: is_cause, MAY_PASS: may_pass}
    content = {"message": {"message": message, "extraInfo": extra}}
    with suppress(OSError):  # it is on the screen and in the log as well
        Path(file).write_text(json.dumps(content))


def is_first_to_say() -> bool:
    """Whether this rank is the one of its node that says on the screen what all of them met.

    Not always local rank 0: the agent ends all ranks as soon as one has left, so the first speaks.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        Path(file).parent.parent.joinpath("said").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def summary(error: BaseException) -> str:
    """One line."""
    if isinstance(error, TrainingError):
        return _lines(error)[-1]
    return " ".join(f"{type(error).__name__}: {error}".split())


def _lines(error: TrainingError) -> list[str]:
    """The message; if a loading worker raised it, torch has put the traceback there before it."""
    *before, last = str(error).strip().splitlines() or [""]
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return [*before, last.removeprefix(name)]


def _details(error: BaseException) -> str:
    """What precedes the one line: where in whose code it happened, if that was not ours."""
    if not isinstance(error, TrainingError):
        return _traceback(error)
    if isinstance(error, DataError) and error.__cause__ is not None:
        return _traceback(error.__cause__)
    return "".join(f"{line}\n" for line in _lines(error)[:-1])


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def is_of_peer(error: BaseException) -> bool:
    """Whether the innermost Python code was at a place where ranks talk.

    They also talk within backward, where a model has errors of its own, and what is written in C++
    leaves our own line as the innermost: there the message tells.
    """
    if isinstance(error, TrainingError):
        return False
    innermost = _innermost(error)
    if any(part in innermost for part in MAYBE_COLLECTIVE_CODE):
        return any(backend in str(error).lower() for backend in ("gloo", "nccl"))
    return any(part in innermost for part in COLLECTIVE_CODE)
