"""A Slurm of its own on this machine, so that what users submit is run by the real scheduler.

One controller and a few nodes from the distribution's packages, as plain child processes; all their
files lie in one folder, and nothing of theirs is left at the end.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
NODES = {"n1": "CPUs=2", "n2": "CPUs=2", "n3": "CPUs=4"}
"""Names, and what they say of themselves. All have two GPUs, which are no more than numbers."""
LIVING = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED")
"""States of a job that has not ended."""

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Debian keeps daemons where only root looks for them."""

ARRIVAL_SECONDS = 2.0
LIMIT_SECONDS = 300.0
"""How long anything may take: far more than it does, for machines that are busy otherwise."""


def missing_binaries() -> list[str]:
    """The programs of Slurm and MUNGE that this machine lacks."""
    return [name for name in DAEMONS + COMMANDS if shutil.which(name, path=PATH) is None]


class Cluster:
    """A running Slurm; ``with Cluster() as slurm`` starts and ends it."""

    def __init__(self, nodes: Mapping[str, str] = NODES) -> None:
        self.nodes = nodes
        # Not below pytest's folder: the path of a Unix socket may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.conf = self.folder / "slurm.conf"
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = _environment() | {"SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._start("munged", "--foreground", *self._munge_files())
            wait_until(self._socket.exists, "munged", self._trouble)
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node)
            wait_until(self._is_idle, "Slurm's nodes", self._trouble)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def submit(self, folder: Path, *arguments: str) -> int:
        """Submit a job from ``folder``; return its id."""
        return int(self._call("sbatch", "--parsable", *arguments, folder=folder))

    def state(self, job: int) -> str:
        """Slurm's word for what has become of the job."""
        return self._call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def requeue(self, job: int) -> None:
        """Stop the job and have it run again at once, not after Slurm's pause of two minutes."""
        self._call("scontrol", "requeue", str(job))
        self.hasten(job)

    def hasten(self, job: int) -> None:
        """Wait until a job is requeued, and spare it Slurm's pause of two minutes."""
        # Until its nodes are idle and their daemons for it have gone, the end of its script is on
        # its way to the controller, which would take it for that of the next start. That it has
        # arrived shows nowhere: so all of that has to have been so for a while.
        since: list[float] = []

        def is_over() -> bool:
            if self.state(job) != "PENDING" or not self._is_idle() or _has_daemon(job):
                since.clear()
            else:
                since.append(time.monotonic())
            return bool(since) and since[-1] - since[0] > ARRIVAL_SECONDS

        wait_until(is_over, f"job {job} to stop", self._trouble)
        self._call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def run(self, folder: Path | None, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's to its end, in ``folder`` or here."""
        return subprocess.run(
            command,
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )

    @contextmanager
    def without(self, node: str) -> Iterator[None]:
        """Have a node die with all that runs on it, and tell Slurm; it comes back in the end."""
        number = 2 + list(self.nodes).index(node)
        self.daemons[number].kill()
        self.daemons[number].wait()
        for process in self._processes():
            with suppress(OSError):
                if f"SLURMD_NODENAME={node}" in Path(f"/proc/{process}/environ").read_text():
                    os.kill(process, signal.SIGKILL)
        self._set_node(node, "DOWN")
        try:
            yield
        finally:
            self.daemons[number] = self._daemon("slurmd", "-D", "-N", node)
            self._set_node(node, "RESUME")

    def _set_node(self, node: str, state: str) -> None:
        self._call("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def signal(self, job: int, name: str) -> None:
        """Send a signal to the steps of a job, as Slurm does before a time limit."""
        self._call("scancel", f"--signal={name}", str(job))

    def agents_that_listen(self) -> int:
        """How many agents of a run have come so far that they heed SIGUSR1."""
        found = 0
        for process in self._processes():
            with suppress(OSError):
                status = Path(f"/proc/{process}/status").read_text()
                caught = int(status.partition("SigCgt:")[2].split()[0], 16)
                is_agent = Path(f"/proc/{process}/cmdline").read_text().endswith("\0node\0rank\0")
                found += is_agent and bool(caught >> (signal.SIGUSR1 - 1) & 1)
        return found

    @property
    def _socket(self) -> Path:
        return self.folder / "munge.socket"

    def _munge_files(self) -> list[str]:
        kinds = ("key", "pid", "log", "seed")
        files = [f"--{kind}-file={self.folder / 'munge'}.{kind}" for kind in kinds]
        return [f"--socket={self._socket}", *files]

    def _write_files(self) -> None:
        # MUNGE insists that all may enter its socket's folder, and only its owner read the key.
        self.folder.chmod(0o711)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "state").mkdir()
        (self.folder / "spool").mkdir()
        self.conf.write_text(_slurm_conf(self.folder, self._socket, self.nodes))
        gpus = "".join(f"Name=gpu File={each}\n" for each in ("/dev/null", "/dev/zero"))
        (self.folder / "gres.conf").write_text(gpus)
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={self._cgroup_plugin()}\n")

    def _cgroup_plugin(self) -> str:
        """The choice that leaves control groups alone: a container may have none to write to.

        Before 24.05 there was no such choice, but v1 does nothing until a plugin asks it to.
        """
        version = self._call("slurmd", "-V").split()[-1]
        year, month = map(int, version.split(".")[:2])
        return "disabled" if (year, month) >= (24, 5) else "cgroup/v1"

    def _start(self, *command: str) -> None:
        self.daemons.append(self._daemon(*command))

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{command[0]}-{Path(command[-1]).name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt is for pytest, which ends them in order
            )

    def _call(self, *command: str, folder: Path | None = None) -> str:
        done = self.run(folder, *command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def _is_idle(self) -> bool:
        ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
        if ended:
            raise RuntimeError(f"ended: {ended}\n{self._trouble()}")
        try:
            states = self._call("sinfo", "--noheader", "--Node", "--format=%T")
        except RuntimeError:
            return False  # the controller does not answer yet
        return states.split() == ["idle"] * len(self.nodes)

    def _trouble(self) -> str:
        """The end of every daemon's log."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs)

    def _end(self) -> None:
        """Cancel what runs, end the daemons, and kill what is left, all by process id."""
        with ExitStack() as last:
            last.callback(shutil.rmtree, self.folder)
            last.callback(self._kill_leftovers)
            for daemon in self.daemons:  # undone in reverse: nodes, controller, MUNGE
                last.callback(_terminate, daemon)
            if self._is_whole():  # else there is nobody to ask, and what is left gets killed
                self._call("scancel", f"--user={_user()}")
                wait_until(lambda: not self._call("squeue", "--noheader"), "the end of all jobs")

    def _is_whole(self) -> bool:
        alive = [daemon for daemon in self.daemons if daemon.poll() is None]
        return len(alive) == 2 + len(self.nodes)

    def _kill_leftovers(self) -> None:
        for process in self._processes():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGKILL)
        wait_until(lambda: not list(self._processes()), "the end of all processes")

    def _processes(self) -> Iterator[int]:
        """What the daemons started: a step's keeper works in our folder, a task has our variable.

        Slurm gives both a session of their own, and makes them children of init.
        """
        mark = f"SLURM_CONF={self.conf}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = mark in (process / "environ").read_bytes().split(b"\0")
                if ours or (process / "cwd").readlink() == self.folder:
                    yield int(process.name)
            except OSError:
                continue  # it has just ended, or is another user's


def wait_until(
    is_so: Callable[[], bool], what: str, trouble: Callable[[], str] = lambda: ""
) -> None:
    """Poll until ``is_so``. Raises ``TimeoutError`` with what ``trouble`` tells."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {LIMIT_SECONDS:.0f} s for {what}\n{trouble()}")
        time.sleep(0.2)


def _environment() -> dict[str, str]:
    """This environment with this Python first, and nothing in it of a launcher or another Slurm."""
    foreign = ("SLURM", "SBATCH", "SRUN", "TORCHELASTIC", "RANK", "WORLD_SIZE", "MASTER_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    path = os.pathsep.join([str(Path(sys.executable).parent), PATH])
    return inherited | {"PATH": path, "OMP_NUM_THREADS": "1"}


def _slurm_conf(folder: Path, munge_socket: Path, nodes: Mapping[str, str]) -> str:
    # By its name the controller knows itself; addresses are given, since names may not resolve.
    host = socket.gethostname().partition(".")[0]
    controller, *ports = _free_ports(1 + len(nodes))
    node_lines = "\n".join(
        f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} {what} "
        "RealMemory=1000 Gres=gpu:2"
        for (name, what), port in zip(nodes.items(), ports, strict=True)
    )
    # Jobs derive ports from their ids, and another Slurm may be under test on this machine.
    first_job = random.SystemRandom().randrange(1, 1_000_000)
    return f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={_user()}
SlurmdUser={_user()}
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={munge_socket}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
# A node may say that it has another number of processors than the machine.
SlurmdParameters=config_overrides
ReturnToService=2
# Busy machines answer late.
MessageTimeout=60
{node_lines}
PartitionName=all Nodes=ALL Default=YES
"""


def _free_ports(count: int) -> list[int]:
    """Ports that the system finds free, all held at once so that they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _terminate(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _has_daemon(job: int) -> bool:
    """Whether a step of ``job``, or its script, is still being looked after on some node."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if process.read_text().startswith(f"slurmstepd: [{job}."):
                return True
    return False
