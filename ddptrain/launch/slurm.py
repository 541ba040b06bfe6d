"""In a job of Slurm: starts an agent on each node, stops in time, and has the job go on later."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass

from ddptrain.config import Config
from ddptrain.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    TrainingError,
)
from ddptrain.launch.agent import DDPTRAIN, POLL_SECONDS, Store, heard
from ddptrain.launch.allocation import Allocation, ask
from ddptrain.launch.node import (
    ADDRESSES,
    ASKED,
    ENDPOINT,
    FIRST_ERROR,
    HERE,
    KILLED,
    MAYBE_OF_PEER,
)
from ddptrain.launch.patience import meeting_seconds
from ddptrain.place import open_port
from ddptrain.remembered import LAUNCHED, packed
from ddptrain.resilience.crashes import LAUNCH, Crashes
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say

MARGIN_SECONDS = 60.0
"""So long before its end a job should have saved, besides the time that saving takes."""
REQUEUE_SECONDS = 60.0
"""So long Slurm takes at most to end what it starts again."""
APART_SECONDS = 60
"""So long after the first agent that ended well the last one may."""
OF_TASKS = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_CPUS_PER_", "SRUN_CPUS_PER_TASK", "SLURM_GPUS_PER_TASK",
    "SLURM_TRES_PER_TASK", "SLURM_MEM_PER_", "SLURM_DIST", "SLURM_EXACT", "SLURM_CPU_BIND",
    "SLURM_GPU_BIND", "SLURM_MEM_BIND", "SLURM_TRES_BIND",
)  # fmt: skip
"""How variables begin that tell srun of tasks and their share of a node, as sbatch was asked, or as
a shell has inherited them: for one agent on a whole node they are wrong, or contradict each other.
"""


def launch_on(allocation: Allocation, run: RunDirectory, config: Config) -> int:
    """Train on all nodes of a job; return the exit code.

    A batch job that was stopped before its time was up, or by a signal to its steps, is requeued,
    and goes on in its next start; one that failed is not, nor one that was cancelled.
    """
    began = time.time()
    os.environ[LAUNCH] = f"slurm-{allocation.name}"  # over requeues, too
    before = _written(run)
    with heard() as signals:
        agents = _start_agents(allocation, config, "rank")
        asked = _wait(agents, allocation, config.resilience.grace_seconds, signals)
        code, told = agents.process.returncode, _told(agents.store)
        if code == 0 and ASKED not in told:
            return EXIT_COMPLETED
        if _written(run) == before or run.outcome().get("status") != "stopped":
            if code not in (0, *KILLED) or agents.missing:
                _tell_cause(told, run, began)
                return EXIT_REFUSED if code == EXIT_REFUSED else EXIT_FAILED
            if run.outcome().get("status") == "completed":
                return EXIT_COMPLETED
            if allocation.was_too_short(time.time() - began):
                return EXIT_FAILED
        if allocation.is_batch and not {signal.SIGTERM, signal.SIGINT} & asked:
            _requeue(allocation, run, signals)
    return EXIT_STOPPED


def try_on(allocation: Allocation, config: Config, command: str) -> int:
    """Run a command such as doctor on all nodes of a job; return the exit code."""
    with heard() as signals:
        agents = _start_agents(allocation, config, command)
        _wait(agents, allocation, config.resilience.grace_seconds, signals)
    code = agents.process.returncode
    return code if code in (EXIT_COMPLETED, EXIT_REFUSED) else EXIT_FAILED


@dataclass
class Agents:
    """Those that srun starts, one on each node; a node that did not come in time is ``missing``."""

    process: subprocess.Popen[bytes]
    store: Store
    addresses: dict[str, str]
    seconds: float | None
    missing: bool = False

    def __post_init__(self) -> None:
        self.until = math.inf if self.seconds is None else time.monotonic() + self.seconds

    def check_store(self) -> None:
        """Raise what kept the store from being opened, at which agents would wait for ever."""
        if self.store.problem is not None:
            self.process.terminate()
            self.process.wait()
            raise self.store.problem

    def step(self) -> str | None:
        """The step that they are in, as Slurm names it; None before the first of them has come."""
        known = self.store.store
        for name in self.addresses if known is not None else ():
            if known.check([HERE + name]):
                return str(known.get(HERE + name).decode())
        return None

    def end_if_one_is_missing(self) -> None:
        """Name the nodes whose agents are not there by then, and end the others."""
        if time.monotonic() < self.until:
            return
        self.until = math.inf
        known = self.store.store
        if absent := [
            f"{name} ({address})"
            for name, address in self.addresses.items()
            if known is None or not known.check([HERE + name])
        ]:
            self.missing = True
            nodes = ", ".join(absent)
            say(
                f"ddptrain: of {len(self.addresses)} nodes {nodes} did not come within "
                f"{self.seconds:g} s: see whether srun can start Python there (its disks, its "
                "network), leave it out (--exclude), or give it more time (launch.timeout)",
                sys.stderr,
            )
            self.process.terminate()


def _start_agents(allocation: Allocation, config: Config, command: str) -> Agents:
    """Start one agent on each node, all of which meet at a store, for ranks of a command."""
    store = Store(open_port())
    store.thread.start()
    addresses = allocation.addresses()
    here = addresses.get(os.environ.get("SLURMD_NODENAME", ""), "")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(OF_TASKS)}
    variables[ENDPOINT], variables[ADDRESSES] = f"{here}:{store.port}", json.dumps(addresses)
    config.launch.interface = config.launch.interface or config.slurm.interface
    variables[LAUNCHED] = packed(config)
    # Not --cpus-per-task: it would take no more of any node than the smallest has.
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1", "--ntasks-per-node=1"]
    srun += [f"--wait={APART_SECONDS}"]
    srun += [f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}"]
    srun += [f"--gpus={gpus}"] if (gpus := allocation.gpus()) else []
    srun += [*config.slurm.srun, *DDPTRAIN, "node", command]
    # A session of its own: Ctrl-C is for the ranks, and srun would ask for a second one.
    process = subprocess.Popen(srun, env=variables, start_new_session=True)
    return Agents(process, store, addresses, meeting_seconds(config))


def _told(store: Store) -> dict[str, str]:
    """What agents have left for the launch, if srun started any."""
    if store.store is None:
        return {}
    keys = [key for key in (ASKED, FIRST_ERROR, MAYBE_OF_PEER) if store.store.check([key])]
    return {key: store.store.get(key).decode() for key in keys}


def _tell_cause(told: dict[str, str], run: RunDirectory, began: float) -> None:
    """Repeat the first error after all that agents and srun say, if a rank could still tell it."""
    noted = [crash for crash in Crashes(run.crashes).of_launch()[-1:] if crash.time > began]
    lines = [told.get(FIRST_ERROR), *(f"rank {crash.rank}: {crash.error}" for crash in noted)]
    for line in [line for line in [*lines, told.get(MAYBE_OF_PEER)] if line][:1]:
        say(f"ddptrain: {line}", sys.stderr)


def _written(run: RunDirectory) -> int:
    return run.result.stat().st_mtime_ns if run.result.exists() else 0


def _wait(
    agents: Agents,
    allocation: Allocation,
    grace_seconds: float,
    signals: deque[signal.Signals],
) -> set[signal.Signals]:
    """Wait for the ranks to end; hand on signals to them, and in time one of our own.

    Returns the signals that came. Slurm sends its own (``--signal``) to steps, not to who waits.
    """
    asked: set[signal.Signals] = set()
    tellers: list[subprocess.Popen[bytes]] = []
    left = allocation.seconds_left()
    at = math.inf
    if left is not None:
        at = time.monotonic() + left - min(grace_seconds + MARGIN_SECONDS, left / 4)
    while agents.process.poll() is None:
        agents.end_if_one_is_missing()
        agents.check_store()
        asked |= set(signals)
        if time.monotonic() > at:
            say("the job's time is nearly up: it stops, to go on later", sys.stderr)
            signals.append(signal.SIGUSR1)
            at = math.inf
        # Only the agents' step: the job may have others, such as the shell that this was typed in.
        step = agents.step() if signals else None
        while step is not None and signals:
            # Quietly, for Slurm may have ended the job itself, and told the steps.
            command = ["scancel", "--quiet", f"--signal={int(signals.popleft())}", step]
            tellers.append(subprocess.Popen(command))
        if {signal.SIGTERM, signal.SIGINT} & set(signals):
            agents.process.terminate()  # none has come yet, and there is nothing to save
        time.sleep(POLL_SECONDS)
    for teller in tellers:  # of a job that Slurm itself ends it tries for half a minute
        teller.kill()
        teller.wait()
    return asked


def _requeue(allocation: Allocation, run: RunDirectory, signals: deque[signal.Signals]) -> None:
    """Have Slurm start the job again, which ends this process."""
    try:
        ask("scontrol", "requeue", allocation.job)
    except TrainingError as error:
        say(
            f"ddptrain: job {allocation.job} is not started again ({error}); the run goes on in "
            f"another job, with run.dir={run.path}",
            sys.stderr,
        )
    else:
        # Before that its own end could be taken for that of the next start.
        until = time.monotonic() + REQUEUE_SECONDS
        while signal.SIGTERM not in signals and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
