"""The screen: it may be a pipe that nobody reads, a closed terminal, a file on a full disk."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def show_cursor() -> None:
    """Undo what a live bar has done to the terminal, if it could not do so itself."""
    if sys.stdout.isatty():
        with suppress(OSError):
            os.write(1, b"\r\n\x1b[?25h")


def short(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print ``text`` to ``stream``, or to stdout; one that is gone ends nothing."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # `| head`, a pager that was closed
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # for what follows, and for Python's own last flush
            os.close(nowhere)
    except OSError:
        pass
