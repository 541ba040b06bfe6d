"""Where checkpoints can lie: a disk of this machine or a shared one, or any path fsspec knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from hashlib import file_digest
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from xxhash import xxh3_128, xxh3_128_hexdigest

from ddptrain.errors import Refused
from ddptrain.failpoints import reach
from ddptrain.files import flush

CHECKSUM = "xxh3_128"
"""The name of the hash: no defence against people, but against disks, at the speed of memory."""
Digest = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


class Medium(Protocol):
    """Files by a path of two parts, a checkpoint's folder and a name, under one root.

    What a method has done is durable when it returns. Raises ``OSError``, as files do.
    """

    def folders(self) -> list[str]:
        """The names of the folders that hold a file; they need not be checkpoints."""

    def holds(self, folder: str, name: str) -> bool:
        """Whether there is such a file."""

    def read(self, folder: str, name: str) -> bytes:
        """The content of a file."""

    def digest(self, folder: str, name: str) -> Digest:
        """The length and checksum of a file, read anew."""

    def begin(self) -> None:
        """Make the root, if it is not there."""

    def make(self, folder: str) -> None:
        """Make an empty folder; what was in one of that name is gone."""

    def put(self, folder: str, name: str, source: Path, promised: Digest) -> None:
        """Copy a file from this machine. Raises ``OSError`` if not all of it arrived."""

    def write(self, folder: str, name: str, content: bytes) -> None:
        """Give a file a content: after a crash it has the old one or the new, whole."""

    def remove(self, folder: str, name: str) -> None:
        """Delete one file."""

    def clear(self, folder: str) -> None:
        """Delete a folder and all in it."""

    def where(self, folder: str, name: str = "") -> str:
        """The path as people write it."""


def digest_of(content: bytes | mmap) -> Digest:
    """The length and checksum of what a file holds."""
    return {"bytes": len(content), CHECKSUM: xxh3_128_hexdigest(content)}


class Disk:
    """A folder of a file system. Contents are flushed before names, names before what they free."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self) -> list[str]:
        return [path.name for path in self.root.iterdir()] if self.root.is_dir() else []

    def holds(self, folder: str, name: str) -> bool:
        return (self.root / folder / name).exists()

    def read(self, folder: str, name: str) -> bytes:
        return (self.root / folder / name).read_bytes()

    def digest(self, folder: str, name: str) -> Digest:
        with (self.root / folder / name).open("rb") as stream:
            digest = file_digest(stream, xxh3_128).hexdigest()
            return {"bytes": os.fstat(stream.fileno()).st_size, CHECKSUM: digest}

    def begin(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def make(self, folder: str) -> None:
        if (self.root / folder).exists():
            shutil.rmtree(self.root / folder)
        is_new = not self.root.exists()
        (self.root / folder).mkdir(parents=True)
        reach("save: folder made")
        flush(self.root)
        if is_new:
            flush(self.root.parent)
        reach("save: folder's parent flushed")

    def put(self, folder: str, name: str, source: Path, promised: Digest) -> None:
        target = self.root / folder / name
        shutil.copyfile(source, target)
        reach("save: file copied")
        flush(target)
        reach("save: file flushed")
        found = self.digest(folder, name)
        if found != promised:
            raise OSError(0, f"read back as {found}, written as {promised}", str(target))

    def write(self, folder: str, name: str, content: bytes) -> None:
        target = self.root / folder / name
        temporary = target.with_name(f".{name}.tmp")
        temporary.write_bytes(content)
        flush(temporary)
        reach("save: manifest written beside")
        flush(target.parent)  # the files that the content speaks of come before it
        reach("save: folder flushed")
        temporary.replace(target)
        reach("save: manifest renamed")
        flush(target.parent)
        reach("save: manifest's folder flushed")

    def remove(self, folder: str, name: str) -> None:
        (self.root / folder / name).unlink(missing_ok=True)
        reach("prune: manifest removed")
        flush(self.root / folder)
        reach("prune: manifest's folder flushed")

    def clear(self, folder: str) -> None:
        for file in (self.root / folder).iterdir():
            file.unlink()
            reach("prune: one file removed")
        (self.root / folder).rmdir()
        reach("prune: folder removed")
        flush(self.root)

    def where(self, folder: str, name: str = "") -> str:
        return str(self.root / folder / name)


class Spare(Disk):
    """A folder that is as good as empty while its file system cannot be read."""

    def folders(self) -> list[str]:
        with suppress(OSError):
            return super().folders()
        return []

    def holds(self, folder: str, name: str) -> bool:
        with suppress(OSError):
            return super().holds(folder, name)
        return False


def _as_disks_do(method: Method) -> Method:
    """Raise ``OSError`` for whatever a library of fsspec's raises: no network, no credentials."""

    @wraps(method)
    def guarded(self: Remote, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except OSError:
            raise
        except Exception as error:
            raise OSError(0, f"{type(error).__name__}: {error}", self.url) from error

    return cast("Method", guarded)


class Remote:
    """A path that fsspec knows, such as ``s3://bucket/runs/1``: an object appears whole."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise Refused(f"checkpoint.dir={url}: {error}") from None
        self.url = url.rstrip("/")
        self.root = self.root.rstrip("/")

    @_as_disks_do
    def folders(self) -> list[str]:
        self.files.invalidate_cache()
        found = self.files.find(self.root)
        prefix = len(self.root.lstrip("/")) + 1
        return sorted({path.lstrip("/")[prefix:].partition("/")[0] for path in found})

    @_as_disks_do
    def holds(self, folder: str, name: str) -> bool:
        return bool(self.files.exists(self._path(folder, name)))

    @_as_disks_do
    def read(self, folder: str, name: str) -> bytes:
        return bytes(self.files.cat_file(self._path(folder, name)))

    @_as_disks_do
    def digest(self, folder: str, name: str) -> Digest:
        return digest_of(self.read(folder, name))

    @_as_disks_do
    def begin(self) -> None:
        self.files.makedirs(self.root, exist_ok=True)

    @_as_disks_do
    def make(self, folder: str) -> None:
        self.clear(folder)
        self.files.makedirs(self._path(folder, ""), exist_ok=True)

    @_as_disks_do
    def put(self, folder: str, name: str, source: Path, promised: Digest) -> None:
        self.files.put_file(str(source), self._path(folder, name))
        reach("remote: file put")
        found = self.digest(folder, name)
        if found != promised:
            path = self.where(folder, name)
            raise OSError(0, f"read back as {found}, written as {promised}", path)

    @_as_disks_do
    def write(self, folder: str, name: str, content: bytes) -> None:
        self.files.pipe_file(self._path(folder, name), content)
        reach("remote: manifest written")

    @_as_disks_do
    def remove(self, folder: str, name: str) -> None:
        if self.holds(folder, name):
            self.files.rm_file(self._path(folder, name))
            reach("remote: manifest removed")

    @_as_disks_do
    def clear(self, folder: str) -> None:
        self.files.invalidate_cache()
        for path in self.files.find(self._path(folder, "")):
            self.files.rm_file(path)
            reach("remote: one file removed")
        if self.files.isdir(self._path(folder, "")):
            self.files.rmdir(self._path(folder, ""))

    def where(self, folder: str, name: str = "") -> str:
        return "/".join(part for part in (self.url, folder, name) if part)

    def _path(self, folder: str, name: str) -> str:
        return "/".join(part for part in (self.root, folder, name) if part)
