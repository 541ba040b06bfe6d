"""Lines that a full disk does not take are written later, by the next start if need be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.machine import small_disk

from ddptrain.observe.loggers import JsonLines, read_json_lines

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root alone")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", mebibytes=1) as folder:
        yield folder


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"0" * 4096):
            pass
    return filler


def steps(file: Path) -> list[int]:
    return [line["step"] for line in read_json_lines(file)]


def write(lines: JsonLines, first: int, last: int, fails: bool) -> None:
    for step in range(first, last + 1):
        if fails:
            with pytest.raises(OSError, match="No space left"):
                lines.log(step, "train", {"loss": 0.5, "padding": 10.0**50})
        else:
            lines.log(step, "train", {"loss": 0.5, "padding": 10.0**50})


def test_lines_wait_for_room(disk: Path, tmp_path: Path) -> None:
    lines = JsonLines(disk / "lines", 0, tmp_path / "spill")
    filler = fill(disk)
    write(lines, 1, 20, fails=True)
    filler.unlink()
    write(lines, 21, 21, fails=False)
    assert steps(disk / "lines") == list(range(1, 22))
    assert not (tmp_path / "spill").read_bytes()


def test_the_next_start_writes_what_the_last_one_could_not(disk: Path, tmp_path: Path) -> None:
    """Up to the step that it goes on from; the disk may still be full then."""
    lines = JsonLines(disk / "lines", 0, tmp_path / "spill")
    filler = fill(disk)
    write(lines, 1, 20, fails=True)  # and it is killed
    still = JsonLines(disk / "lines", 17, tmp_path / "spill")
    assert still.last_step == 17
    write(still, 18, 19, fails=True)  # and this one as well
    filler.unlink()
    last = JsonLines(disk / "lines", 18, tmp_path / "spill")
    write(last, 19, 21, fails=False)
    last.close()
    assert steps(disk / "lines") == list(range(1, 22))
