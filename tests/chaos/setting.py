"""Where and how the run of a story is started: its folder, its ranks, its command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from launching import environment

from chaos.processes import MARK
from ddptrain.run_directory import RunDirectory

PROJECT = Path(__file__).parent / "project"
LAUNCHERS = ("ddptrain", "torchrun")


@dataclass
class Setting:
    """One run to be disturbed. ``restarts`` are those of the launcher, before the operator's."""

    folder: Path
    ranks: int = 2
    steps: int = 120
    workers: int = 0
    launcher: str = "ddptrain"
    restarts: int = 3
    overrides: tuple[str, ...] = ()
    disturbing: tuple[str, ...] = ()
    """Overrides that the undisturbed run does without."""
    variables: Mapping[str, str] = field(default_factory=dict)
    run: Path = field(init=False)
    mark: str = field(default_factory=lambda: uuid4().hex)

    def __post_init__(self) -> None:
        self.run = self.folder / "run"
        self.notes.mkdir(parents=True, exist_ok=True)

    @property
    def notes(self) -> Path:
        """Where the ranks leave their traces, and find the faults that they are to commit."""
        return self.folder / "notes"

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.run)

    def memories(self) -> list[Path]:
        """Where each node keeps snapshots in its memory."""
        return self.directory.memories()[:1]

    def arguments(self) -> list[str]:
        """What follows the launcher, the same for every start."""
        return [
            "experiment=chaos",
            f"run.dir={self.run}",
            f"train.max_steps={self.steps}",
            f"data.workers={self.workers}",
            *self.overrides,
            *self.disturbing,
        ]

    def commands(self) -> list[list[str]]:
        """The command of each node."""
        if self.launcher == "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            size = [f"--nproc-per-node={self.ranks}", f"--max-restarts={self.restarts}"]
            return [[*torchrun, *size, "-m", "ddptrain", *self.arguments()]]
        size = [f"launch.nproc_per_node={self.ranks}", f"launch.max_restarts={self.restarts}"]
        return [[sys.executable, "-m", "ddptrain", "train", *size, *self.arguments()]]

    def start(self, output: Path) -> list[subprocess.Popen[bytes]]:
        """Start the run, or go on with it; what it prints goes to ``output``."""
        story = {MARK: self.mark, "CHAOS_NOTES": str(self.notes), "PYTHONFAULTHANDLER": "1"}
        with output.open("wb") as stream:
            return [
                subprocess.Popen(
                    command,
                    cwd=PROJECT,
                    env={**environment(), **story, **self.variables},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for command in self.commands()
            ]
