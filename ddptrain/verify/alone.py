"""Two checks that need no second rank: samples fetched again, and a loss of half a micro-batch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddptrain.data.fetch import Source, tensors_in, to_device
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.loop import Trainer
from ddptrain.tasks.task import Loss, Task
from ddptrain.verify.attributes import observe
from ddptrain.verify.reasons import find_reason
from ddptrain.verify.report import Check, Finding, short
from ddptrain.verify.trace import digest

FETCHED = 8
"""Samples of each split that are fetched twice."""
LIMIT = 1e-4
"""Relative difference allowed between a loss and the sum over its halves."""


def check_samples(sources: list[Source]) -> Check:
    """Fetch a few samples of each split, and again in the opposite order: are they the same?"""
    findings = []
    fetched = 0
    for source in sources:
        count = source.plan.samples
        whole = replace(source, plan=Plan(count, count, 1, source.plan.seed, shuffled=False))
        indices = sorted({count * i // FETCHED for i in range(FETCHED)})
        before = observe(source.dataset)
        first = {i: _digest_of(whole, i) for i in indices}
        again = {i: _digest_of(whole, i) for i in reversed(indices)}
        fetched += len(indices)
        if other := [i for i in indices if first[i] != again[i]]:
            why, remedy = find_reason("data", before, observe(source.dataset), [])
            where = f"sample {other[0]} is another one when it is fetched again"
            findings.append(Finding(source.label, where, why, remedy))
    names = ", ".join(f"data.{source.name}" for source in sources)
    told = "other contents" if findings else "same contents"
    return Check("samples fetched twice", f"{told} ({fetched} samples of {names})",
                 not findings, tuple(findings))  # fmt: skip


def _digest_of(source: Source, index: int) -> str:
    return digest(source.batch(MicroBatch(0, index, 0, index, index + 1)))


def check_loss(trainer: Trainer) -> Check:
    """Compare the loss of a micro-batch with the sum over its halves; leaves eval mode behind.

    Without autocast, which would round by more than what is looked for.
    """
    what = "loss of a micro-batch and its halves"
    source, task = trainer.fetcher.source, trainer.task
    micro_batch = source.plan.micro_batches(0)[0]
    batch = to_device(source.batch(micro_batch), trainer.ranks.device)
    size = len(micro_batch)
    if size == 1:
        return Check(what, "not tried: a micro-batch holds one sample", None)
    if any(tensor.dim() == 0 or len(tensor) != size for tensor in tensors_in(batch)):
        return Check(what, f"not tried: not every tensor of a batch has {size} rows", None)
    before = _global_state(trainer.ranks.device)
    task.eval()
    with torch.inference_mode():
        whole = _numbers(task(batch))
        if not all(map(math.isfinite, whole)):
            return Check(what, f"not tried: in eval mode it is {whole[0]} / {whole[1]}", None)
        if _numbers(task(batch)) != whole:
            return Check(what, "not tried: the same batch has another loss each time", None)
        if _global_state(trainer.ranks.device) != before:
            return Check(what, "not tried: the task draws random numbers in eval mode", None)
        try:
            halves = [_numbers(task(_rows(batch, part))) for part in _halves(size)]
        except Exception as error:  # a model need not take a batch of another size
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return Check(what, f"not tried: the task takes no half of a batch: {reason}", None)
    return _judge(what, task, whole, halves, size)


def _halves(size: int) -> tuple[slice, slice]:
    return slice(0, size // 2), slice(size // 2, size)


def _global_state(device: torch.device) -> str:
    """Digest of the global generators, to see whether something has drawn from them."""
    numpys = np.random.get_state(legacy=False)
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return f"{digest(states)} {hash(random.getstate())} {numpys}"


def _rows(batch: Any, part: slice) -> Any:
    """``part`` of every tensor, and of lists of as many entries, such as strings."""
    if isinstance(batch, Tensor):
        return batch[part]
    if isinstance(batch, dict):
        return {key: _rows(value, part) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_rows(value, part) for value in batch))
    if isinstance(batch, tuple | list):
        if batch and all(isinstance(value, str | bytes) for value in batch):
            return batch[part]
        return type(batch)(_rows(value, part) for value in batch)
    return batch


def _numbers(loss: Loss) -> tuple[float, float]:
    return float(loss.sum), float(loss.count)


def _judge(
    what: str, task: Task, whole: tuple[float, float], halves: list[tuple[float, float]], size: int
) -> Check:
    differences = [
        abs(value - first - second) / max(abs(first) + abs(second), 1e-30)
        for value, first, second in zip(whole, *halves, strict=True)
    ]
    if max(differences) <= LIMIT:
        return Check(what, f"adds up (relative difference {short(max(differences))})", True)
    numbers = (
        f"a micro-batch of {size} samples has Loss(sum={whole[0]:.5g}, count={whole[1]:g}), its "
        f"halves have sums {halves[0][0]:.5g} and {halves[1][0]:.5g}, "
        f"counts {halves[0][1]:g} and {halves[1][1]:g}"
    )
    sizes = [part.stop - part.start for part in _halves(size)]
    weights: list[Sequence[float]] = [sizes, [count for _, count in halves]]
    if any(_is_mean(whole[0], halves, of) for of in weights):
        why = f"it divides by its own batch size: {numbers}"
    else:
        why = f"it does not add up over samples: {numbers}"
    label = f"task ({type(task).__name__})"
    remedy = (
        "return the sum over the samples and their number, Loss(sum, count): with "
        'reduction="sum"; the trainer divides once, by the count of the whole step'
    )
    where = "what a micro-batch adds to the loss depends on how the batch is cut"
    figure = f"does not add up (relative difference {short(max(differences))})"
    return Check(what, figure, False, (Finding(label, where, why, remedy),))


def _is_mean(whole: float, halves: list[tuple[float, float]], weights: Sequence[float]) -> bool:
    (first, _), (second, _) = halves
    mean = (first * weights[0] + second * weights[1]) / max(sum(weights), 1e-30)
    return abs(whole - mean) <= LIMIT * max(abs(first), abs(second))
