"""Starts ranks on this machine and waits for them, as torch's agent does, whose variables it sets.

torch's can start no rank before it has been imported itself, which takes as long as a rank's own
imports do. Here both go on at once: what needs torch is the store in which ranks meet, and until it
is there they wait at its port.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ddptrain.errors import TrainingError
from ddptrain.resilience.failure import IS_CAUSE, MAY_PASS
from ddptrain.resilience.preemption import heeded
from ddptrain.run_directory import NODE_MEMORY
from ddptrain.screen import say

GRACE_SECONDS = 30.0
"""So long ranks may take to leave once they were told to, as under torch's agent."""
POLL_SECONDS = 0.03
UNKILLABLE_SECONDS = 10.0
HOST = "127.0.0.1"
DDPTRAIN = (sys.executable, "-m", "ddptrain")


class Asked(Exception):
    """The ranks were ``asked`` to end, by a signal that came to this process, and have ended."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


@dataclass(frozen=True)
class Failure:
    """How the rank ended that failed first; ``message`` is what it left to be shown.

    ``may_pass`` says that it knows of nothing that would make it fail again.
    """

    rank: int
    exit_code: int
    message: str | None
    may_pass: bool = False

    @property
    def how(self) -> str:
        """How its process ended, in words."""
        code = self.exit_code
        if code > 0:
            return f"exited {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:  # Python has no name for it
            return f"was killed by signal {-code}"


@dataclass
class Store:
    """torch's store of keys and values, at a port that is open before the store is there."""

    listener: socket.socket = field(default_factory=lambda: socket.create_server((HOST, 0)))
    store: Any = None
    problem: BaseException | None = None

    def __post_init__(self) -> None:
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._open, name="store", daemon=True)

    def _open(self) -> None:
        try:
            from torch._C._distributed_c10d import TCPStore

            self.store = TCPStore(
                HOST,
                self.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=self.listener.detach(),
            )
        except BaseException as error:
            self.problem = error


