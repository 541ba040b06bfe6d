"""The last step is saved in memory whatever is in the way: a full one, damage, a slow disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from chaos.machine import small_disk

from ddptrain.checkpoint import leavings, writer
from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.media import Disk
from ddptrain.checkpoint.memory import SLOTS, Memory
from ddptrain.checkpoint.retention import Retention
from ddptrain.checkpoint.saved import MODEL
from ddptrain.checkpoint.store import Store
from ddptrain.claim import Claim
from ddptrain.errors import CheckpointError
from ddptrain.state import State

FORK = multiprocessing.get_context("fork")
MEGABYTE = 2**20
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs is mounted by root alone")


class Slow(Disk):
    """A store that takes its time over every file."""

    def put(self, folder: str, name: str, source: Path, promised: dict[str, Any]) -> None:
        time.sleep(3.0)
        super().put(folder, name, source, promised)


class Hung(Disk):
    """A store that neither takes a file nor fails, until it comes back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.comes_back = threading.Event()

    def put(self, folder: str, name: str, source: Path, promised: dict[str, Any]) -> None:
        self.comes_back.wait()
        super().put(folder, name, source, promised)


class Away(Disk):
    """A store that takes its time to say that it is away, until it is back."""

    tries = 0
    is_back = False

    def put(self, folder: str, name: str, source: Path, promised: dict[str, Any]) -> None:
        if self.is_back:
            return super().put(folder, name, source, promised)
        self.tries += 1
        time.sleep(1.0)
        raise OSError("away")


def build(folder: Path, medium: Disk | None = None, shared: Path | None = None) -> Checkpoints:
    memory = Memory([(shared or folder) / "memory", folder / "beside"])
    store = Store(medium or Disk(folder / "checkpoints"))
    return Checkpoints(store, memory, Retention(keep_last=2), "val/loss", {})


def state(step: int, megabytes: float = 0.1) -> State:
    weights = torch.full((int(megabytes * MEGABYTE / 4),), float(step))
    numbers: dict[str, Any] = {"metrics": {}, "step_numbers": {}, "optimizer_numbers": {}}
    return State(step, {MODEL: {"weight": weights}}, numbers)


def soon(durable: bool) -> tuple[float, float, Callable[[], bool]]:
    now = time.monotonic()
    return now + 20, now + 2, lambda: durable


def holds(where: str | None, step: int, megabytes: float = 0.1) -> bool:
    """Whether there is a whole checkpoint of ``step`` at ``where``, with that step's weights."""
    assert where is not None
    folder = Path(where)
    saved = build(folder.parent).read(step, Store(Disk(folder.parent)))
    return torch.equal(
        saved.tensors(MODEL)["weight"], state(step, megabytes).files[MODEL]["weight"]
    )


def test_a_damaged_snapshot_of_a_later_step_is_not_taken_for_the_rescue(tmp_path: Path) -> None:
    kept = build(tmp_path)
    kept.save(state(20), durable=False)
    kept.settle()
    file = tmp_path / "memory" / "step-00000020" / MODEL
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert holds(build(tmp_path).rescue(state(15), *soon(False)), 15)


@pytest.mark.parametrize("there", [20, 21])
def test_a_whole_snapshot_of_the_step_or_a_later_one_is_enough(tmp_path: Path, there: int) -> None:
    kept = build(tmp_path)
    kept.save(state(there), durable=False)
    kept.settle()
    where = build(tmp_path).rescue(state(20), *soon(True))
    assert where == str(tmp_path / "checkpoints" / f"step-{there:08d}")
    assert holds(where, there)


def test_a_disk_that_cannot_be_read_keeps_nobody_from_a_rescue(tmp_path: Path) -> None:
    """Snapshots would go there if there were no room in memory."""
    kept = build(tmp_path)
    unreadable = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match="too long"):
        unreadable.is_dir()
    kept.memory = Memory([tmp_path / "memory", unreadable])
    kept.memory.sign(tmp_path, "identity")
    assert holds(kept.rescue(state(15), *soon(False)), 15)


def test_a_snapshot_cut_short_behind_our_back_is_made_anew(tmp_path: Path) -> None:
    """To write to what is no longer there of a mapped file ends a process."""
    process = FORK.Process(target=_cut_and_go_on, args=[tmp_path])
    process.start()
    process.join()
    assert process.exitcode == 0
    assert holds(str(tmp_path / "memory" / "step-00000003"), 3)


def _cut_and_go_on(folder: Path) -> None:
    kept = build(folder)
    for step in (1, 2, 3):
        if step == 3:
            os.truncate(folder / "memory" / "step-00000001" / MODEL, 100)
        kept.save(state(step), durable=False)
        kept.settle()


