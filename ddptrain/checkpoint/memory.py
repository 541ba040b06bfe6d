"""Snapshots in memory that outlives the process: a step waits only while its state is copied.

Files under ``/dev/shm`` live until the node goes down. A snapshot is a checkpoint like any other,
in the same format; the slow parts, checksums and copies to a disk, are made of it afterwards. Its
files are mapped and used again and again, so that a copy runs at the speed of memory: pages that
are new to a process cost ten times as much.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from re import fullmatch
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddptrain.checkpoint.media import Digest, Disk
from ddptrain.checkpoint.progress import Progress
from ddptrain.checkpoint.store import MANIFEST, Store, folder_of, sealed
from ddptrain.failpoints import reach
from ddptrain.state import State, Tensors, unshared

SLOTS = 3
"""Snapshots at once: the newest whole one, one on its way to a disk, one being taken."""
OWNER = "run.json"
ABANDONED_SECONDS = 7 * 24 * 3600.0
GONE_SECONDS = 3600.0


class Mapped:
    """A safetensors file in memory, for tensors of the same names and shapes again and again."""

    def __init__(self, file: Path, tensors: Tensors) -> None:
        try:
            save_file(unshared(tensors), file)
        except SafetensorError as error:  # its name for any error of a file
            raise OSError(0, str(error), str(file)) from None
        descriptor = os.open(file, os.O_RDWR)
        try:
            self.bytes = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.views = self._lay_out(tensors)

    def _lay_out(self, tensors: Tensors) -> Tensors:
        begin = 8 + int.from_bytes(self.bytes[:8], "little")
        header = json.loads(self.bytes[8:begin])
        return {
            name: torch.frombuffer(
                self.bytes,
                dtype=tensor.dtype,
                count=tensor.numel(),
                offset=begin + header[name]["data_offsets"][0],
            ).view(tensor.shape)
            if tensor.numel()
            else tensor.new_empty(tensor.shape, device="cpu")
            for name, tensor in tensors.items()
        }

    def fits(self, tensors: Tensors) -> bool:
        return self.views.keys() == tensors.keys() and all(
            view.shape == tensors[name].shape and view.dtype == tensors[name].dtype
            for name, view in self.views.items()
        )

    def fill(self, tensors: Tensors) -> None:
        for name, view in self.views.items():
            view.copy_(tensors[name], non_blocking=True)

    def digest(self) -> Digest:
        return {"bytes": len(self.bytes), "sha256": sha256(self.bytes).hexdigest()}


def _boot() -> str:
    """What tells this machine, since it was started, from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _is_abandoned(folder: Path) -> bool:
    """Whether the run whose snapshots these are is gone, over, or was left for a week."""
    try:
        if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
            return True
        owner = json.loads((folder / OWNER).read_text())
        run = Path(owner["run"])
        if (run / ".identity").read_text() != owner["identity"]:
            return True
        return bool(json.loads((run / "result.json").read_text())["status"] == "completed")
    except FileNotFoundError as error:
        is_gone = Path(str(error.filename)).name == ".identity"  # or its disk is, for a while
        return is_gone and time.time() - folder.stat().st_mtime > GONE_SECONDS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_being_filled(name: str) -> bool:
    """Whether a folder is a slot of a process that lives: a rank that rescues."""
    slot = fullmatch(r"\.slot-(\d+)-\d+", name)
    return slot is not None and Path(f"/proc/{slot[1]}").exists()


@dataclass
class Slot:
    """A snapshot's folder. ``step`` is None while it is being filled, ``busy`` while in use."""

    folder: Path
    home: Path
    step: int | None = None
    busy: bool = False
    files: dict[str, Mapped] = field(default_factory=dict)

    def paths(self) -> dict[str, Path]:
        return {name: self.folder / name for name in self.files}


