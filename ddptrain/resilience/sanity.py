"""Finds which samples made a loss too large, or a number infinite, by taking the step again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ddptrain.account import Accounted
from ddptrain.data.fetch import Source, to_device
from ddptrain.data.plan import MicroBatch
from ddptrain.generators import key_generators
from ddptrain.parallel.buffers import Buffers
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Reduction
from ddptrain.tasks.task import Batch

SHOWN = 3
"""How many micro-batches a report describes."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a micro-batch, and the size of the number that is too large, if any."""

    what: str
    largest: float = 0.0
    in_buffer: bool = False


@dataclass(frozen=True)
class Culprit:
    """A micro-batch at fault, and the samples it came from."""

    micro_batch: int
    rank: int
    fault: Fault
    samples: list[int]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.samples[:8])) + (", …" if len(self.samples) > 8 else "")
        return f"{self.fault.what} on rank {self.rank}, samples {shown}"


@dataclass
class Explainer:
    """Takes steps again without their update, with the weights before them; every rank must.

    Buffers are left as they were. Ranks are named as if there were ``world_size`` of them.
    """

    module: Accounted
    source: Source
    ranks: Ranks
    buffers: Buffers
    world_size: int

    def nonfinite(self, step: int) -> str:
        """Name the micro-batches of ``step`` whose numbers are not finite, by sample if it can."""
        mine: list[Culprit] = []
        for micro_batch, indices in self._micro_batches(step):
            if (fault := self._find(indices, micro_batch)) is None:
                continue
            try:
                single = [i for i in indices if self._find([i], micro_batch)]
            except Exception:  # a model need not take one sample alone: BatchNorm does not
                single = []
            mine.append(self._culprit(micro_batch, fault, single or indices))
        self.module.window.of_this_step.clear()  # what the repeated forwards have logged
        found = sorted(
            (culprit for of_rank in self.ranks.gather(mine) for culprit in of_rank),
            key=lambda culprit: culprit.micro_batch,
        )
        where = self._where(step)
        if not found:
            return f"{where}: not finite only once the ranks' gradients were added up"
        advice = _advice([culprit.fault for culprit in found], self.buffers.reduction)
        return f"{where}: {_told(found)}{f'; {advice}' if advice else ''}"

    def largest_losses(self, step: int, limit: float) -> str:
        """Name the micro-batches of ``step`` whose mean loss is above ``limit``, or the worst."""
        mine: list[tuple[float, Culprit]] = []
        for micro_batch, indices in self._micro_batches(step):
            batch = self._begin(indices, micro_batch)
            with torch.no_grad(), self.module.autocast():
                loss = self.module.task(batch)
            self.buffers.largest_moves()
            count = float(loss.count)
            mean = float(loss.sum) / count if count else 0.0
            fault = Fault(f"a mean loss of {mean:.4g}")
            mine.append((mean, self._culprit(micro_batch, fault, indices)))
        found = sorted(
            (known for of_rank in self.ranks.gather(mine) for known in of_rank),
            key=lambda known: (-known[0], known[1].micro_batch),
        )
        above = [culprit for mean, culprit in found if mean > limit] or [found[0][1]]
        return f"{self._where(step)}: {_told(above)}"

    def _micro_batches(self, step: int) -> Iterator[tuple[MicroBatch, list[int]]]:
        plan, ranks = self.source.plan, self.ranks
        for micro_batch in plan.micro_batches(step, ranks.rank, ranks.world_size):
            yield micro_batch, plan.indices(micro_batch).tolist()

    def _culprit(self, micro_batch: MicroBatch, fault: Fault, samples: list[int]) -> Culprit:
        rank = self.source.plan.rank_of(micro_batch, self.world_size)
        return Culprit(micro_batch.index, rank, fault, samples)

    def _where(self, step: int) -> str:
        return f"step {step} of data.{self.source.name} ({type(self.source.dataset).__name__})"

    def _begin(self, indices: list[int], micro_batch: MicroBatch) -> Batch:
        """The batch of these samples, for a forward that draws what that of the step has drawn."""
        batch = to_device(self.source.of_indices(indices, micro_batch), self.ranks.device)
        key_generators(self.source.plan.forward_key(micro_batch), self.ranks.device)
        self.buffers.begin()
        return batch

    def _find(self, indices: list[int], micro_batch: MicroBatch) -> Fault | None:
        module, buffers = self.module, self.buffers
        batch = self._begin(indices, micro_batch)
        try:
            total = module(batch)
            total.backward()
        except Exception:
            buffers.largest_moves()  # which puts them back
            raise
        numbers = {"the loss": abs(total.item())}
        for name, parameter in module.task.named_parameters():
            if parameter.grad is not None and parameter.grad.numel():
                numbers[f"the gradient of {name}"] = parameter.grad.abs().max().item()
        for parameter in module.parameters():
            parameter.grad = None
        moves = {f"the move of buffer {n}": size for n, size in buffers.largest_moves().items()}
        if not torch.isfinite(total):
            return Fault(f"the loss is {total.item()}", float("inf"))
        for name, size in {**numbers, **moves}.items():
            if (why := buffers.reduction.objection(size)) is not None:
                return Fault(f"{name} {why}", size, name in moves)
        return None


def _told(found: list[Culprit]) -> str:
    others = len(found) - SHOWN
    more = f"; and {others} more micro-batches" if others > 0 else ""
    return f"{'; '.join(map(str, found[:SHOWN]))}{more}"


def _advice(faults: list[Fault], reduction: Reduction) -> str:
    finite = [fault for fault in faults if fault.largest < float("inf")]
    if any(fault.in_buffer for fault in finite):
        return "give the model smaller numbers, or use parallel.reduction=mean"
    return reduction.advice(max((fault.largest for fault in finite), default=0.0))
