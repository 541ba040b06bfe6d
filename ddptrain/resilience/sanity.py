"""Finds which samples made a loss too large, or a number infinite, by taking the step again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ddptrain.account import Accounted
from ddptrain.data.fetch import Source, to_device
from ddptrain.data.plan import MicroBatch
from ddptrain.generators import key_generators
from ddptrain.parallel.buffers import Buffers
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Reduction

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


def explain(step: int, module: Accounted, source: Source, ranks: Ranks, buffers: Buffers) -> str:
    """Repeat the forward and backward of ``step`` without its update; every rank must call it.

    The weights must be those before the step. Sample by sample where a micro-batch is at fault.
    Buffers are left as they were.
    """
    find = partial(_find, module=module, source=source, ranks=ranks, buffers=buffers)
    mine: list[Culprit] = []
    for micro_batch in source.plan.micro_batches(step, ranks.rank, ranks.world_size):
        indices = source.plan.indices(micro_batch).tolist()
        if (fault := find(indices, micro_batch)) is None:
            continue
        try:
            single = [i for i in indices if find([i], micro_batch)]
        except Exception:  # a model need not take one sample alone: BatchNorm does not
            single = []
        mine.append(Culprit(micro_batch.index, ranks.rank, fault, single or indices))
    module.window.of_this_step.clear()  # what the repeated forwards have logged
    found = sorted(
        (culprit for of_rank in ranks.gather(mine) for culprit in of_rank),
        key=lambda culprit: culprit.micro_batch,
    )
    where = f"step {step} of data.{source.name} ({type(source.dataset).__name__})"
    if not found:
        return f"{where}: not finite only once the ranks' gradients were added up"
    told = "; ".join(map(str, found[:SHOWN]))
    if others := len(found) - SHOWN:
        told += f"; and {others} more micro-batches" if others > 0 else ""
    advice = _advice([culprit.fault for culprit in found], buffers.reduction)
    return f"{where}: {told}{f'; {advice}' if advice else ''}"


def explain_spike(
    step: int, limit: float, module: Accounted, source: Source, ranks: Ranks, buffers: Buffers
) -> str:
    """Name the micro-batches of ``step`` whose mean loss is above ``limit``, or the worst one.

    Every rank must call it. The weights must be those before the step.
    """
    mine: list[tuple[float, Culprit]] = []
    for micro_batch in source.plan.micro_batches(step, ranks.rank, ranks.world_size):
        indices = source.plan.indices(micro_batch).tolist()
        batch = to_device(source.of_indices(indices, micro_batch), ranks.device)
        key_generators(source.plan.forward_key(micro_batch), ranks.device)
        buffers.begin()
        with torch.no_grad(), module.autocast():
            loss = module.task(batch)
        buffers.largest_moves()
        count = float(loss.count)
        mean = float(loss.sum) / count if count else 0.0
        fault = Fault(f"a mean loss of {mean:.4g}")
        mine.append((mean, Culprit(micro_batch.index, ranks.rank, fault, indices)))
    found = sorted(
        (known for of_rank in ranks.gather(mine) for known in of_rank),
        key=lambda known: (-known[0], known[1].micro_batch),
    )
    above = [culprit for mean, culprit in found if mean > limit] or [found[0][1]]
    where = f"step {step} of data.{source.name} ({type(source.dataset).__name__})"
    more = f"; and {len(above) - SHOWN} more micro-batches" if len(above) > SHOWN else ""
    return f"{where}: {'; '.join(map(str, above[:SHOWN]))}{more}"


def _advice(faults: list[Fault], reduction: Reduction) -> str:
    finite = [fault for fault in faults if fault.largest < float("inf")]
    if any(fault.in_buffer for fault in finite):
        return "give the model smaller numbers, or use parallel.reduction=mean"
    return reduction.advice(max((fault.largest for fault in finite), default=0.0))


def _find(
    indices: list[int],
    micro_batch: MicroBatch,
    module: Accounted,
    source: Source,
    ranks: Ranks,
    buffers: Buffers,
) -> Fault | None:
    batch = to_device(source.of_indices(indices, micro_batch), ranks.device)
    key_generators(source.plan.forward_key(micro_batch), ranks.device)
    buffers.begin()
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
