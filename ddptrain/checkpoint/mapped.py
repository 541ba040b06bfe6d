"""Files in memory into which a state is copied at the speed of memory."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ddptrain.checkpoint.media import Digest, digest_of
from ddptrain.state import Tensors, unshared

UNPIN_SECONDS = 1.0


class Mapped:
    """A safetensors file in memory, for tensors of the same names and shapes again and again."""

    def __init__(self, file: Path, tensors: Tensors, reserve: float = 0.0) -> None:
        """Raises ``OSError`` if less than the share ``reserve`` of the file system stayed free."""
        _keep_free(file, sum(t.numel() * t.element_size() for t in tensors.values()), reserve)
        try:
            save_file(unshared(tensors), file)
        except SafetensorError as error:  # its name for any error of a file
            raise OSError(0, str(error), str(file)) from None
        descriptor = os.open(file, os.O_RDWR)
        try:
            self.place = _place(os.fstat(descriptor))
            self.bytes = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.views = self._lay_out(tensors)
        # Pages of a disk's file that a GPU writes to, the kernel does not know to have changed.
        is_in_memory = file.resolve().is_relative_to("/dev/shm")
        if is_in_memory and any(tensor.is_cuda for tensor in tensors.values()):
            self._pin()

    def _pin(self) -> None:
        """Let a GPU write here by itself, several times as fast; where it may not, do without."""
        cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = cuda.cudaHostRegister(_address(self.bytes), len(self.bytes), 0)
        if status == cuda.cudaError.success:
            # Not with the process: a stuck GPU must not keep that.
            weakref.finalize(self, _unpin, self.bytes).atexit = False
            return
        with suppress(RuntimeError):  # the next one to ask a GPU for something is told of it
            torch.zeros((), device="cuda")

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

    def is_at(self, file: Path) -> bool:
        """Whether ``file`` is the one that is mapped, whole: to write past its end kills."""
        try:
            return _place(file.stat()) == self.place
        except OSError:
            return False

    def fits(self, tensors: Tensors) -> bool:
        return self.views.keys() == tensors.keys() and all(
            view.shape == tensors[name].shape and view.dtype == tensors[name].dtype
            for name, view in self.views.items()
        )

    def fill(self, tensors: Tensors) -> None:
        for name, view in self.views.items():
            view.copy_(tensors[name], non_blocking=True)

    def digest(self) -> Digest:
        return digest_of(self.bytes)


def _place(there: os.stat_result) -> tuple[int, int, int]:
    return there.st_dev, there.st_ino, there.st_size


def _keep_free(file: Path, size: int, reserve: float) -> None:
    there = os.statvfs(file.parent)
    if not reserve or not there.f_blocks:  # some say nothing of their size
        return
    if (there.f_bavail * there.f_frsize - size) < reserve * there.f_blocks * there.f_frsize:
        why = f"{size:,} bytes more would leave less than {reserve:.0%} of it free"
        raise OSError(errno.ENOSPC, why, str(file.parent))


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _unpin(memory: mmap.mmap) -> None:
    """CUDA waits for its GPU first, which may be stuck: nobody else waits for that."""
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    thread = threading.Thread(
        target=lambda: cuda.cudaHostUnregister(_address(memory)), name="unpin", daemon=True
    )
    thread.start()
    thread.join(UNPIN_SECONDS)
