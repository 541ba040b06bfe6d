"""Killed between any two file operations, a run goes on: with its newest state, never from zero."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddptrain import failpoints
from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.media import Disk, Remote
from ddptrain.checkpoint.memory import Memory
from ddptrain.checkpoint.recovery import recover
from ddptrain.checkpoint.retention import Retention
from ddptrain.checkpoint.saved import MODEL, OPTIMIZER
from ddptrain.checkpoint.store import Store
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.state import State

FORK = multiprocessing.get_context("fork")
STEPS = 12
SAFE = 4
"""Saved by a process that nobody kills."""


def ranks() -> Ranks:
    from datetime import timedelta

    return Ranks(Place(), torch.device("cpu"), timedelta(minutes=1))


def build(folder: Path, is_remote: bool = False, node: str = "") -> Checkpoints:
    memory = Memory([folder / f"memory{node}", folder / f"beside{node}"])
    disk = folder / "checkpoints"
    store = Store(Remote(f"file://{disk}") if is_remote else Disk(disk))
    return Checkpoints(store, memory, Retention(keep_last=2), "val/loss", {})


def tensors(step: int) -> dict[str, Tensor]:
    return {"weight": torch.full((300,), float(step)), "count": torch.tensor(step)}


def save(kept: Checkpoints, step: int, durable: bool) -> None:
    numbers: dict[str, Any] = {"metrics": {}, "step_numbers": {}, "optimizer_numbers": {}}
    kept.save(State(step, {MODEL: tensors(step), OPTIMIZER: tensors(-step)}, numbers), durable)
    kept.settle()


def train(folder: Path, first: int, last: int, point: str = "", hit: int = 0) -> None:
    """Go on from what is there, save every step in memory and every other one in the store.

    What is saved for sure is noted by name.
    """
    failpoints._armed, failpoints._left = point, hit
    kept = build(folder, is_remote=point.startswith("remote:"))
    saved = recover(kept, ranks())
    assert (saved is None) == (first == 0)
    failpoints.reach("restore: put back")
    for step in range(saved.step + 1 if saved else 1, last + 1):
        save(kept, step, durable=step % 2 == 0)
        for name in ("snapshot", "durable") if step % 2 == 0 else ("snapshot",):
            (folder / name).write_text(str(step))


def in_a_process(*arguments: Any) -> int | None:
    process = FORK.Process(target=train, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def check(folder: Path, at_least: int) -> int:
    """All that is saved for sure is found, here and on another node; return the newest step."""
    other = whole(folder, node="-of-another")
    assert other >= int((folder / "durable").read_text())
    here = whole(folder)
    assert here >= max(at_least, int((folder / "snapshot").read_text()))
    return here


def whole(folder: Path, node: str = "") -> int:
    """A whole state is found, and it is what was saved; return its step."""
    saved = recover(build(folder, node=node), ranks())
    assert saved is not None
    for name, sign in ((MODEL, 1), (OPTIMIZER, -1)):
        for key, expected in tensors(sign * saved.step).items():
            assert torch.equal(saved.tensors(name)[key], expected)
    return saved.step


@pytest.mark.parametrize("point", failpoints.POINTS)
def test_a_kill_at_any_instant_loses_at_most_the_step_being_saved(
    tmp_path: Path, point: str
) -> None:
    assert in_a_process(tmp_path, 0, SAFE) == 0
    damaged = point in ("save: old manifest removed", "save: old folder removed")
    killed = 0
    for hit in (1, 2, 5):
        before = check(tmp_path, SAFE)
        if damaged:  # there has to be one in the way
            step = before + 2 - before % 2
            folder = tmp_path / f"checkpoints/step-{step:08d}"
            folder.mkdir()
            (folder / "manifest.json").write_text("{}")
        ended = in_a_process(tmp_path, before, before + STEPS, point, 1 if damaged else hit)
        killed += ended == -signal.SIGKILL
        assert ended in (0, -signal.SIGKILL)
        check(tmp_path, before)
    assert killed, f"{point} was never reached"
    before = check(tmp_path, SAFE)
    assert in_a_process(tmp_path, before, before + 4) == 0
    assert check(tmp_path, before + 4) == before + 4
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    steps = [step for step in range(before + 4, 0, -1) if step % 2 == 0][:2]
    assert left == {"latest", *(f"step-{step:08d}" for step in steps)}


def test_a_lost_node_costs_what_was_not_yet_durable(tmp_path: Path) -> None:
    """Without the memory, the newest in the store counts."""
    assert in_a_process(tmp_path, 0, 7) == 0
    assert (whole(tmp_path), whole(tmp_path, node="-of-another")) == (7, 6)


def test_there_are_points_enough_and_none_is_armed_by_itself() -> None:
    assert len(failpoints.POINTS) >= 20
    assert os.environ.get(failpoints.VARIABLE) is None
    assert not failpoints._armed
