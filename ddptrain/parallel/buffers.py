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
        if self.before.shape == self.tensor.shape and self.before.dtype == self.tensor.dtype:
            # In place: a GPU that never gets so far still holds what was before an earlier step.
            self.before.copy_(self.tensor)
        else:
            self.before = self.tensor.clone()
        self.version = self.tensor._version

    def has_changed(self) -> bool:
        """Whether it was touched, or holds other bits than before; waits for the device."""
        same = (self.now == self.before) | (self.now != self.now) & (self.before != self.before)
        return self.was_touched or not same.all()

    def put_back(self) -> None:
        self.owner[self.key] = self.tensor
        self.tensor.copy_(self.before)
        self.version = self.tensor._version


class Buffers:
    """Collects what the micro-batches of a step did to the buffers, and does it once.

    Which buffers a forward changes is seen in the first step, and agreed among the ranks; the
    others are never written to.
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
        self.known = not self.all
        self.moving: dict[torch.dtype, list[Buffer]] = {}
        self.still = self.all
        self.seen: list[dict[str, Tensor]] = []  # the moves by micro-batch of the first step
        self.sum: Tensor | None = None
        self.total: Future[Tensor] | None = None
        self.moves: Tensor | None = None

    def begin(self) -> None:
        """Note the buffers as they are before a step, whoever has set them."""
        for buffer in self._moving() if self.known else self.all:
            buffer.note()
        for buffer in self.still:
            if buffer.was_touched:
                buffer.note()

    def collect(self) -> None:
        """Add up what a micro-batch has changed, and put it back. Raises ``TrainingError``."""
        if not self.known:
            changed = [buffer for buffer in self.all if buffer.has_changed()]
            self.seen.append({buffer.name: _moves([buffer], _wide(buffer)) for buffer in changed})
        elif late := [buffer.name for buffer in self.still if buffer.was_touched]:
            raise TrainingError(
                f"buffer {late[0]} changed in this step but not in the first one: a buffer must "
                "change in every step or in none, for all ranks to agree on it"
            )
        else:
            changed = self._moving()
            if changed:
                self._add(torch.cat([_moves(same, wide) for wide, same in self.moving.items()]))
        for buffer in changed:
            buffer.put_back()

    def reduce(self) -> None:
        """Begin to add up what the micro-batches of all ranks changed; every rank must call it."""
        if not self.known:
            self._agree()
        if not self.moving:
            return
        if self.sum is None:
            self._add(torch.cat([_no_move(buffer) for buffer in self._moving()]))
        if self.ranks.world_size > 1:
            assert self.sum is not None
            self.total = self.summed.start(0, self.sum)

    def arrive(self, micro_batches: int) -> Tensor | None:
        """Whether the mean move over ``micro_batches`` is not finite or out of range.

        A scalar on the device, or None if nothing moves; no loss scale has a part in it.
        """
        if self.sum is None:
            return None
        total = self.sum if self.total is None else self.total.wait()
        self.moves = self.reduction.decode(total) / micro_batches
        self.sum = self.total = None
        return ~self.moves.isfinite().all()

    def move(self, skip: Tensor) -> None:
        """Move the buffers by what has arrived, or not at all if ``skip`` > 0."""
        if self.moves is None:
            return
        of_buffers = iter(
            torch.split(
                self.moves.masked_fill(skip > 0, 0.0),
                [_real(buffer.before).numel() for buffer in self._moving()],
            )
        )
        self.moves = None
        for wide, same in self.moving.items():
            moves = torch.cat([next(of_buffers) for _ in same])
            whole = moves if wide.is_floating_point else moves.round()
            after = _flat([buffer.before for buffer in same], wide) + whole.to(wide)
            values = torch.split(after, [_real(buffer.before).numel() for buffer in same])
            for buffer, of_buffer in zip(same, values, strict=True):
                tensor = _real(buffer.tensor)
                tensor.copy_(of_buffer.view_as(tensor))

    def before_step(self) -> dict[str, Tensor]:
        """What buffers were before the step that is under way, by name.

        May be read in another thread, while a forward changes them.
        """
        noted = self._moving() if self.known else self.all
        return {buffer.name: buffer.before for buffer in noted}

    def largest_moves(self) -> dict[str, float]:
        """How far, by name, a micro-batch moved the buffers that it changed; puts them back."""
        changed = [buffer for buffer in self.all if buffer.has_changed()]
        moves = {
            b.name: _moves([b], _wide(b)).abs().amax().item() for b in changed if b.now.numel()
        }
        for buffer in changed:
            buffer.put_back()
        return moves

    def _agree(self) -> None:
        names = set().union(*self.ranks.gather({name for moves in self.seen for name in moves}))
        for buffer in self.all:
            if buffer.name in names:
                self.moving.setdefault(_wide(buffer), []).append(buffer)
        self.still = [buffer for buffer in self.all if buffer.name not in names]
        self.known = True
        for moves in self.seen if names else ():
            self._add(torch.cat([moves.get(b.name, _no_move(b)) for b in self._moving()]))
        self.seen.clear()

    def _moving(self) -> list[Buffer]:
        return [buffer for same in self.moving.values() for buffer in same]

    def _add(self, moves: Tensor) -> None:
        encoded = self.reduction.encode(moves)
        self.sum = encoded if self.sum is None else self.sum.add_(encoded)


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{name}." if name else "", module) for name, module in root.named_modules())


def _wide(buffer: Buffer) -> torch.dtype:
    """The type in which what the buffer holds can be added without loss."""
    floats = buffer.tensor.is_floating_point() or buffer.tensor.is_complex()
    return torch.float64 if floats else torch.int64


def _moves(buffers: list[Buffer], wide: torch.dtype) -> Tensor:
    """How far the elements of ``buffers`` moved, float64; infinite ones that stayed, by nothing."""
    now = _flat([buffer.now for buffer in buffers], wide)
    before = _flat([buffer.before for buffer in buffers], wide)
    return (now - before).masked_fill_(now == before, 0).double()


def _no_move(buffer: Buffer) -> Tensor:
    return torch.zeros_like(_real(buffer.before), dtype=torch.float64).view(-1)


def _flat(tensors: list[Tensor], wide: torch.dtype) -> Tensor:
    """The values of all tensors in a row."""
    return torch.cat([_real(tensor).reshape(-1) for tensor in tensors]).to(wide)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
