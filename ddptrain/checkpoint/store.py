"""Checkpoints by step in one place: each is whole or does not count, and every bit is verified."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from re import fullmatch
from typing import Any

from xxhash import xxh3_128

from ddptrain.checkpoint.media import Digest, Medium, digest_of
from ddptrain.errors import CheckpointError, DamagedError, Superseded
from ddptrain.failpoints import reach

MANIFEST = "manifest.json"
LATEST = "latest"
OWNER = ".written-by"
"""Not the name that a run's directory has for it: that may be the same folder."""

logger = logging.getLogger(__name__)


def folder_of(step: int) -> str:
    return f"step-{step:08d}"


class Store:
    """Checkpoints as folders ``step-00000200/`` of files and a manifest with their checksums.

    The manifest is what makes a folder a checkpoint: it is written last and removed first, so
    that at every instant a checkpoint is whole or is none. It needs no rename of a folder, which
    object stores do not have.
    """

    def __init__(
        self,
        medium: Medium,
        guard: Callable[[], None] | None = None,
        token: str | None = None,
    ) -> None:
        """``guard`` raises if this process may no longer write; it is asked before every change.

        With the ``token`` of its start, ``<run>:<start>``, so does a later start of which only the
        store knows.
        """
        self.medium = medium
        self.may_write = guard or _no_guard
        self.token = token
        self.is_claimed = False

    def claim(self) -> bool:
        """Have the store for this start; return False if it is away."""
        try:
            self._sign()
        except OSError as error:
            logger.warning("%s: %s", self.medium.where(""), error)
        return self.is_claimed

    def guard(self) -> None:
        """Raise ``Superseded`` if another start has taken over while this one was cut off.

        A store that was away when this one began is claimed now, unless another run has it: which
        start of one run may write, its directory says.
        """
        self.may_write()
        if self.token is None:
            return
        owner = self._owner()
        same = self.token if self.is_claimed else self.token.partition(":")[0]
        if owner is not None and not owner.startswith(same):
            raise Superseded(
                f"{self.medium.where('')}: another start has taken over this checkpoint.dir; "
                "this one writes no more"
            )
        if owner != self.token:
            self._sign()

    def _sign(self) -> None:
        if self.token is not None:
            self.medium.begin()
            self.medium.write("", OWNER, self.token.encode())
        self.is_claimed = True

    def _owner(self) -> str | None:
        try:
            return self.medium.read("", OWNER).decode()
        except FileNotFoundError:
            return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return self.contents()[0]

    def contents(self) -> tuple[list[int], list[str]]:
        """The steps that have a checkpoint, and folders whose writing or deleting was cut short."""
        names = [name for name in self.medium.folders() if fullmatch(r"step-\d{8,}", name)]
        whole = {name for name in names if self.medium.holds(name, MANIFEST)}
        return sorted(int(name[5:]) for name in whole), sorted({*names} - whole)

    def has_held_one(self) -> bool:
        """Whether there ever was a whole checkpoint here: that is when ``latest`` is written."""
        return self.medium.holds("", LATEST)

    def where(self, step: int, name: str = "") -> str:
        return self.medium.where(folder_of(step), name)

    def manifest(self, step: int) -> dict[str, Any]:
        """Return the manifest. Raises ``CheckpointError`` if it cannot be read now, or ever."""
        try:
            text = self.medium.read(folder_of(step), MANIFEST)
        except OSError as error:
            raise CheckpointError(f"{self.where(step, MANIFEST)}: {error}") from error
        try:
            content: dict[str, Any] = json.loads(text)
            if content.pop("checksum") != checksum(content):
                raise ValueError("its checksum does not match: it is damaged")
            if content["step"] != step:
                raise ValueError(f"it does not describe step {step}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{self.where(step, MANIFEST)}: not a manifest: {error}") from error
        return content

    def verify(self, step: int) -> dict[str, Any]:
        """Return the manifest after checking every file's size and checksum against it.

        Raises ``CheckpointError`` if one cannot be read now, ``DamagedError`` if it never will.
        """
        manifest = self.manifest(step)
        for name, promised in manifest["files"].items():
            try:
                found = self.medium.digest(folder_of(step), name)
            except OSError as error:
                raise self._unread(step, name, error) from error
            self._compare(step, name, found, promised)
        return manifest

    def read(self, step: int, name: str, promised: Digest) -> bytes:
        """Return a file's content. Raises ``CheckpointError`` if it is not what was written."""
        try:
            content = self.medium.read(folder_of(step), name)
        except OSError as error:
            raise self._unread(step, name, error) from error
        self._compare(step, name, digest_of(content), promised)
        return content

    def _compare(self, step: int, name: str, found: Digest, promised: Digest) -> None:
        if found != promised:
            raise DamagedError(
                f"{self.where(step, name)}: expected {promised}, found {found}: it is damaged"
            )

    def _unread(self, step: int, name: str, error: OSError) -> CheckpointError:
        kind = DamagedError if isinstance(error, FileNotFoundError) else CheckpointError
        return kind(f"{self.where(step, name)}: {error}")

    def write(self, step: int, files: Mapping[str, Path], manifest: dict[str, Any]) -> None:
        """Copy ``files``, whose checksums ``manifest`` has, and make them the checkpoint of a step.

        Where there is a whole one its files stay, which a crash must not find half replaced: if
        they are the same, the manifest is replaced. A damaged one goes.
        """
        reach("save: begun")
        self.guard()
        folder = folder_of(step)
        there = self._whole(step)
        if there is None:
            self._copy(folder, files, manifest)
        if there in (None, manifest["files"]):
            self.medium.write(folder, MANIFEST, sealed(manifest))
        self.medium.write("", LATEST, f"{folder}\n".encode())
        reach("save: latest moved")

    def _copy(self, folder: str, files: Mapping[str, Path], manifest: dict[str, Any]) -> None:
        if self.medium.holds(folder, MANIFEST):
            self.medium.remove(folder, MANIFEST)
            reach("save: old manifest removed")
            self.medium.clear(folder)
            reach("save: old folder removed")
        self.medium.make(folder)
        try:
            for name, source in files.items():
                self.medium.put(folder, name, source, manifest["files"][name])
        except OSError as error:
            if error.errno in (ENOSPC, EDQUOT):  # there is no room for half a checkpoint
                with suppress(OSError):
                    self.medium.clear(folder)
            raise
        self.guard()
        reach("save: verified")

    def holds(self, step: int, files: Mapping[str, Digest]) -> bool:
        """Whether there is a whole checkpoint of ``step`` of exactly these files."""
        return self._whole(step) == files

    def _whole(self, step: int) -> dict[str, Digest] | None:
        """The digests of the files of a checkpoint, None if there is none or it is damaged."""
        try:
            return dict(self.verify(step)["files"])
        except CheckpointError:
            return None

    def delete(self, step: int) -> None:
        """Delete a checkpoint; its manifest first, so that half of one is never seen."""
        self.guard()
        reach("prune: begun")
        self.medium.remove(folder_of(step), MANIFEST)
        self.medium.clear(folder_of(step))
        reach("prune: ended")

    def tidy(self, but: int) -> None:
        """Delete folders without a manifest, which a crash has left; not that of step ``but``."""
        for name in self.contents()[1]:
            if name != folder_of(but):
                self.medium.clear(name)


def _no_guard() -> None:
    """Nobody else can write here."""


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is written, with a checksum of its own."""
    # As it will be read: JSON makes strings of integer keys, and lists of tuples.
    content = json.loads(json.dumps(manifest))
    return json.dumps({**content, "checksum": checksum(content)}, indent=1).encode()


def checksum(manifest: dict[str, Any]) -> str:
    """Of what a manifest says, not of how it is written: keys sorted, without spaces."""
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return xxh3_128(canonical.encode()).hexdigest()
