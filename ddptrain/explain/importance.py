"""Permutation importance: how much worse a metric gets when a feature says nothing any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from ddptrain.errors import Refused
from ddptrain.evaluate import Evaluation
from ddptrain.explain.samples import inputs_of, with_inputs
from ddptrain.keys import derive
from ddptrain.tasks.task import Task

REPEATS = 5


@dataclass(frozen=True)
class Metric:
    """What is held to be worse when it is smaller, or larger."""

    name: str
    is_larger_better: bool

    @classmethod
    def of_run(cls, key: str, is_larger_better: bool, known: Sequence[str]) -> Metric:
        """That of ``checkpoint.metric``, such as val/auroc, if evaluations give it; or the loss."""
        name = key.partition("/")[2]
        if name in known:
            return cls(name, is_larger_better)
        if "loss" in known:
            return cls("loss", False)
        raise Refused(
            f"--method permutation: an evaluation gives {', '.join(known) or 'no number'}, neither "
            f"{name!r} (checkpoint.metric) nor a loss"
        )


@dataclass(frozen=True)
class Importance:
    """The metric as it is, and for each feature how much worse it got in each repetition."""

    metric: Metric
    value: float
    worse: list[list[float]]

    @property
    def means(self) -> list[float]:
        return list(map(fmean, self.worse))

    @property
    def deviations(self) -> list[float]:
        return list(map(pstdev, self.worse))


def measure(evaluation: Evaluation, batches: list[Any], metric: Metric) -> Importance:
    """Permute each feature over all samples, ``REPEATS`` times, and evaluate; alike on every rank.

    ``batches`` are this rank's of the evaluation's split. Breiman, *Random Forests*, Machine
    Learning 45, 2001. captum's FeaturePermutation permutes within a forward's batch, which breaks
    up less the smaller that is, and compares outputs where a metric over the whole split is meant
    (of AUROC there is none for a micro-batch). Here the order is drawn once for all samples, from a
    key, and the metric is what an evaluation of any number of ranks gives, to the bit.
    """
    label, ranks, seed = (
        evaluation.fetcher.source.label,
        evaluation.ranks,
        evaluation.fetcher.source.plan.seed,
    )
    task = evaluation.task
    own = [inputs_of(task, batch, label) for batch in batches]
    of_ranks = ranks.gather([inputs.flatten(1).cpu() for inputs in own])
    whole = torch.cat([inputs for inputs_of_rank in of_ranks for inputs in inputs_of_rank])
    first = sum(len(inputs) for before in of_ranks[: ranks.rank] for inputs in before)

    def evaluate(given: list[Any]) -> float:
        evaluation.batches = given
        return evaluation.run()[metric.name]

    value = evaluate(batches)
    sign = 1 if metric.is_larger_better else -1
    worse: list[list[float]] = []
    for feature in range(whole.shape[1]):
        worse.append([])
        for repetition in range(REPEATS):
            key = derive(seed, "explain/permutation", feature, repetition)
            column = permuted(whole[:, feature], key)[first:]
            mixed = _with_column(task, batches, own, feature, column)
            worse[-1].append(sign * (value - evaluate(mixed)))
    return Importance(metric, value, worse)


def permuted(column: Tensor, key: int) -> Tensor:
    """The numbers of a column, (N,), in an order that depends on ``key`` alone."""
    generator = torch.Generator().manual_seed(key)
    return column[torch.randperm(len(column), generator=generator)]


def _with_column(
    task: Task, batches: list[Any], own: list[Tensor], feature: int, column: Tensor
) -> list[Any]:
    """The batches with other numbers in a feature, the first ones of ``column``."""
    mixed = []
    for batch, inputs in zip(batches, own, strict=True):
        values, column = column[: len(inputs)], column[len(inputs) :]
        flat = inputs.flatten(1).clone()
        flat[:, feature] = values.to(flat.device)
        mixed.append(with_inputs(task, batch, flat.view_as(inputs)))
    return mixed
