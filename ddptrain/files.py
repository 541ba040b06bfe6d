"""Writing files so that a crash at any instant leaves the old content or the new, whole."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Give ``file`` a new content that is on disk before the old one is gone."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    flush(temporary)
    temporary.replace(file)
    flush(file.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
