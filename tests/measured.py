"""Tasks over made-up outputs, with every metric; under torchrun, what their evaluations give.

A model that hands on its inputs makes the data set's inputs the predictions, which a test has too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import Metric

from ddptrain.data.fetch import Fetcher, Source
from ddptrain.data.plan import Plan
from ddptrain.evaluate import Evaluation
from ddptrain.launch.worker import TIMEOUT
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.tasks import (
    BinaryClassification,
    Classification,
    LanguageModel,
    Loss,
    Regression,
    Task,
    classification,
    language_model,
    regression,
)
from ddptrain.tasks.ranking_metrics import MRR, NDCG, HitRate

CPU = torch.device("cpu")
K = 3
T = TypeVar("T")
Data = tuple[Tensor, ...]


class Items(Task):
    """What a ranking task of somebody's gives its metrics: scores, targets and groups."""

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Loss:
        return Loss(batch[0].sum(), len(batch[0]))

    def metrics(self) -> dict[str, Metric]:
        return super().metrics() | {"hit_rate": HitRate(K), "ndcg": NDCG(K), "mrr": MRR()}

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor, Tensor]) -> None:
        super().update(metrics, batch)
        for name in ("hit_rate", "ndcg", "mrr"):
            metrics[name].update(*batch)


class Logits(nn.Module):
    """Logits of the next byte from a byte."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(vocabulary)
        self.register_buffer("table", torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, text: Tensor) -> Tensor:
        return self.table[text]


def task_of(kind: str, classes: int) -> Task:
    """A task of this kind with all of its metrics, whose model does as good as nothing."""
    if kind == "binary":
        return BinaryClassification(nn.Identity(), get_args(classification.Name))
    if kind == "multiclass":
        return Classification(nn.Identity(), classes, metrics=get_args(classification.Name))
    if kind == "regression":
        names = [n for n in get_args(regression.Name) if n not in regression.OF_INTERVALS]
        return Regression(nn.Identity(), metrics=names)
    if kind == "gaussian":
        return Regression(nn.Identity(), "gaussian", metrics=get_args(regression.Name))
    if kind == "text":
        return LanguageModel(Logits(classes), get_args(language_model.Name))
    return Items()


def data_of(kind: str, seed: int, samples: int, classes: int, ties: bool) -> Data:
    """What a data set holds, and the model predicts."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    whole = partial(torch.randint, generator=generator)

    def scores(*shape: int) -> Tensor:
        drawn = normal(*shape) * 3
        return drawn.round() / 2 if ties else drawn

    if kind == "binary":
        return scores(samples, 1), whole(0, 2, (samples,))
    if kind == "multiclass":
        return scores(samples, classes), whole(0, classes, (samples,))
    if kind == "regression":
        # Far from zero, and little of it: what sums of squares lose.
        targets = normal(samples).double() * 10.0 ** (classes - 6) + 1000 * (classes % 3)
        return targets + normal(samples) * 10.0 ** (classes - 7), targets
    if kind == "gaussian":
        sure = normal(samples).double()
        outputs = torch.stack([normal(samples).double(), sure.round() if ties else sure], dim=1)
        return outputs, outputs[:, 0] + normal(samples) * torch.exp(outputs[:, 1] / 2) * classes / 3
    if kind == "text":
        return (whole(0, classes, (samples, 6)),)
    targets = whole(0, 4, (samples,)) * whole(0, 2, (samples,))
    return scores(samples), targets, whole(0, 1 + samples // 4, (samples,))


def evaluation_of(task: Task, data: Data, ranks: Ranks, micro: int) -> Evaluation:
    dataset: Any = TensorDataset(*data) if len(data) > 1 else data[0]
    plan = Plan(len(data[0]), len(data[0]), micro, shuffled=False)
    return Evaluation(task, Fetcher(Source("val", dataset, plan), ranks.device), ranks, nullcontext)


def values_of(evaluation: Evaluation) -> dict[str, Any]:
    """Numbers and what is to be drawn, on rank 0, by name."""
    numbers: dict[str, Any] = dict(evaluation.run())
    drawn = {name: draw.args[1] for name, draw in evaluation.pictures.items()}  # type: ignore[attr-defined]
    return numbers | drawn


class OneAfterTheOther(Ranks):
    """Ranks in one process: what each gathers is kept, until rank 0, the last, gets it all."""

    def __init__(self, rank: int, world_size: int, kept: dict[int, Any]) -> None:
        super().__init__(Place(), CPU, TIMEOUT)
        self.place = Place(rank=rank, world_size=world_size)
        self.kept = kept

    def gather(self, value: T) -> list[T]:
        self.kept[self.rank] = value
        if self.rank:
            raise StopIteration
        return [self.kept[rank] for rank in range(self.world_size)]


def values_on(world_size: int, make: Callable[[], Task], data: Data, micro: int) -> dict[str, Any]:
    """What rank 0 of so many ranks computes."""
    kept: dict[int, Any] = {}
    for rank in range(world_size - 1, -1, -1):
        ranks = OneAfterTheOther(rank, world_size, kept)
        evaluation = evaluation_of(make(), data, ranks, micro)
        try:
            values = values_of(evaluation)
        except StopIteration:
            continue
    return values


CASES = [
    (kind, seed, samples, classes, seed % 2 == 1)
    for kind in ("binary", "multiclass", "regression", "gaussian", "text", "ranking")
    for seed, samples, classes in ((1, 67, 3), (2, 200, 5), (3, 21, 4))
]


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def main(file: Path) -> None:
    ranks = Ranks(Place.from_environment(), CPU, TIMEOUT)
    found = []
    for kind, seed, samples, classes, ties in CASES:
        data = data_of(kind, seed, samples, classes, ties)
        evaluation = evaluation_of(task_of(kind, classes), data, ranks, micro=4)
        values = values_of(evaluation)
        assert ranks.is_first or not evaluation.pictures
        found.append({name: plain(value) for name, value in values.items()})
    if ranks.is_first:
        file.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
