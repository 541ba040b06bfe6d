"""Finds which samples made a loss or gradient NaN or infinite, by taking the step again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ddptrain.account import Accounted
from ddptrain.data.fetch import Source, to_device
from ddptrain.data.plan import MicroBatch
from ddptrain.generators import key_generators
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Reduction


@dataclass(frozen=True)
class Culprit:
    """What was not finite on one rank, and the samples it came from."""

    rank: int
    what: str
    samples: list[int]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.samples[:8])) + (", …" if len(self.samples) > 8 else "")
        return f"{self.what} on rank {self.rank}, samples {shown}"


def explain(
    step: int, module: Accounted, source: Source, ranks: Ranks, reduction: Reduction
) -> str:
    """Repeat the forward and backward of ``step`` without its update; every rank must call it.

    The weights must be those before the step. Sample by sample where a micro-batch is at fault.
    Buffers are left as they were.
    """
    fault = partial(_fault, module=module, source=source, ranks=ranks, reduction=reduction)
    before = [buffer.clone() for buffer in module.buffers()]
    mine: list[Culprit] = []
    for micro_batch in source.plan.micro_batches(step, ranks.rank, ranks.world_size):
        indices = source.plan.indices(micro_batch).tolist()
        if (what := fault(indices, micro_batch)) is None:
            continue
        try:
            single = [i for i in indices if fault([i], micro_batch)]
        except Exception:  # a model need not take one sample alone: BatchNorm does not
            single = []
        mine.append(Culprit(ranks.rank, what, single or indices))
    for buffer, old in zip(module.buffers(), before, strict=True):
        buffer.copy_(old)
    found = [str(culprit) for of_rank in ranks.gather(mine) for culprit in of_rank]
    where = f"step {step} of data.{source.name} ({type(source.dataset).__name__})"
    if not found:
        return f"{where}: not finite only once the ranks' gradients were added up"
    return f"{where}: {'; '.join(found)}"


def _fault(
    indices: list[int],
    micro_batch: MicroBatch,
    module: Accounted,
    source: Source,
    ranks: Ranks,
    reduction: Reduction,
) -> str | None:
    batch = to_device(source.of_indices(indices, micro_batch), ranks.device)
    key_generators(source.plan.forward_key(micro_batch), ranks.device)
    total = module(batch)
    total.backward()
    largest = {
        name: parameter.grad.abs().max().item()
        for name, parameter in module.task.named_parameters()
        if parameter.grad is not None and parameter.grad.numel()
    }
    for parameter in module.parameters():
        parameter.grad = None
    if not torch.isfinite(total):
        return f"the loss is {total.item()}"
    if why := reduction.objection(abs(total.item())):
        return f"the loss {why}"
    for name, value in largest.items():
        if why := reduction.objection(value):
            return f"the gradient of {name} {why}"
    return None
