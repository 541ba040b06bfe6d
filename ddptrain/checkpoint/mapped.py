"""Files in memory into which a state is copied at the speed of memory."""

from __future__ import annotations

import json
import mmap
import os
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ddptrain.checkpoint.media import Digest
from ddptrain.state import Tensors, unshared


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
