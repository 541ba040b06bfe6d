"""Notices replicas that are no longer one model: a memory fault, or code that changes weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ddptrain import pulse
from ddptrain.errors import DivergenceError
from ddptrain.hashing import hash_alike
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import all_gather
from ddptrain.tasks.task import Task


class Replicas:
    """Compares a hash of every parameter and buffer among the ranks, beside training."""

    def __init__(self, task: Task, ranks: Ranks) -> None:
        self.task = task
        self.ranks = ranks
        self.pending: tuple[int, Tensor, dist.Work] | None = None
        self.agreed = 0
        """The last step after which the replicas are known to have been equal."""

    def compare(self, step: int) -> None:
        """Begin to compare the weights after ``step`` steps; every rank must call it.

        Raises ``DivergenceError`` if the comparison before this one found a difference.
        """
        if self.pending is not None and self.pending[0] == step:
            return
        self.settle()
        if self.ranks.world_size == 1:
            return
        own = hash_alike(self._named().values())
        gathered = own.new_empty(self.ranks.world_size * len(own))
        work: Any = all_gather(gathered, own, async_op=True)
        self.pending = step, gathered, work

    def settle(self) -> None:
        """Wait for the comparison that is under way. Raises ``DivergenceError`` on every rank."""
        if self.pending is None:
            return
        step, gathered, work = self.pending
        self.pending = None
        pulse.enter(pulse.TOGETHER)
        work.wait()
        of_ranks = [tuple(row) for row in gathered.view(self.ranks.world_size, -1).tolist()]
        if len(set(of_ranks)) > 1:
            raise DivergenceError(describe(step, of_ranks, list(self._named())), step)
        self.agreed = step

    def restart(self, done: int) -> None:
        """All ranks have just been given the same state, that after ``done`` steps."""
        self.pending, self.agreed = None, done

    def _named(self) -> dict[str, Tensor]:
        return {**dict(self.task.named_parameters()), **dict(self.task.named_buffers())}


def describe(step: int, of_ranks: list[tuple[int, ...]], names: list[str]) -> str:
    """Say which ranks differ from most of the others, and in which tensor first."""
    usual, votes = Counter(of_ranks).most_common(1)[0]
    odd = [rank for rank, hashes in enumerate(of_ranks) if hashes != usual]
    first = next(
        name for i, name in enumerate(names) if any(of_ranks[rank][i] != usual[i] for rank in odd)
    )
    if votes > len(of_ranks) / 2:
        who = f"{_ranks(odd)} other weights than the {votes} others"
    else:
        who = f"{_ranks(list(range(len(of_ranks))))} different weights"
    return (
        f"after step {step}: {who}, first in {first}; replicas must stay equal, so suspect that "
        "machine's memory or GPU, or code that changes weights outside of the optimiser"
    )


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} holds"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]} hold"
