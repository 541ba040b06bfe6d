"""The directory of a run: its files by name, and how it comes to be."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

import yaml

from ddptrain.claim import LAUNCH_LOCK, LOCK, Lock
from ddptrain.compose import validate
from ddptrain.config import Config, Resume, to_plain
from ddptrain.errors import Refused, TrainingError
from ddptrain.files import LASTING, make_new, read_json, replace_text
from ddptrain.origin import DIFF, origin, uncommitted
from ddptrain.overrides import override
from ddptrain.screen import short
from ddptrain.stored import defaults, differences, fill, read_yaml

NODE_MEMORY = Path("/dev/shm")
"""Files in memory, which outlive the process that wrote them."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. `ls` shows the same names.

    ``told`` is its identity, for a node whose file system is not that of the first. ``is_new`` says
    that it was not there before this process.
    """

    path: Path
    told: str = ""
    is_new: bool = False

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def launched(self) -> Path:
        """The config of the newest start, for the ranks that it starts."""
        return self.path / "launched.yaml"

    @property
    def code_diff(self) -> Path:
        return self.path / DIFF

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def fingerprints(self) -> Path:
        return self.path / "fingerprints.jsonl"

    @property
    def layers(self) -> Path:
        return self.path / "layers.jsonl"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts.jsonl"

    @property
    def crashes(self) -> Path:
        return self.path / "crashes.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def explained(self) -> Path:
        return self.path / "explain"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def memories(self) -> list[Path]:
        """Where a node keeps snapshots: in its memory, or beside the checkpoints if that is full.

        Named by the run's path and an identity of its own, so that a run that is deleted leaves
        nothing to a new one in its place.
        """
        name = sha256(f"{self.path.resolve()}\n{self.known_identity()}".encode()).hexdigest()[:16]
        shared = NODE_MEMORY if NODE_MEMORY.is_dir() else Path(gettempdir())
        beside = self.path / f".memory-{socket.gethostname()}"
        return [shared / f"ddptrain-{os.getuid()}" / name, beside]

    def known_identity(self) -> str:
        """What tells it from a run that was deleted and had the same path."""
        return self.told or (self.identity.read_text() if self.identity.exists() else "")

    @property
    def anomalies(self) -> Path:
        return self.path / "anomalies.jsonl"

    @property
    def identity(self) -> Path:
        return self.path / ".identity"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def export(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def argument(self) -> str:
        """What one gives a command that is to go on with this run."""
        return override("run.dir", short(self.path))

    def leave_no_trace(self) -> None:
        """Be gone, if it was made for a start that was refused before a rank wrote to its log."""
        if self.is_new and not self.attempts.exists() and not any(self.logs.glob("*")):
            rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # others' runs are there
                self.path.parent.rmdir()

    def load(self) -> Config:
        """Return the stored config. Raises ``Refused``, also if it names what may run code.

        What was no key yet when it was stored is as the built-in tree has it.
        """
        return self._read(self.config)

    def load_launched(self) -> Config:
        """Return the config of the newest start. Raises ``Refused`` as ``load`` does."""
        return self._read(self.launched)

    def stored(self, file: Path | None = None) -> dict[str, Any]:
        """The stored config unchecked: to look at, whatever has become of what it names."""
        plain = read_yaml(file or self.config)
        plain.pop("provenance", None)
        return fill(defaults(), plain)

    def _read(self, file: Path) -> Config:
        filled = self.stored(file)
        try:
            return validate(filled)
        except Refused as error:
            raise Refused(f"{file}: {error}") from None

    def launch(self, config: Config) -> None:
        """Note ``config`` for the ranks of this start; what is there already is left untouched.

        Raises ``TrainingError`` if the disk does not take it.
        """
        text = yaml.safe_dump(to_plain(config))
        try:
            if not self.launched.exists() or self.launched.read_text() != text:
                replace_text(self.launched, text)
        except OSError as error:
            raise TrainingError(f"{self.launched}: {error.strerror}") from error

    def provenance(self) -> dict[str, Any]:
        """Return what was stored about the run's code: versions, commit, overrides, original."""
        return dict(read_yaml(self.config).get("provenance", {}))

    @property
    def trial(self) -> Path:
        return self.path / "trial.json"

    def outcome(self) -> dict[str, Any]:
        """What ``result.json`` says; empty if the run has not ended."""
        return read_json(self.result)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint in the directory, or a snapshot on this node."""
        return any(
            any(folder.glob("step-*/manifest.json"))
            for folder in (self.checkpoints, *self.memories())
        )


def check_launch(config: Config) -> None:
    """Refuse what ``check_directory`` does, and a ``run.dir`` that another launch has."""
    check_directory(config)
    if config.run.dir is not None:
        Lock(Path(config.run.dir) / LAUNCH_LOCK).try_out()


def check_directory(config: Config) -> None:
    """Refuse a ``run.dir`` that this config may not continue, or that is in use."""
    if config.run.dir is None:
        return
    run = RunDirectory(Path(config.run.dir))
    Lock(run.path / LOCK).try_out()
    if run.has_checkpoint() and config.run.resume is Resume.never:
        raise Refused(
            f"run.resume=never but {run.path} holds a checkpoint; name another run.dir, "
            "or continue it with run.resume=auto"
        )
    is_elsewhere = config.checkpoint.dir is not None  # where a look takes longer: see Run.restore
    if not run.has_checkpoint() and config.run.resume is Resume.must and not is_elsewhere:
        raise Refused(f"run.resume=must but {run.path} holds no checkpoint")
    if run.config.exists() and (different := differences(run.load(), config)):
        raise Refused(
            f"{run.path} holds a run of another config: {'; '.join(different)}; "
            "name another run.dir, or undo the difference"
        )


def open_directory(
    config: Config, overrides: list[str], rerun_of: str | None = None
) -> RunDirectory:
    """Create the run's directory, or open the one it continues. Raises ``Refused``."""
    check_directory(config)
    wanted = Path(config.run.dir or Path("runs") / str(config.run.name)).absolute()
    try:
        if config.run.dir is None:
            wanted, is_new = make_new(wanted), True
        else:
            is_new = not wanted.exists()
        wanted.mkdir(parents=True, exist_ok=True)
        run = RunDirectory(wanted, is_new=is_new)
        config.run.dir = str(run.path)
        _describe(run, config, overrides, rerun_of)
    except OSError as error:
        kind = Refused if isinstance(error, LASTING) else TrainingError
        raise kind(
            f"{wanted} cannot be made or written to: {error.strerror}; name another run.dir"
        ) from error
    return run


def _describe(
    run: RunDirectory, config: Config, overrides: list[str], rerun_of: str | None
) -> None:
    """Write down what the run is, unless that is there already."""
    if not run.identity.exists():
        replace_text(run.identity, uuid4().hex)
    if not run.config.exists():
        provenance = {**origin(), "overrides": overrides, "rerun_of": rerun_of}
        run.code_diff.write_text(uncommitted())
        stored = {**to_plain(config), "provenance": provenance}
        replace_text(run.config, yaml.safe_dump(stored, sort_keys=False))
