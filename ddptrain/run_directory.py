"""The directory of a run: its files by name, how it comes to be, and where its code came from."""

from __future__ import annotations

import json
import random
import subprocess
import time
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import yaml

from ddptrain.compose import flatten, to_plain, validate
from ddptrain.config import EXECUTION_ONLY, Config, Resume
from ddptrain.errors import Refused
from ddptrain.files import replace_text

PACKAGES = ("ddptrain", "torch", "numpy", "hydra-core", "safetensors", "torchmetrics")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. `ls` shows the same names."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def launched(self) -> Path:
        """The config of the newest start, for the ranks that it starts."""
        return self.path / "launched.yaml"

    @property
    def code_diff(self) -> Path:
        return self.path / "code.diff"

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
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def export(self) -> Path:
        return self.path / "model.safetensors"

    def load(self) -> Config:
        """Return the stored config. Raises ``Refused``."""
        plain = _read_yaml(self.config)
        plain.pop("provenance", None)
        return validate(plain)

    def provenance(self) -> dict[str, Any]:
        """Return what was stored about the run's code: versions, commit, overrides, original."""
        return dict(_read_yaml(self.config).get("provenance", {}))

    def outcome(self) -> dict[str, Any]:
        """What ``result.json`` says; empty if the run has not ended."""
        return dict(json.loads(self.result.read_text())) if self.result.exists() else {}

    def has_checkpoint(self) -> bool:
        return any(self.checkpoints.glob("step-*/manifest.json"))


def check_directory(config: Config) -> None:
    """Refuse a ``run.dir`` that this config may not continue; changes nothing on disk."""
    if config.run.dir is None:
        return
    run = RunDirectory(Path(config.run.dir))
    if run.has_checkpoint() and config.run.resume is Resume.never:
        raise Refused(
            f"run.resume=never but {run.path} holds a checkpoint; name another run.dir, "
            "or continue it with run.resume=auto"
        )
    if not run.has_checkpoint() and config.run.resume is Resume.must:
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
    if config.run.dir is None:
        run = RunDirectory(_create_new(Path("runs") / str(config.run.name)))
    else:
        run = RunDirectory(Path(config.run.dir).absolute())
        run.path.mkdir(parents=True, exist_ok=True)
    config.run.dir = str(run.path)
    if not run.config.exists():
        provenance = {**origin(), "overrides": overrides, "rerun_of": rerun_of}
        run.code_diff.write_text(_git("diff", "HEAD") or "")
        stored = {**to_plain(config), "provenance": provenance}
        replace_text(run.config, yaml.safe_dump(stored, sort_keys=False))
    return run


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        plain = yaml.safe_load(file.read_text())
    except OSError as error:
        raise Refused(f"{file.parent}: not a run: {error.strerror}: {file}") from None
    except yaml.YAMLError as error:
        raise Refused(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise Refused(f"{file}: not a config")
    return plain


def _create_new(parent: Path) -> Path:
    """Make ``<UTC time>-<4 random letters>`` under ``parent``; no two callers get the same."""
    parent.mkdir(parents=True, exist_ok=True)
    letters = random.SystemRandom()
    while True:
        name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        suffix = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=4))
        try:
            (path := (parent / f"{name}-{suffix}").absolute()).mkdir()
        except FileExistsError:
            continue
        return path


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


def origin() -> dict[str, Any]:
    """The code that is about to run: versions, and the git state of the folder started from."""
    status = _git("status", "--porcelain")
    return {
        "versions": versions(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": status.splitlines() if status else [],
        "git_changes_sha256": _changes_digest(),
    }


def _changes_digest() -> str | None:
    """A hash of what the folder's code has that its commit has not; None outside of git."""
    if (diff := _git("diff", "HEAD")) is None:
        return None
    digest = sha256(diff.encode())
    for name in (_git("ls-files", "--others", "--exclude-standard") or "").splitlines():
        if name.endswith((".py", ".yaml")) and (file := Path(name)).is_file():
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes."""
    return {"python": python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout if arguments[0] == "diff" else done.stdout.strip()
