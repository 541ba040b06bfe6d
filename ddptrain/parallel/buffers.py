"""Moves a model's buffers once a step, by the same amount on whichever ranks the step ran.

A forward may change buffers: the running statistics of a BatchNorm, the vectors of a spectral
norm. One after another, those changes would depend on which rank ran which micro-batch. So every
micro-batch of a step finds the buffers as they were before the step, and the step moves them by
the mean of what its micro-batches, each on its own, moved them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.futures import Future

from ddptrain.errors import TrainingError
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Reduction, Summed


@dataclass(slots=True)
class Buffer:
    """One buffer, and what is known of it before a micro-batch."""

    name: str
    owner: dict[str, Tensor | None]
    key: str
    tensor: Tensor
    before: Tensor
    version: int

    @property
    def now(self) -> Tensor:
        tensor = self.owner[self.key]
        assert tensor is not None
        return tensor

    @property
    def was_touched(self) -> bool:
        """Whether it was replaced or written to; kernels that do not say so escape this."""
        return self.now is not self.tensor or self.tensor._version != self.version

    def note(self) -> None:
        """Take what it is now for what it was before a step."""
        self.tensor = self.now
        self.before = self.tensor.clone()
        self.version = self.tensor._version

    def put_back(self) -> None:
        self.owner[self.key] = self.tensor
        self.tensor.copy_(self.before)
        self.version = self.tensor._version


class Buffers:
    """Collects what the micro-batches of a step did to the buffers, and does it once.

    Which buffers a forward changes is seen in the first step, and agreed among the ranks.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, reduction: Reduction) -> None:
        self.ranks = ranks
        self.reduction = reduction
        self.summed = Summed()
        self.all = [
            Buffer(f"{prefix}{key}", owner._buffers, key, tensor, tensor.clone(), tensor._version)
            for prefix, owner in _modules(module)
            for key, tensor in owner._buffers.items()
            if tensor is not None
        ]
        self.moving, self.still = self.all, list[Buffer]()
        self.known = not self.all
        self.changed: set[str] = set()
        self.sum: Tensor | None = None
        self.total: Future[Tensor] | None = None

    def begin(self) -> None:
        """Note the buffers as they are before a step, whoever has set them."""
        for buffer in self.moving:
            buffer.note()
        for buffer in self.still:
            if buffer.was_touched:
                buffer.note()

    def collect(self) -> None:
        """Add up what a micro-batch has changed, and put it back. Raises ``TrainingError``."""
        if not self.known:
            self.changed |= {
                buffer.name for buffer in self.all if not torch.equal(buffer.now, buffer.before)
            }
        elif late := [buffer.name for buffer in self.still if buffer.was_touched]:
            raise TrainingError(
                f"buffer {late[0]} changed in this step but not in the first one: a buffer must "
                "change in every step or in none, for all ranks to agree on it"
            )
        if not self.moving:
            return
        before = _flat([buffer.before for buffer in self.moving])
        encoded = self.reduction.encode(_flat([buffer.now for buffer in self.moving]) - before)
        self.sum = encoded if self.sum is None else self.sum.add_(encoded)
        for buffer in self.moving:
            buffer.put_back()

    def reduce(self) -> None:
        """Begin to add up what the micro-batches of all ranks changed; every rank must call it."""
        if not self.known:
            self.changed = set().union(*self.ranks.gather(self.changed))
        if not self.moving:
            return
        if self.sum is None:
            none_moved = torch.zeros_like(_flat([buffer.before for buffer in self.moving]))
            self.sum = self.reduction.encode(none_moved)
        if self.ranks.world_size > 1:
            self.total = self.summed.start(-1, self.sum)

    def move(self, micro_batches: int, skip: Tensor) -> None:
        """Move the buffers by the mean over ``micro_batches``, or not at all if ``skip`` > 0."""
        if not self.moving or self.sum is None:
            return
        total = self.sum if self.total is None else self.total.wait()
        moves = (self.reduction.decode(total) / micro_batches).masked_fill(skip > 0, 0.0)
        before = [buffer.before for buffer in self.moving]
        after = torch.split(_flat(before) + moves, [tensor.numel() for tensor in before])
        for buffer, values in zip(self.moving, after, strict=True):
            rounded = values if buffer.tensor.is_floating_point() else values.round()
            buffer.tensor.copy_(rounded.view_as(buffer.tensor))
        self.sum = self.total = None
        if not self.known:
            self.moving = [buffer for buffer in self.all if buffer.name in self.changed]
            self.still = [buffer for buffer in self.all if buffer.name not in self.changed]
            self.known = True


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{name}." if name else "", module) for name, module in root.named_modules())


def _flat(tensors: list[Tensor]) -> Tensor:
    """The values of all tensors in a row, float64."""
    rows = [t.reshape(-1) if t.is_floating_point() else t.reshape(-1).double() for t in tensors]
    return torch.cat(rows).double()
