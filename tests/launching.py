"""Starts real ranks for tests, as a user would: torchrun, or the command line, in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent / "project"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
DDPTRAIN = [sys.executable, "-m", "ddptrain"]
LIMIT_SECONDS = 240
Finished = subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    """That of a shell in which this interpreter's environment is active, with one thread a rank."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return inherited | {"OMP_NUM_THREADS": "1", "PATH": path}


def start(command: list[str], folder: Path = PROJECT) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, so that a test can end all of it."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_tree(root: int) -> None:
    """SIGKILL a process and all below it; torchrun's ranks are in sessions of their own."""
    for process in tree(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def ranks_below(agent: int, program: str = "ddptrain") -> dict[int, int]:
    """The process of each rank of a ``program`` that an agent has started."""
    found = {}
    for process in tree(agent)[1:]:
        try:
            command = Path(f"/proc/{process}/cmdline").read_text()
            variables = Path(f"/proc/{process}/environ").read_text().split("\0")
        except OSError:
            continue
        named = dict(line.partition("=")[::2] for line in variables)
        # Loading workers are forks of their rank, and come after it.
        if program in command and "RANK" in named:
            found.setdefault(int(named["RANK"]), process)
    return found


def tree(root: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended since it was listed
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def run(command: list[str], folder: Path = PROJECT) -> Finished:
    """Run a command to its end."""
    process = start(command, folder)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def train(run_dir: Path, ranks: int, *overrides: str, folder: Path = PROJECT) -> dict[str, Any]:
    """Train to the end, through torchrun if on several ranks; return ``result.json``."""
    launcher = [*TORCHRUN, str(ranks), "-m", "ddptrain"] if ranks > 1 else DDPTRAIN
    finished = run([*launcher, f"run.dir={run_dir}", *overrides], folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return read_result(run_dir)


def read_result(run_dir: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return result


def read_metrics(run_dir: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of one split, without how fast it went."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k != "samples_per_second"}
        for line in lines
        if line["split"] == split
    ]