class Memory:
    """The snapshots of one run on this node, which the processes of its ranks share.

    Takes up to ``SLOTS`` times the size of the state, and one more while a node's ranks rescue.
    Where the first of ``roots`` has no room, it goes on in the next.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.stores = [Store(Disk(root)) for root in roots]
        self.roots = list(roots)
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
        homes = [self.root / f".slot-{os.getpid()}-{number}" for number in range(SLOTS)]
        self.slots = [Slot(home, home) for home in homes]

    def falls_back(self) -> bool:
        """Go on in the next root, if there is one and no slot is in use."""
        if self.tier + 1 == len(self.roots) or any(slot.busy for slot in self.slots):
            return False
        for slot in self.slots:
            if slot.step is None:
                self._drop(slot)
        self._use(self.tier + 1)
        return True

    def free(self) -> Slot | None:
        """A slot that may be filled: any but the newest and those in use."""
        newest = max((slot.step for slot in self.slots if slot.step is not None), default=None)
        idle = [slot for slot in self.slots if not slot.busy]
        empty = [slot for slot in idle if slot.step is None]
        full = [slot for slot in idle if slot.step is not None and slot.step != newest]
        return next(iter(empty or sorted(full, key=lambda slot: slot.step or 0)), None)

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
            self._drop(slot)
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
        if slot.folder != slot.home:
            slot.folder = slot.folder.rename(slot.home)
        for name in [name for name in slot.files if not (slot.folder / name).exists()]:
            del slot.files[name]

    def _fill(self, slot: Slot, name: str, tensors: dict[str, Tensor]) -> None:
        known = slot.files.get(name)
        if known is not None and known.fits(tensors):
            known.fill(tensors)
            return
        slot.files.pop(name, None)
        (slot.folder / name).unlink(missing_ok=True)
        slot.files[name] = Mapped(slot.folder / name, tensors)

    def _drop(self, slot: Slot) -> None:
        slot.files.clear()
        slot.step, slot.busy = None, False
        shutil.rmtree(slot.folder, ignore_errors=True)
        slot.folder = slot.home

    def seal(self, slot: Slot, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make a filled slot a checkpoint; return its manifest, with the checksums."""
        manifest = {**manifest, "files": {n: file.digest() for n, file in slot.files.items()}}
        step = int(manifest["step"])
        (slot.folder / MANIFEST).write_bytes(sealed(manifest))
        reach("memory: manifest written")
        target = self.root / folder_of(step)
        if self.store.holds(step, manifest["files"]):
            self.store.medium.write(target.name, MANIFEST, sealed(manifest))
        else:
            self._make_room(target)
            slot.folder = slot.folder.rename(target)
            slot.step = step
        reach("memory: sealed")
        return manifest

    def _make_room(self, target: Path) -> None:
        """Delete a damaged snapshot of a step, or one from before the run went back."""
        for other in self.slots:
            if other.folder == target:
                self._drop(other)
        shutil.rmtree(target, ignore_errors=True)

    def prune(self) -> None:
        """Delete what other processes have left, but for the newest snapshot."""
        own = {slot.folder.name for slot in self.slots}
        newest = {folder_of(step) for step in self.store.steps()[-1:]}
        for path in self.root.iterdir():
            is_used = path.name in own | newest or _is_being_filled(path.name)
            if path.is_dir() and not is_used:
                shutil.rmtree(path, ignore_errors=True)
        reach("memory: pruned")

    def sign(self, run: Path, identity: str) -> None:
        """Say whose it is; delete what runs have left here that are over or gone."""
        root = self.roots[0]
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        (root / OWNER).write_text(json.dumps({"run": str(run), "identity": identity}))
        for other in root.parent.iterdir():
            if other != root and _is_abandoned(other):
                shutil.rmtree(other, ignore_errors=True)

    def discard(self, after: int) -> None:
        """Delete the snapshots of steps later than ``after``, which turned out to be wrong."""
        for slot in self.slots:
            if slot.step is not None and slot.step > after:
                self._drop(slot)
        for store in self.stores:
            for step in store.steps():
                if step > after:
                    store.delete(step)

    def forget(self) -> None:
        """Delete all of it: the run needs it no more."""
        for root in self.roots:
            shutil.rmtree(root, ignore_errors=True)
