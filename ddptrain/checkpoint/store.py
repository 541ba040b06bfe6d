"""Checkpoint directories: each appears complete and flushed, or not at all, and is verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from re import fullmatch
from typing import Any

from ddptrain.errors import CheckpointError
from ddptrain.files import flush, replace_text

MANIFEST = "manifest.json"
Writer = Callable[[Path], None]


class Store:
    """Checkpoints by step under one folder: ``step-00000200/`` with files and a manifest.

    A checkpoint is written under a temporary name in the same folder; each file is flushed, the
    manifest with the checksums comes last, then the folder is flushed and renamed. A name that
    begins with a dot is never a checkpoint, and is removed before the next one is written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = (file.parent.name for file in self.root.glob(f"step-*/{MANIFEST}"))
        return sorted(int(name[5:]) for name in names if fullmatch(r"step-\d{8,}", name))

    def manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest. Raises ``CheckpointError`` if it cannot be read."""
        file = self.folder(step) / MANIFEST
        try:
            content: dict[str, Any] = json.loads(file.read_bytes())
            if content.pop("checksum") != _checksum(content):
                raise ValueError("its checksum does not match: it is damaged")
            if content["step"] != step:
                raise ValueError(f"it does not describe step {step}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: not a manifest: {error}") from error
        return content

    def verify(self, step: int) -> dict[str, Any]:
        """Return the manifest after checking every file's size and checksum against it."""
        manifest = self.manifest(step)
        for name, promised in manifest["files"].items():
            file = self.folder(step) / name
            try:
                found = _describe(file)
            except OSError as error:
                raise CheckpointError(f"{file}: {error}") from error
            if found != promised:
                raise CheckpointError(f"{file}: expected {promised}, found {found}: it is damaged")
        return manifest

    def write(self, step: int, writers: Mapping[str, Writer], manifest: dict[str, Any]) -> None:
        """Write a checkpoint; a damaged one of the same step is replaced, a good one kept."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        if not self._is_whole(step):
            self._write(step, writers, manifest)
        replace_text(self.root / "latest", self.folder(step).name + "\n")

    def _write(self, step: int, writers: Mapping[str, Writer], manifest: dict[str, Any]) -> None:
        temporary = self.root / f".{self.folder(step).name}.tmp"
        temporary.mkdir()
        files = {}
        for name, write in writers.items():
            write(temporary / name)
            flush(temporary / name)
            files[name] = _describe(temporary / name)
        # As it will be read: JSON makes strings of integer keys, and lists of tuples.
        content = json.loads(json.dumps({"step": step, "files": files, **manifest}))
        content["checksum"] = _checksum(content)
        replace_text(temporary / MANIFEST, json.dumps(content, indent=1))
        flush(temporary)
        if self.folder(step).exists():  # damaged, or it would not be written again
            self.delete(step)
        temporary.rename(self.folder(step))
        flush(self.root)

    def _is_whole(self, step: int) -> bool:
        try:
            self.verify(step)
        except CheckpointError:
            return False
        return True

    def delete(self, step: int) -> None:
        """Delete a checkpoint; renamed first, so that half of one is never seen."""
        doomed = self.root / f".{self.folder(step).name}.deleted"
        self.folder(step).rename(doomed)
        shutil.rmtree(doomed)

    def _remove_leftovers(self) -> None:
        for leftover in self.root.glob(".step-*"):
            shutil.rmtree(leftover)


def _checksum(manifest: dict[str, Any]) -> str:
    """Of what a manifest says, not of how it is written: keys sorted, without spaces."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": file_digest(stream, "sha256").hexdigest()}
