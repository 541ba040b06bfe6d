"""How the gradients of a step's micro-batches become one sum, on this rank and over all ranks."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

# torch 2.13 renamed it, and warns of the old name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

GATHERED_BYTES = 1 << 20
"""Up to this many bytes, over all ranks, gathering is faster than gloo's ring."""


class Reduction(Protocol):
    """How gradients, and the moves of buffers, are added up over micro-batches and ranks."""

    wraps_one_rank: bool
    """Whether a run on one rank goes the same way, for the sake of the same bits."""

    def attach(self, replica: DistributedDataParallel) -> None:
        """Make ``replica`` reduce its buckets in this way."""

    def accumulate(self, replica: DistributedDataParallel) -> AbstractContextManager[Any]:
        """A context in which backward adds to this rank's sum only."""

    def relay(self) -> None:
        """Forget what is kept by bucket: the replica is about to lay its buckets out anew."""

    def encode(self, values: Tensor) -> Tensor:
        """What to add up, over micro-batches and ranks, instead of ``values`` (float64)."""

    def decode(self, total: Tensor) -> Tensor:
        """The sum of the values, float64, of which ``total`` is the sum of encodings."""

    def objection(self, largest: float) -> str | None:
        """What is wrong with a gradient whose largest element is ``largest``, if it is."""

    def advice(self, largest: float) -> str:
        """What to do about gradients of up to ``largest``; empty if nothing helps."""

    def beyond(self) -> Tensor | None:
        """Whether a number of the step was finite and yet out of range, whatever the loss scale.

        A scalar on the device; None if that cannot happen, or if there is no loss scale.
        """

    def take_faint(self) -> list[Tensor]:
        """Parameters whose gradients were too small, since the last call, to keep all digits."""


class Summed:
    """A sum over the ranks, in one dtype, in memory that is kept from step to step.

    On the CPU small buckets are gathered and added in rank order, large ones go round a ring.
    Gloo's ring takes 2 (W - 1) turns with W ranks, and each turn wakes a thread; on a small bucket
    that is all it costs. A gather takes half of the turns, and every rank adds up the same numbers
    in the same order.
    """

    def __init__(self) -> None:
        self.gathered: dict[int, Tensor] = {}  # by bucket

    def start(self, index: int, values: Tensor) -> Future[Tensor]:
        """Begin to sum ``values`` in place, the ``index``-th bucket; done when the future is."""
        world_size = dist.get_world_size()
        if world_size == 1 or not values.numel():
            return finished(values)
        if values.is_cuda or values.nbytes * world_size > GATHERED_BYTES:
            ring: Future[list[Tensor]] = dist.all_reduce(values, async_op=True).get_future()
            return ring.then(lambda done: done.value()[0])
        gathered = self._memory(index, values, world_size)
        gather: Future[Any] = all_gather(gathered, values, async_op=True).get_future()

        def add(done: Future[Any]) -> Tensor:
            done.value()  # raises what the gather failed with
            first, second, *others = gathered.view(world_size, -1)
            torch.add(first, second, out=values)
            for other in others:
                values.add_(other)
            return values

        return gather.then(add)

    def _memory(self, index: int, values: Tensor, world_size: int) -> Tensor:
        if index not in self.gathered:
            self.gathered[index] = values.new_empty(values.numel() * world_size)
        return self.gathered[index]


def finished(value: Tensor) -> Future[Tensor]:
    """A future that is done already."""
    future: Future[Tensor] = Future(devices=[value.device] if value.is_cuda else None)
    future.set_result(value)
    return future


class Mean:
    """Floating-point addition: exact but for rounding, which depends on the number of ranks.

    The sums are not divided by the number of ranks: the account that is in them gives the mean.
    """

    wraps_one_rank = False

    def __init__(self) -> None:
        self.summed = Summed()

    def attach(self, replica: DistributedDataParallel) -> None:
        if replica.device_type == "cpu":
            replica.register_comm_hook(None, self._hook)

    def _hook(self, _: None, bucket: GradBucket) -> Future[Tensor]:
        return self.summed.start(bucket.index(), bucket.buffer())

    def accumulate(self, replica: DistributedDataParallel) -> AbstractContextManager[Any]:
        return replica.no_sync()

    def relay(self) -> None:
        self.summed.gathered.clear()

    def encode(self, values: Tensor) -> Tensor:
        return values

    def decode(self, total: Tensor) -> Tensor:
        return total

    def objection(self, largest: float) -> str | None:
        return None if largest < float("inf") else "is not finite"

    def advice(self, largest: float) -> str:
        return ""

    def beyond(self) -> Tensor | None:
        return None

    def take_faint(self) -> list[Tensor]:
        return []
