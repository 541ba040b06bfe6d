"""How a bucket of gradients is summed over the ranks: a communication hook of DDP's."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

# torch 2.13 renamed it, and warns of the old name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

GATHERED_BYTES = 1 << 20
"""Up to this many bytes, over all ranks, gathering is faster than gloo's ring."""


class Sum:
    """Sums buckets on the CPU: small ones gathered and added in rank order, large ones in a ring.

    Gloo's ring takes 2 (W - 1) turns with W ranks, and each turn wakes a thread; on a small bucket
    that is all it costs. A gather takes half of the turns, and every rank adds up the same numbers
    in the same order. The sum is not divided by W: the account that is in it gives the mean.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.gathered: dict[tuple[int, int], Tensor] = {}

    def hook(self, _: None, bucket: GradBucket) -> Future[Tensor]:
        """Begin to sum ``bucket`` in place; it is done when the future is."""
        buffer = bucket.buffer()
        if buffer.nbytes * self.world_size > GATHERED_BYTES:
            ring: Future[list[Tensor]] = dist.all_reduce(buffer, async_op=True).get_future()
            return ring.then(lambda done: done.value()[0])
        gathered = self._gathered(bucket.index(), buffer)
        gather: Future[Any] = all_gather(gathered, buffer, async_op=True).get_future()

        def add(done: Future[Any]) -> Tensor:
            done.value()  # raises what the gather failed with
            first, second, *others = gathered.view(self.world_size, -1)
            torch.add(first, second, out=buffer)
            for other in others:
                buffer.add_(other)
            return buffer

        return gather.then(add)

    def _gathered(self, index: int, buffer: Tensor) -> Tensor:
        key = index, buffer.numel()
        if key not in self.gathered:
            self.gathered[key] = buffer.new_empty(buffer.numel() * self.world_size)
        return self.gathered[key]