@root_only
def test_a_full_memory_makes_room_by_older_snapshots(tmp_path: Path) -> None:
    """Those of a dead keeper: a survivor that has none of its own can write only in their place."""
    with small_disk(tmp_path / "shm", 7) as shared:
        process = FORK.Process(target=_keep, args=[tmp_path, shared, (10, 20, 30)])
        process.start()
        process.join()
        assert process.exitcode == 0
        where = build(tmp_path, shared=shared).rescue(state(31, 2.0), *soon(False))
        assert holds(where, 31, 2.0)
        assert where is not None
        assert Path(where).parent == shared / "memory"


def _keep(folder: Path, shared: Path, steps: tuple[int, ...]) -> None:
    kept = build(folder, shared=shared)
    for step in steps:
        kept.save(state(step, 2.0), durable=False)
        kept.settle()


@root_only
def test_where_there_is_no_room_in_memory_it_goes_beside_the_run(tmp_path: Path) -> None:
    """As in a container, whose /dev/shm has 64 MB unless somebody asks for more."""
    with small_disk(tmp_path / "shm", 1) as shared:
        (shared / "filler").write_bytes(b"0" * (MEGABYTE - 4096))
        kept = build(tmp_path, shared=shared)
        kept.memory.sign(tmp_path, "identity")
        kept.save(state(30, 2.0), durable=False)  # snapshots, too
        kept.settle()
        assert kept.memory.root == tmp_path / "beside"
        where = build(tmp_path, shared=shared).rescue(state(31, 2.0), *soon(False))
        assert holds(where, 31, 2.0)
        assert where is not None
        assert Path(where).parent == tmp_path / "beside"


@root_only
@pytest.mark.parametrize(("megabytes", "where"), [(17.8, "shm/memory"), (18.2, "beside")])
def test_a_tenth_of_the_memory_is_left_to_loading_workers(
    tmp_path: Path, megabytes: float, where: str
) -> None:
    with small_disk(tmp_path / "shm", 20) as shared:
        kept = build(tmp_path, shared=shared)
        kept.save(state(1, megabytes), durable=False)
        kept.settle()
        assert kept.memory.root == tmp_path / where
        found = build(tmp_path, shared=shared).rescue(state(2, megabytes), *soon(False))
        assert holds(found, 2, megabytes)


def test_a_rescue_does_not_wait_for_a_checkpoint_on_its_way_to_a_slow_store(tmp_path: Path) -> None:
    kept = build(tmp_path, Slow(tmp_path / "checkpoints"))
    kept.save(state(30), durable=True)
    with kept.writer.changed:
        assert kept.writer.changed.wait_for(lambda: kept.writer.storing is not None, 20)
    where = kept.rescue(state(31), *soon(True))
    assert not kept.writer.has_ended(time.monotonic())
    assert holds(where, 31)
    assert where is not None
    assert Path(where).parent == tmp_path / "memory"


def test_all_slots_in_use_keep_nobody_from_a_rescue(tmp_path: Path) -> None:
    kept = build(tmp_path)
    for slot in kept.memory.slots:
        slot.busy = True
    assert holds(kept.rescue(state(31), *soon(False)), 31)


def test_survivors_of_a_node_save_one_copy_of_each_step(tmp_path: Path) -> None:
    """Four that are at most a step apart: two copies, however many they are."""
    survivors = [
        FORK.Process(target=_rescue, args=[tmp_path, 31 + number % 2, number])
        for number in range(4)
    ]
    for survivor in survivors:
        survivor.start()
    for survivor in survivors:
        survivor.join()
        assert survivor.exitcode == 0
    names = {path.name for path in (tmp_path / "memory").iterdir() if path.is_dir()}
    assert "step-00000032" in names
    assert names <= {"step-00000031", "step-00000032"}


def _rescue(folder: Path, step: int, number: int) -> None:
    taken = []
    kept = build(folder)
    take = kept.memory.take
    kept.memory.take = lambda *given: (taken.append(given), take(*given))[1]  # type: ignore[method-assign]
    assert kept.rescue(state(step), *soon(False)) is not None
    (folder / f"taken-{number}").write_text(str(len(taken)))
    copies = [int(file.read_text()) for file in folder.glob("taken-*")]
    assert sum(copies) <= 2


def test_a_slow_store_holds_up_no_snapshot(tmp_path: Path) -> None:
    """While one is written and another waits, snapshots are taken as ever."""
    kept = build(tmp_path, Slow(tmp_path / "checkpoints"))
    kept.save(state(1), durable=True)
    kept.save(state(2), durable=True)
    for step in range(3, 30):
        kept.save(state(step), durable=False)
    assert kept.writer.storing is not None
    assert kept.writer.storing.step == 1
    kept.settle()
    assert kept.store.steps() == [1, 2]
    assert kept.memory.store.steps()[-1] == 29


def test_a_store_that_is_slow_to_fail_holds_up_nobody(tmp_path: Path) -> None:
    """Checkpoints come faster than it fails; the newest is owed in the end, and is in memory."""
    away = Away(tmp_path / "checkpoints")
    kept = build(tmp_path, away)
    for step in range(1, 21):
        kept.save(state(step), durable=True)
    assert away.tries < 5
    with pytest.raises(CheckpointError, match="the checkpoint of step 20 is not in"):
        kept.writer.settle(seconds=0.0)
    assert kept.memory.store.steps()[-1] == 20
    away.is_back = True
    kept.settle()
    assert kept.store.steps()[-1] == 20


