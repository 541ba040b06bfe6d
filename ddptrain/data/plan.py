"""Which samples make up step s: a pure function of (seed, s), whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ddptrain.data.shuffle import Permutation
from ddptrain.keys import derive

BLOCK = 8192
"""Positions permuted at once: amortises numpy's cost per call, at 64 KiB of memory a block."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward's samples: positions [start, stop) of an epoch, the ``index``-th of its step."""

    step: int
    index: int
    epoch: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """Cuts epochs into global batches, and those into micro-batches, shared out among ranks.

    Epoch e is the permutation π(seed, e) of the data set. A step takes the next
    ``global_batch_size`` positions of it; an epoch's last step takes what is left, so that every
    sample is seen exactly once. The micro-batches are the unit of everything random: their
    borders, order and keys do not depend on the number of ranks.
    """

    samples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int = 0
    shuffled: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch_size)

    def micro_batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
        """Rank r of W takes micro-batches ⌊M·r/W⌋ to ⌊M·(r+1)/W⌋ of the M of this step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        begin = step_in_epoch * self.global_batch_size
        end = min(begin + self.global_batch_size, self.samples)
        size = self.micro_batch_size
        count = -(-(end - begin) // size)
        mine = range(count * rank // world_size, count * (rank + 1) // world_size)
        return [
            MicroBatch(step, m, epoch, begin + m * size, min(begin + (m + 1) * size, end))
            for m in mine
        ]

    def rank_of(self, batch: MicroBatch, world_size: int) -> int:
        """Which of ``world_size`` ranks takes a micro-batch."""
        return ((batch.index + 1) * world_size - 1) // len(self.micro_batches(batch.step))

    def samples_before(self, step: int) -> int:
        """Samples seen by all ranks in the steps before ``step``."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.samples + min(steps * self.global_batch_size, self.samples)

    def forward_key(self, batch: MicroBatch) -> int:
        """What the forward of a micro-batch draws its random numbers from."""
        return derive(self.seed, "forward", batch.step, batch.index)

    def indices(self, batch: MicroBatch) -> npt.NDArray[np.int64]:
        """The data set's indices of a micro-batch, int64, shape (len(batch),)."""
        if not self.shuffled:
            return np.arange(batch.start, batch.stop)
        blocks = range(batch.start // BLOCK, (batch.stop - 1) // BLOCK + 1)
        parts = [
            _block(self.samples, self.seed, batch.epoch, b)[
                max(batch.start - b * BLOCK, 0) : batch.stop - b * BLOCK
            ]
            for b in blocks
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@lru_cache(maxsize=4)
def _block(samples: int, seed: int, epoch: int, block: int) -> npt.NDArray[np.int64]:
    permutation = Permutation(samples, derive(seed, "shuffle", epoch))
    return permutation(np.arange(block * BLOCK, min((block + 1) * BLOCK, samples)))
