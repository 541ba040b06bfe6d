"""Snapshots in memory that outlives the process: a step waits only while its state is copied.

Files under ``/dev/shm`` live until the node goes down. A snapshot is a checkpoint like any other,
in the same format; the slow parts, checksums and copies to a disk, are made of it afterwards. Its
files are mapped and used again and again, so that a copy runs at the speed of memory: pages that
are new to a process cost ten times as much.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddptrain.checkpoint.leavings import delete_abandoned, is_being_filled, sign
from ddptrain.checkpoint.mapped import Mapped
from ddptrain.checkpoint.media import Spare
from ddptrain.checkpoint.progress import Progress
from ddptrain.checkpoint.store import MANIFEST, Store, folder_of, sealed
from ddptrain.failpoints import reach
from ddptrain.state import State

SLOTS = 4
"""Snapshots at once: the newest, one being taken, and if the store is slow two on their way to it.

Two are in use where it is not.
"""
RESERVED = 0.1
"""The share of a node's memory that is left to others: loading workers send samples through it."""
LOCK = "lock"
LOCK_PAUSE = 0.01


def _boot() -> str:
    """What tells this machine, since it was started, from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


@dataclass
class Slot:
    """A snapshot's folder. ``step`` is None while it is being filled, ``busy`` while in use."""

    folder: Path
    home: Path
    tier: int
    step: int | None = None
    busy: bool = False
    files: dict[str, Mapped] = field(default_factory=dict)

    def paths(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.files}


