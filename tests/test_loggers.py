"""Lines that a full disk does not take are written later, by the next start if need be."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos.machine import small_disk

from ddptrain.observe.loggers import JsonLines, TensorBoard, read_json_lines
from ddptrain.observe.logs import Beside
from ddptrain.observe.observer import History
from ddptrain.run_directory import RunDirectory

FORK = multiprocessing.get_context("fork")
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root alone")
HEADER = {"step": 0, "names": ["weight"]}


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


@contextlib.contextmanager
def out_of_reach(folder: Path) -> Iterator[None]:
    """While a file is in its place, nothing under ``folder`` can be opened."""
    aside = folder.rename(folder.with_name("aside"))
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


def test_nobody_waits_for_a_log_whose_disk_hangs(tmp_path: Path) -> None:
    """A pipe that is full takes no more either, until somebody reads it."""
    file = tmp_path / "log"
    os.mkfifo(file)
    disk = os.open(file, os.O_RDWR)
    log = Beside(file)
    lines = [f"{number} {'-' * 100}" for number in range(2000)]
    for line in lines:
        log.handle(logging.makeLogRecord({"msg": line}))
    log.flush()  # for a while
    with os.fdopen(disk, "r") as stream:
        assert [stream.readline().strip() for _ in lines] == lines
        log.handle(logging.makeLogRecord({"msg": "last"}))
        log.flush()
        assert stream.readline() == "last\n"


def write(lines: JsonLines, first: int, last: int, fails: bool) -> None:
    for step in range(first, last + 1):
        if fails:
            with pytest.raises(OSError, match="No space left"):
                lines.log(step, "train", {"loss": 0.5, "padding": 10.0**50})
        else:
            lines.log(step, "train", {"loss": 0.5, "padding": 10.0**50})


@is_root
def test_lines_wait_for_room(disk: Path, tmp_path: Path) -> None:
    lines = JsonLines(disk / "lines", 0, tmp_path / "spill")
    filler = fill(disk)
    write(lines, 1, 20, fails=True)
    filler.unlink()
    write(lines, 21, 21, fails=False)
    assert steps(disk / "lines") == list(range(1, 22))
    assert not (tmp_path / "spill").read_bytes()


@is_root
def test_the_next_start_writes_what_the_last_one_could_not(disk: Path, tmp_path: Path) -> None:
    """Up to the step that it goes on from; the disk may still be full then."""
    lines = JsonLines(disk / "lines", 0, tmp_path / "spill")
    filler = fill(disk)
    write(lines, 1, 20, fails=True)  # and it is killed
    still = JsonLines(disk / "lines", 17, tmp_path / "spill")
    write(still, 18, 19, fails=True)  # and this one as well
    filler.unlink()
    last = JsonLines(disk / "lines", 18, tmp_path / "spill")
    write(last, 19, 21, fails=False)
    last.close()
    assert steps(disk / "lines") == list(range(1, 22))


def test_a_kill_at_any_moment_loses_no_line_that_is_kept_in_memory(tmp_path: Path) -> None:
    kept = 0
    for _ in range(20):
        told = FORK.Value("i", 0, lock=False)
        process = FORK.Process(target=_keep_lines, args=[tmp_path, told])
        process.start()
        while told.value < 20:
            assert process.is_alive()
        time.sleep(random.uniform(0, 0.003))  # or it would always be at the same moment
        process.kill()
        process.join()
        found = steps(tmp_path / "spill")
        assert found == list(range(1, len(found) + 1))
        assert len(found) >= told.value
        kept += len(found)
    assert kept >= 20 * 20


def _keep_lines(folder: Path, told: Any) -> None:
    lines = JsonLines(folder / "is" / "away", 0, folder / "spill")
    for step in range(1, 100_000):
        with contextlib.suppress(OSError):
            lines.write({"step": step, "padding": "-" * 20_000})
        told.value = step


def test_lines_of_starts_that_never_reached_the_disk_wait_for_one_that_does(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(JsonLines(folder / "lines", 0, tmp_path / "spill"), 1, 3, fails=False)
    with out_of_reach(folder):
        for resumed_at in (3, 5, 4, 6, 7):
            lines = JsonLines(folder / "lines", resumed_at, tmp_path / "spill")
            for step in (resumed_at + 1, resumed_at + 2):
                with pytest.raises(OSError, match="lines"):
                    lines.write({"step": step})
    JsonLines(folder / "lines", 9, tmp_path / "spill").close()
    assert steps(folder / "lines") == list(range(1, 10))
    assert not (tmp_path / "spill").read_bytes()


def recorded(folder: Path, resumed_at: int) -> JsonLines:
    record = {"step": resumed_at, "hash": "a"}
    return JsonLines(folder / "lines", resumed_at, folder.with_name("spill"), HEADER, record)


@pytest.mark.parametrize("is_new", [True, False])
def test_what_a_file_begins_with_shows_when_it_can_be_opened(tmp_path: Path, is_new: bool) -> None:
    """It is neither missing nor there twice, and nor is the line of the step resumed at."""
    folder = tmp_path / "run"
    folder.mkdir()
    if not is_new:
        first = recorded(folder, 0)
        for step in range(1, 8):
            first.write({"step": step, "hash": "a"})
    with out_of_reach(folder):
        later = recorded(folder, 5)
        with pytest.raises(OSError, match="lines"):
            later.write({"step": 6, "hash": "a"})
    later.write({"step": 7, "hash": "a"})
    first_steps = [0] if is_new else [0, 1, 2, 3, 4, 5]
    assert steps(folder / "lines") == [*first_steps, 6, 7]
    assert read_json_lines(folder / "lines")[0] == HEADER
    lost = recorded(folder, 9)
    lost.flush()
    assert steps(folder / "lines") == [*first_steps, 6, 7, 9]


def test_a_start_counts_although_it_could_not_be_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()

    def start(step: int) -> History:
        history = History(run)
        history.ranks_before()
        history.begin(step, world_size=2, known=step + 3)
        return history

    start(0)
    with out_of_reach(run.path):
        for step in (4, 6):
            with pytest.raises(OSError, match="attempts"):
                start(step)  # and it is killed
        last = History(run)
        last.ranks_before()
        with pytest.raises(OSError, match="attempts"):
            last.begin(8, world_size=2, known=11)
    last.write()
    for history in (last, start(12)):
        assert history.totals()["restarts"] == len(history.starts) - 1
        assert history.totals()["lost_steps"] == 3 * len(history.starts)
    assert [line["step"] for line in read_json_lines(run.attempts)] == [0, 4, 6, 8, 12]
    for memory in run.memories():
        shutil.rmtree(memory, ignore_errors=True)


@is_root
def test_a_full_disk_has_no_thread_of_tensorboard_show_a_traceback(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer raises what the thread has failed with; other threads are told of as ever."""
    told: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: told.append(str(failed.exc_value)))
    board = TensorBoard(disk / "tensorboard", 0, "config")
    board.log(1, "train", {"loss": 1.0})
    fill(disk)

    def go_on() -> None:
        for step in range(2, 3000):
            board.log(step, "train", {"loss": 1.0})
            assert board.opened is not None
            board.opened.flush()

    with pytest.raises(OSError, match="No space left"):
        go_on()
    broken = threading.Thread(target=lambda: [][0])
    broken.start()
    broken.join()
    assert told == ["list index out of range"]