@dataclass
class Rank:
    """A process that is a rank, and the file in which it leaves what is to be shown if it fails."""

    number: int
    note: Path
    process: subprocess.Popen[bytes]

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def is_noticed(self) -> bool:
        """Whether it has ended, or has left word that it is going to."""
        with suppress(OSError):
            return self.has_ended or self.note.exists()
        return False

    def tell_group(self, number: signal.Signals) -> None:
        """Send a signal to the rank and to all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def failure(self) -> tuple[bool, Failure] | None:
        """How it failed, if it did, and whether by itself, for what it knows."""
        code = self.process.returncode
        if not code:
            return None
        with suppress(OSError, ValueError, KeyError, TypeError):
            extra = json.loads(self.note.read_text())["message"]["extraInfo"]
            message = str(extra["py_callstack"])
            is_cause, may_pass = bool(extra.get(IS_CAUSE, True)), bool(extra.get(MAY_PASS, False))
            return is_cause, Failure(self.number, code, message, may_pass)
        return True, Failure(self.number, code, None)


def start_ranks(
    command: list[str],
    ranks: int,
    output: Path | None = None,
    signals: deque[signal.Signals] | None = None,
) -> Failure | None:
    """Run ``command`` as so many ``ranks``; return how they failed, if they did.

    What they print goes to files under ``output``, if that is given, and to the screen if not. Who
    has ``heard`` signals before, and will afterwards, gives what has come.
    Raises ``Asked``, and ``TrainingError`` if a rank cannot be ended. Ranks may be over before
    torch has been imported: a process that ends then should do so as ``run_command`` does.
    """
    store = Store()
    identity = uuid.uuid4().hex
    started: list[Rank] = []
    with _notes() as notes:
        with heard() if signals is None else nullcontext(signals) as came:
            try:
                for number in range(ranks):
                    variables = _variables(number, ranks, store.port, identity)
                    started.append(_start(command, number, variables, Path(notes), output))
                store.thread.start()
                noticed, asked = _wait(started, came, store)
            finally:
                for rank in started:
                    if not rank.has_ended:
                        rank.tell_group(signal.SIGKILL)
                        with suppress(subprocess.TimeoutExpired):
                            rank.process.wait(UNKILLABLE_SECONDS)
            asked = asked or next(iter(came), None)
        if asked is not None:
            raise Asked(asked)
        failures = [failure for rank in noticed if (failure := rank.failure()) is not None]
        # One that says it had to leave because of others comes after all that do not.
        return min(failures, key=lambda each: not each[0])[1] if failures else None


def _start(
    command: list[str], number: int, variables: dict[str, str], notes: Path, output: Path | None
) -> Rank:
    note = notes / "attempt_0" / str(number) / "error.json"
    note.parent.mkdir(parents=True)
    variables = {**os.environ, **variables, "TORCHELASTIC_ERROR_FILE": str(note)}
    with ExitStack() as files:
        streams: dict[str, Any] = {}
        if output is not None:
            folder = output / str(number)
            folder.mkdir(parents=True)
            for name in ("stdout", "stderr"):
                streams[name] = files.enter_context((folder / f"{name}.log").open("wb"))
        # A session of its own: Ctrl-C is not for its workers, and it hears of it from here.
        process = subprocess.Popen(command, env=variables, start_new_session=True, **streams)
    return Rank(number, note, process)


def _variables(rank: int, ranks: int, port: int, identity: str) -> dict[str, str]:
    """What torchrun sets."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    here = {f"{kind}RANK": str(rank) for kind in ("", "LOCAL_", "ROLE_")}
    all_of_them = {f"{kind}WORLD_SIZE": str(ranks) for kind in ("", "LOCAL_", "ROLE_")}
    return {
        **here,
        **all_of_them,
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": identity,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _notes() -> TemporaryDirectory[str]:
    """A folder for what ranks leave to be shown; in memory where the disk takes none."""
    try:
        return TemporaryDirectory(prefix="ddptrain-", ignore_cleanup_errors=True)
    except OSError:
        memory = str(NODE_MEMORY)
        return TemporaryDirectory(prefix="ddptrain-", dir=memory, ignore_cleanup_errors=True)


@contextmanager
def heard() -> Iterator[deque[signal.Signals]]:
    """The signals that come meanwhile, which end nothing by themselves."""
    came: deque[signal.Signals] = deque()
    before: dict[signal.Signals, Any] = {
        # Of a parent that ignores its children it is inherited to be told nothing of one's own.
        signal.SIGCHLD: signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    }
    for number in heeded():
        before[number] = signal.signal(number, lambda n, _: came.append(signal.Signals(n)))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    ranks: list[Rank], heard: deque[signal.Signals], store: Store
) -> tuple[list[Rank], signal.Signals | None]:
    """Wait for all to end; return them as they were noticed to end or fail, and the first signal.

    A signal is handed on. Once a rank has failed, the others are told to leave.
    """
    noticed: list[Rank] = []
    asked: signal.Signals | None = None
    until: float | None = None
    left = list(ranks)
    while left:
        time.sleep(POLL_SECONDS)
        ended = [rank for rank in left if rank.has_ended]
        noticed += [rank for rank in ranks if rank not in noticed and rank.is_noticed]
        left = [rank for rank in left if rank not in ended]
        told = [heard.popleft() for _ in range(len(heard))]
        asked = asked or (told[0] if told else None)
        if store.problem is not None:
            raise store.problem
        if until is None and any(rank.process.returncode for rank in ended):
            _tell_cause(ended)
            told.append(signal.SIGTERM)
        if told and until is None:
            until = time.monotonic() + GRACE_SECONDS
        for number in told:
            for rank in left:
                rank.process.send_signal(number)
        if until is not None:
            for rank in ended:  # for what it has left behind
                rank.tell_group(signal.SIGTERM)
            _insist(left, time.monotonic() - until)
    return noticed, asked


def _tell_cause(ended: list[Rank]) -> None:
    """Name ranks that ended without a word, before others say that they were told to leave."""
    for rank in ended:
        _, failure = rank.failure() or (False, None)
        if failure is not None and failure.message is None:
            say(f"rank {rank.number}: {failure.how}; the others save and leave", sys.stderr)


def _insist(left: list[Rank], seconds: float) -> None:
    """End who is ``seconds`` late to leave. Raises ``TrainingError`` if that cannot be done."""
    for rank in left if seconds > 0 else ():
        rank.tell_group(signal.SIGKILL)
        if seconds > UNKILLABLE_SECONDS:
            raise TrainingError(
                f"rank {rank.number} (process {rank.process.pid}) does not end, not even by "
                "SIGKILL: the kernel waits for its disk or its GPU; start the run again when it is "
                "gone, or on another machine"
            )
