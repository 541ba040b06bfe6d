"""In a step of Slurm: the agent of one node, which starts its ranks and meets the others."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ddptrain.checkpoint.progress import Progress
from ddptrain.config import Config
from ddptrain.errors import EXIT_COMPLETED, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from ddptrain.launch.local import RESTARTS, count_ranks
from ddptrain.place import address_towards
from ddptrain.remembered import LAUNCHED, unpacked
from ddptrain.resilience.failure import IS_CAUSE, MAY_PASS
from ddptrain.resilience.preemption import heeded
from ddptrain.rules import check_world_size
from ddptrain.run_directory import RunDirectory

ENDPOINT, ADDRESSES = "DDPTRAIN_ENDPOINT", "DDPTRAIN_ADDRESSES"
"""Where the agents meet, and under which address each of them is reached, for the agents."""
FIRST_ERROR, MAYBE_OF_PEER = "ddptrain/first-error", "ddptrain/maybe-of-peer"
"""Keys in the agents' store of what the launch is to show last, the second if there is no first."""
HERE = "ddptrain/here/"
"""Before a node's name there: its agent has come."""
ASKED = "ddptrain/asked"
"""The key there of the signal by which an agent was asked to stop."""
STORE_SECONDS = 10.0
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which Slurm asks a job to stop that may go on; SIGTERM also comes of a failure."""
KILLED = tuple(128 + number for number in WARNINGS)
"""srun's exit codes if such a signal came before an agent could heed it."""


def be_node(command: str) -> int:
    """Be the agent of this node's ranks, each a ``command``; return the exit code.

    It is 0 also if they were asked to stop: with another one srun would end the other agents, whose
    ranks may still be saving.
    """
    came: list[int] = []
    for number in heeded():  # until torch's agent has handlers of its own
        signal.signal(number, lambda n, _: _note(n, came))
    config = unpacked(os.environ[LAUNCHED])
    arguments = _arguments(config, command)
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    _tell_launch(HERE + os.environ["SLURMD_NODENAME"], step)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    if command == "rank":
        _watch(config, came)
    try:
        _raise(came)
        main(arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if codes == {EXIT_STOPPED}:  # they heard of it from another node's
            return EXIT_COMPLETED
        _tell_error(error.get_first_failure()[1])
        return EXIT_REFUSED if EXIT_REFUSED in codes else EXIT_FAILED
    except SignalException as error:
        if error.sigval not in WARNINGS:
            return EXIT_FAILED
        _tell_launch(ASKED, error.sigval.name)
    finally:
        for number in heeded():  # torch's handlers would raise amid the interpreter's end
            signal.signal(number, signal.SIG_IGN)
    return EXIT_COMPLETED


def _note(number: int, came: list[int]) -> None:
    if number not in WARNINGS:
        os._exit(EXIT_FAILED)
    came.append(number)


def _raise(came: list[int]) -> None:
    """Raise what torch's agent raises, for a signal that came before it listened."""
    from torch.distributed.elastic.multiprocessing import SignalException

    for number in came[:1]:
        raise SignalException("came early", sigval=signal.Signals(number))


def _arguments(config: Config, command: str) -> list[str]:
    """torchrun's, for this node. Raises ``Refused`` if its ranks would have no work."""
    found = os.environ
    nodes = int(found["SLURM_STEP_NUM_NODES"])
    ranks = count_ranks(config)
    check_world_size(config, nodes * ranks)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    found.setdefault("OMP_NUM_THREADS", str(threads))
    addresses: dict[str, str] = json.loads(found[ADDRESSES])
    known = addresses[found["SLURMD_NODENAME"]]
    here = address_towards(each for each in addresses.values() if each != known) or known
    step = f"{found['SLURM_JOB_ID']}.{found.get('SLURM_RESTART_COUNT', 0)}.{found['SLURM_STEP_ID']}"
    restarts = RESTARTS if config.launch.max_restarts is None else config.launch.max_restarts
    return [
        *(f"--nnodes={nodes}", f"--nproc-per-node={ranks}"),
        f"--max-restarts={restarts if command == 'rank' else 0}",
        *("--rdzv-backend=c10d", "--rdzv-conf=is_host=0", f"--rdzv-id={step}"),
        f"--rdzv-endpoint={':'.join(map(str, _endpoint()))}",
        f"--local-addr={here}",
        f"--signals-to-handle={','.join(number.name for number in heeded())}",
        *("-m", "ddptrain", command),
    ]


def _endpoint() -> tuple[str, int]:
    host, _, port = os.environ[ENDPOINT].rpartition(":")
    return host or os.environ["SLURM_LAUNCH_NODE_IPADDR"], int(port)


def _watch(config: Config, came: list[int]) -> None:
    """Have torch's agent not start ranks again that would come to the same end, nor miss a signal.

    As ``launch_ranks`` does on one machine: they were refused, or stopped, or raised an error of
    their own before this launch had finished a step. ``came`` is what came before it listened.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    progress = Progress(RunDirectory(Path(str(config.run.dir))).memories()[0])
    first = progress.read()
    monitor = LocalElasticAgent._monitor_workers

    def monitor_workers(agent: LocalElasticAgent, workers: WorkerGroup) -> RunResult:
        _raise(came)
        result: RunResult = monitor(agent, workers)
        for failure in result.failures.values() if result.is_failed() else ():
            was_raised = _was_raised(failure) and progress.read() <= first
            if was_raised or failure.exitcode in (EXIT_REFUSED, EXIT_STOPPED):
                agent._remaining_restarts = 0
        return result

    LocalElasticAgent._monitor_workers = monitor_workers  # type: ignore[method-assign]


def _was_raised(failure: Any) -> bool:
    """Whether a rank raised an error by itself that will not pass."""
    extra = _note_of(failure)
    return failure.exitcode > 0 and extra.get(IS_CAUSE, False) and not extra.get(MAY_PASS, True)


def _note_of(failure: Any) -> dict[str, Any]:
    """What a rank left for its agent, if it did: see ``tell_agent``."""
    message = failure.message
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def _tell_error(failure: Any) -> None:
    """Have the launch show a failure last, after all that agents and srun say of it.

    A rank may also have failed because it lost another one.
    """
    extra = _note_of(failure)
    lines = str(extra.get("py_callstack", "")).strip().splitlines()
    if lines and extra.get(IS_CAUSE, False):
        _tell_launch(MAYBE_OF_PEER if extra[MAY_PASS] else FIRST_ERROR, lines[-1])


def _tell_launch(key: str, value: str) -> None:
    """Put ``value`` into the agents' store, if no other agent has done so."""
    from torch._C._distributed_c10d import TCPStore

    host, port = _endpoint()
    with suppress(RuntimeError):  # the launch has gone
        seconds = timedelta(seconds=STORE_SECONDS)
        TCPStore(host, port, is_master=False, timeout=seconds).compare_set(key, "", value)
