"""The strategy that keeps a whole replica on each rank and all-reduces the gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from re import search
from typing import Any, Protocol

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Reduction


class Strategy(Protocol):
    """How replicas are kept one model."""

    reduction: Reduction

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose backward sums gradients over the ranks, up to one common factor."""

    def accumulate(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """A context in which backward adds to this rank's sum only."""

    def unreduced(self, wrapped: nn.Module) -> list[int]:
        """Which parameters the last backward did not reduce, by their place among those trained."""


class DataParallel:
    """`DistributedDataParallel`; one rank needs no wrapping, unless for the same bits."""

    def __init__(self, ranks: Ranks, bucket_mb: float, reduction: Reduction) -> None:
        self.ranks = ranks
        self.bucket_mb = bucket_mb
        self.reduction = reduction

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.ranks.world_size == 1 and not self.reduction.wraps_one_rank:
            return module
        self.ranks.form_group()
        replica = DistributedDataParallel(
            module,
            device_ids=[self.ranks.device] if self.ranks.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            bucket_cap_mb=self.bucket_mb,
        )
        replica.broadcast_buffers = False  # they are moved alike on all ranks: see buffers.py
        self.reduction.attach(replica)
        return replica

    def accumulate(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        if isinstance(wrapped, DistributedDataParallel):
            return self.reduction.accumulate(wrapped)
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
