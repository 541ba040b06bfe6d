"""The strategy that keeps a whole replica on each rank and all-reduces the gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from re import search
from typing import Protocol

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Sum


class Strategy(Protocol):
    """How replicas are kept one model."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward sums gradients over the ranks, up to one common factor."""

    def accumulate(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """A context in which backward adds to the local gradients only."""

    def unreduced(self, wrapped: nn.Module) -> list[int]:
        """Which parameters the last backward did not reduce, by their place among those trained."""

    def synchronise_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers, before an evaluation or a save."""


class DataParallel:
    """`DistributedDataParallel`; with one rank nothing is wrapped."""

    def __init__(self, ranks: Ranks, bucket_mb: float) -> None:
        self.ranks = ranks
        self.bucket_mb = bucket_mb

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.ranks.world_size == 1:
            return module
        on_gpu = self.ranks.device.type == "cuda"
        replica = DistributedDataParallel(
            module,
            device_ids=[self.ranks.device] if on_gpu else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_mb,
        )
        if not on_gpu:
            replica.register_comm_hook(None, Sum(self.ranks.world_size).hook)
        return replica

    def accumulate(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        if isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return nullcontext()

    def unreduced(self, wrapped: nn.Module) -> list[int]:
        if not isinstance(wrapped, DistributedDataParallel):
            return []
        try:
            wrapped._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            named = search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            if named is None:
                raise
            return [int(index) for index in named[1].split()]
        return []

    def synchronise_buffers(self, module: nn.Module) -> None:
        if self.ranks.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)
