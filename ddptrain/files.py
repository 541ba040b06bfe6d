"""Writing files so that a crash at any instant leaves the old content or the new, whole."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LASTING = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError
)  # fmt: skip
"""Errors of a file system that stay until somebody does something."""

logger = logging.getLogger(__name__)


def may_pass(error: BaseException | None) -> bool:
    """Whether an error is of a disk or a network that may be back at the next try.

    What a decoder raises of a file that is corrupt may be an ``OSError`` too, without a number.
    """
    if not isinstance(error, OSError) or isinstance(error, LASTING):
        return False
    return error.errno is not None or isinstance(error, ConnectionError | TimeoutError)


def replace_text(file: Path, text: str) -> None:
    """Give ``file`` a new content that is on disk before the old one is gone."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, content: bytes) -> None:
    """Give ``file`` a new content that is on disk before the old one is gone."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        flush(temporary)
        temporary.replace(file)
    except OSError:  # on a full disk half of it is in the way
        with suppress(OSError):
            temporary.unlink()
        raise
    flush(file.parent)


def write_over(file: Path, text: str) -> None:
    """Give ``file`` a content of the same length in place, which a full disk allows as well."""
    if not file.exists() or file.stat().st_size != len(text.encode()):
        replace_text(file, text)
        return
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.pwrite(descriptor, text.encode(), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; empty if there is none, or, with a warning, if it is damaged."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        logger.warning("%s is damaged, and passed over: %s", file, error)
        return {}


def make_new(parent: Path) -> Path:
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
