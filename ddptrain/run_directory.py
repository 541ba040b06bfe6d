"""The directory of a run: its files by name, and how it comes to be."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from uuid import uuid4

import yaml
from yaml.constructor import ConstructorError

from ddptrain.claim import LAUNCH_LOCK, LOCK, Lock
from ddptrain.compose import config_trees, flatten, to_plain, validate
from ddptrain.config import EXECUTION_ONLY, Config, Resume
from ddptrain.errors import Refused, TrainingError
from ddptrain.files import LASTING, make_new, read_json, replace_text
from ddptrain.origin import DIFF, origin, uncommitted

NODE_MEMORY = Path("/dev/shm")
"""Files in memory, which outlive the process that wrote them."""
SETTINGS = (
    "train", "parallel", "checkpoint", "log", "resilience", "data", "eval", "launch", "slurm", "run"
)  # fmt: skip
"""Sections whose keys are the framework's own; the others are built by what they name."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. `ls` shows the same names.

    ``told`` is its identity, for a node whose file system is not that of the first.
    """

    path: Path
    told: str = ""

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
        plain = _read_yaml(file or self.config)
        plain.pop("provenance", None)
        return _filled(_defaults(), plain)

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
        return dict(_read_yaml(self.config).get("provenance", {}))

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
            wanted = make_new(wanted)
        wanted.mkdir(parents=True, exist_ok=True)
        run = RunDirectory(wanted)
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


def _defaults() -> dict[str, Any]:
    """The framework's own sections, as the built-in tree has them."""
    tree = config_trees()[0]
    root = _read_yaml(tree / "config.yaml")
    chosen = {group: name for entry in root.pop("defaults") if isinstance(entry, dict)
              for group, name in entry.items() if name is not None}  # fmt: skip
    return {
        section: _read_yaml(tree / section / f"{chosen[section]}.yaml")
        if chosen.get(section)
        else root[section]
        for section in SETTINGS
    }


def _filled(known: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """``plain``, with those of the ``known`` entries that it lacks."""
    filled = {
        key: _filled(known[key], value)
        if isinstance(value, dict) and isinstance(known.get(key), dict)
        else value
        for key, value in plain.items()
    }
    return {**known, **filled}


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(file.read_text())
    except LASTING as error:
        raise Refused(f"{file.parent}: not a run: {error.strerror}: {file}") from None
    except OSError as error:  # a disk that is away, and may be back at the next try
        raise TrainingError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{file}: not YAML, and no text: {error}; nothing of it was read") from None
    except ConstructorError as error:
        where = error.problem_mark
        raise Refused(
            f"{file}: line {where.line + 1 if where else '?'}: {error.problem}; a config holds "
            "plain values, and no tag was followed, because one can run code; take it out"
        ) from None
    except yaml.YAMLError as error:
        raise Refused(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise Refused(f"{file}: not a config")
    return plain


def differences(stored: Config, now: Config) -> list[str]:
    """``key: stored → now`` for every key that changes what is computed."""
    return changes(computed(stored), computed(now))


def computed(config: Config) -> dict[str, Any]:
    """The keys and values that decide what a run computes."""
    flat = flatten(to_plain(config))
    return {key: value for key, value in flat.items() if not key.startswith(EXECUTION_ONLY)}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """``key: old → new`` for every key of two flat mappings that differs."""
    return [
        f"{key}: {old.get(key, 'not set')!s} → {new.get(key, 'not set')!s}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