def test_a_store_that_hangs_holds_up_nobody_for_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system does whose server is away: it takes nothing, and does not fail."""
    for name in ("SLOW_SECONDS", "HUNG_SECONDS"):
        monkeypatch.setattr(writer, name, 0.2)
    hung = Hung(tmp_path / "checkpoints")
    kept = build(tmp_path, hung)
    kept.writer.patience = 0.2
    for step in range(1, 21):
        kept.save(state(step), durable=True)
    assert caplog.text.count("the checkpoint of step 1 is not yet written") == 1
    assert "nothing has become durable for" in caplog.text
    with pytest.raises(CheckpointError, match=r"of step 20 is not in .*: one is on its way"):
        kept.writer.settle(seconds=0.0)
    assert kept.memory.store.steps()[-1] == 20
    hung.comes_back.set()
    monkeypatch.undo()
    kept.settle()
    assert kept.store.steps() == [1, 20]


def test_checkpoints_that_cannot_be_pruned_are_written_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = build(tmp_path)
    for step in (1, 2, 3, 4):
        kept.save(state(step), durable=True)
        kept.settle()
        if step == 1:
            (tmp_path / "checkpoints" / "step-00000001" / "folder").mkdir()
    assert kept.store.steps()[-2:] == [3, 4]
    assert caplog.text.count("old checkpoints could not be deleted") == 1


def test_a_store_whose_last_checkpoint_is_damaged_gets_the_next_snapshot(tmp_path: Path) -> None:
    """However long it were until the next one that is to be durable."""
    before = build(tmp_path)
    before.save(state(10), durable=True)
    before.settle()
    os.truncate(tmp_path / "checkpoints" / "step-00000010" / MODEL, 100)
    kept = build(tmp_path)
    kept.scrub()
    assert kept.scrubbing is not None
    kept.scrubbing.join()
    for step in (11, 12):
        kept.save(state(step), durable=False)
        kept.settle()
    assert 11 in kept.store.steps()
    assert 12 not in kept.store.steps()


def test_memory_is_bounded(tmp_path: Path) -> None:
    kept = build(tmp_path)
    for step in range(1, 12):
        kept.save(state(step), durable=step % 3 == 0)
        folders = [path for path in (tmp_path / "memory").iterdir() if path.is_dir()]
        assert len(folders) <= SLOTS
    kept.settle()


def left(folder: Path, age: float, identity: str = "one", status: str | None = None) -> Path:
    """A run of the ``identity`` "one", and a memory that is that old; return the memory."""
    run, memory = folder / "run", folder / "shared" / uuid4().hex
    run.mkdir(exist_ok=True)
    (run / ".identity").write_text("one")
    if status is not None:
        (run / "result.json").write_text(json.dumps({"status": status}))
    leavings.sign(memory, run, identity)
    os.utime(memory, (time.time() - age, time.time() - age))
    return memory


DAY = 24 * 3600.0


@pytest.mark.parametrize(
    ("arguments", "stays"),
    [
        ({"age": 1.0}, True),
        ({"age": 6 * DAY, "status": "stopped"}, True),
        ({"age": 8 * DAY}, False),
        ({"age": 1.0, "status": "completed"}, False),
        ({"age": 1.0, "identity": "of a run that was deleted"}, False),
    ],
)
def test_what_runs_have_left_goes_when_nobody_needs_it(
    tmp_path: Path, arguments: dict[str, Any], stays: bool
) -> None:
    memory = left(tmp_path, **arguments)
    leavings.delete_abandoned(tmp_path / "shared" / "own")
    assert memory.exists() == stays


def test_the_memory_of_a_run_that_lives_stays_whatever_the_clock_says(tmp_path: Path) -> None:
    memory = left(tmp_path, 30 * DAY)
    ready, done = FORK.Event(), FORK.Event()
    process = FORK.Process(target=_hold, args=[tmp_path / "run", ready, done])
    process.start()
    assert ready.wait(20)
    leavings.delete_abandoned(tmp_path / "shared" / "own")
    assert memory.exists()
    done.set()
    process.join()
    leavings.delete_abandoned(tmp_path / "shared" / "own")
    assert not memory.exists()


def _hold(run: Path, ready: Any, done: Any) -> None:
    claim = Claim(run)
    claim.take()
    ready.set()
    done.wait(20)


def test_what_changes_right_after_a_save_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    """The caller goes on at once, while checksums and the copy to the disk are still to come."""
    kept = build(tmp_path, Slow(tmp_path / "checkpoints"))
    living = state(7)
    kept.save(living, durable=True)
    living.files[MODEL]["weight"].fill_(float("nan"))
    kept.settle()
    for folder in ("checkpoints", "memory"):
        assert holds(str(tmp_path / folder / "step-00000007"), 7)