class Memory:
    """The snapshots of one run on this node, which the processes of its ranks share.

    Takes up to ``SLOTS`` times the size of the state, and one more for each of the two last steps
    that a node's ranks rescue. Where the first of ``roots`` has no room, it goes on in the next.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.stores = [Store(Spare(root)) for root in roots]
        self.roots = list(roots)
        self.reserve = RESERVED
        self.progress = Progress(self.roots[0])
        self._use(0)

    def home(self) -> str:
        """Which memory it is: the same for all processes that share it, and for no others.

        Not the name of the host, for containers have memories of their own, and not the local rank,
        for what a launcher calls two nodes may be one machine.
        """
        shared = self.roots[0].parent
        try:
            shared.mkdir(parents=True, exist_ok=True, mode=0o700)
            there = shared.stat()
        except OSError:  # told when the first snapshot is taken
            return _boot()
        return f"{_boot()} {there.st_dev} {there.st_ino}"

    def _use(self, tier: int) -> None:
        self.tier = tier
        self.root, self.store = self.roots[tier], self.stores[tier]
        self.slots = [self.slot(tier, number) for number in range(SLOTS)]

    def slot(self, tier: int, number: int) -> Slot:
        """A slot of this process that holds nothing yet."""
        home = self.roots[tier] / f".slot-{os.getpid()}-{number}"
        return Slot(home, home, tier)

    @contextlib.contextmanager
    def alone(self, until: float) -> Iterator[None]:
        """Keep all others of this node, processes and threads, from giving snapshots their names.

        Nobody is waited for after ``until`` (monotonic): it may have been stopped.
        """
        root = self.roots[0]
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:  # no room there for a file without content: do without
            yield
            return
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > until:
                        break
                    time.sleep(LOCK_PAUSE)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a worker forked meanwhile holds it open
            os.close(descriptor)

    def makes_room(self) -> bool:
        """Delete what others have left here, but for the newest; return whether there was any."""
        before = self.store.medium.folders()
        self.clear(self.tier)
        return not set(before).issubset(self.store.medium.folders())

    def falls_back(self) -> bool:
        """Go on in the next root, if there is one and no slot is in use."""
        if self.tier + 1 == len(self.roots) or any(slot.busy for slot in self.slots):
            return False
        for slot in self.slots:
            if slot.step is None:
                self.drop(slot)
        self._use(self.tier + 1)
        return True

    def free(self) -> Slot | None:
        """A slot that may be filled: any but the newest and those in use."""
        newest = max((slot.step for slot in self.slots if slot.step is not None), default=None)
        idle = [s for s in self.slots if not s.busy and (s.step is None or s.step != newest)]
        # One that has its memory already costs nothing more.
        return min(idle, key=lambda s: (not s.files, s.step or 0), default=None)

    def take(self, slot: Slot, state: State) -> None:
        """Copy ``state`` into ``slot``. Raises ``OSError`` if the memory is full."""
        slot.busy = True
        try:
            self._open(slot)
            for name in slot.files.keys() - state.files.keys():
                del slot.files[name]
                (slot.folder / name).unlink()
            reach("memory: taken")
            for name, tensors in state.files.items():
                self._fill(slot, name, tensors)
                reach("memory: one file filled")
            if any(t.is_cuda for tensors in state.files.values() for t in tensors.values()):
                torch.cuda.current_stream().synchronize()
        except BaseException:
            self.drop(slot)
            raise
        reach("memory: filled")

    def _open(self, slot: Slot) -> None:
        """What was in the slot ceases to be a checkpoint before the first byte changes."""
        slot.step = None
        if not slot.folder.is_dir():
            slot.folder = slot.home
            slot.files.clear()
            shutil.rmtree(slot.folder, ignore_errors=True)  # of a process of the same name
            slot.folder.mkdir(parents=True, mode=0o700)
            return
        (slot.folder / MANIFEST).unlink(missing_ok=True)
        reach("memory: manifest removed")
        if slot.folder != slot.home:
            slot.folder = slot.folder.rename(slot.home)
            reach("memory: slot taken back")
        for name in [n for n, file in slot.files.items() if not file.is_at(slot.folder / n)]:
            del slot.files[name]

    def _fill(self, slot: Slot, name: str, tensors: dict[str, Tensor]) -> None:
        known = slot.files.get(name)
        if known is not None and known.fits(tensors):
            known.fill(tensors)
            return
        slot.files.pop(name, None)
        (slot.folder / name).unlink(missing_ok=True)
        is_last_resort = slot.tier + 1 == len(self.roots)
        reserve = 0.0 if is_last_resort else self.reserve
        slot.files[name] = Mapped(slot.folder / name, tensors, reserve)

    def drop(self, slot: Slot) -> None:
        """Give up a slot and the memory it takes."""
        slot.files.clear()
        slot.step, slot.busy = None, False
        shutil.rmtree(slot.folder, ignore_errors=True)
        slot.folder = slot.home

    def describe(self, slot: Slot, manifest: dict[str, Any]) -> dict[str, Any]:
        """The manifest of a filled slot, with the checksums of its files."""
        return {**manifest, "files": {n: file.digest() for n, file in slot.files.items()}}

    def seal(self, slot: Slot, manifest: dict[str, Any]) -> None:
        """Make a filled slot, which ``manifest`` describes, a checkpoint."""
        step = int(manifest["step"])
        (slot.folder / MANIFEST).write_bytes(sealed(manifest))
        reach("memory: manifest written")
        store = self.stores[slot.tier]
        target = self.roots[slot.tier] / folder_of(step)
        if store.holds(step, manifest["files"]):
            store.medium.write(target.name, MANIFEST, sealed(manifest))
        else:
            self._make_room(target)
            slot.folder = slot.folder.rename(target)
            slot.step = step
        reach("memory: sealed")

    def _make_room(self, target: Path) -> None:
        """Delete a damaged snapshot of a step, or one from before the run went back."""
        for other in self.slots:
            if other.folder == target:
                self.drop(other)
        shutil.rmtree(target, ignore_errors=True)
        reach("memory: room made")

    def prune(self) -> None:
        """Delete what other processes have left, but for the newest snapshot."""
        self.clear(self.tier)
        reach("memory: pruned")

    def clear(self, tier: int) -> None:
        """Delete what other processes have left in a root, but for the newest snapshot."""
        own = {slot.folder.name for slot in self.slots}
        newest = {folder_of(step) for step in self.stores[tier].steps()[-1:]}
        for name in self.stores[tier].medium.folders():
            path = self.roots[tier] / name
            if name not in own | newest and not is_being_filled(name) and os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)

    def sign(self, run: Path, identity: str) -> None:
        """Say whose it is; delete what runs have left here that are over or gone."""
        sign(self.roots[0], run, identity)
        delete_abandoned(self.roots[0])

    def discard(self, after: int) -> None:
        """Delete the snapshots of steps later than ``after``, which turned out to be wrong."""
        for slot in self.slots:
            if slot.step is not None and slot.step > after:
                self.drop(slot)
        for store in self.stores:
            for step in store.steps():
                if step > after:
                    store.delete(step)

    def forget(self) -> None:
        """Delete all of it: the run needs it no more."""
        for root in self.roots:
            shutil.rmtree(root, ignore_errors=True)
