"""Metrics over a whole split must not depend on how its samples are shared out among ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import DDPTRAIN, read_result, run, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import (
    MaxMetric,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MinMetric,
    PearsonCorrCoef,
    R2Score,
    SumMetric,
)
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.wrappers import MinMaxMetric

from ddptrain.data.fetch import Fetcher, Source
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.errors import TrainingError
from ddptrain.evaluate import Addends, Evaluation, _in_eval_mode, _merge, _state
from ddptrain.launch.worker import TIMEOUT
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.pulse import START_UP
from ddptrain.tasks import Classification, Loss, Task
from ddptrain.tasks.mean import Mean

CPU = torch.device("cpu")
CLASSES = 4
Update = Callable[[Metric, Tensor, Tensor], None]


def classify(metric: Metric, outputs: Tensor, labels: Tensor) -> None:
    metric.update(outputs, labels)


def decide(metric: Metric, outputs: Tensor, labels: Tensor) -> None:
    metric.update(outputs[:, 0].sigmoid(), labels % 2)


def regress(metric: Metric, outputs: Tensor, labels: Tensor) -> None:
    metric.update(outputs[:, 0], outputs[:, 1] + labels)


def average(metric: Metric, outputs: Tensor, labels: Tensor) -> None:
    metric.update(outputs.double().mean(), weight=len(labels))


def collect(metric: Metric, outputs: Tensor, labels: Tensor) -> None:
    metric.update(outputs[:, 0])


Case = tuple[Callable[[], Metric], Update]

COUNTING: dict[str, Case] = {
    "micro accuracy": (lambda: MulticlassAccuracy(CLASSES, average="micro"), classify),
    "macro accuracy": (lambda: MulticlassAccuracy(CLASSES, average="macro"), classify),
    "macro F1": (lambda: MulticlassF1Score(CLASSES, average="macro"), classify),
    "Matthews": (lambda: MulticlassMatthewsCorrCoef(CLASSES), classify),
    "binary F1": (BinaryF1Score, decide),
    "AUROC": (BinaryAUROC, decide),
    "binned AUROC": (lambda: BinaryAUROC(thresholds=20), decide),
    "average precision": (BinaryAveragePrecision, decide),
    "maximum": (MaxMetric, collect),
    "minimum": (MinMetric, collect),
}
"""Their states are counts, samples or extremes: not one bit may differ."""

SUMMING: dict[str, Case] = {
    "weighted mean": (lambda: MeanMetric().set_dtype(torch.float64), average),
    "sum": (SumMetric, collect),
    "squared error": (MeanSquaredError, regress),
    "R2": (R2Score, regress),
    "Pearson": (PearsonCorrCoef, regress),
}
"""Their states are sums of floats, equal up to the order of addition."""

EVERY = COUNTING | SUMMING


def split(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # A coarse grid, so that scores have ties, which AUROC must count as such.
    outputs = (torch.randn(samples, CLASSES, generator=generator) * 3).round() / 3
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    labels[:2] = torch.tensor([0, 1])  # AUROC needs both kinds
    return outputs, labels


def of_ranks(
    make: Callable[[], Metric],
    update: Update,
    data: tuple[Tensor, Tensor],
    world_size: int,
    micro: int,
) -> list[Addends]:
    """Each rank's metric after its own micro-batches; one that had none was never updated."""
    samples = len(data[0])
    plan = Plan(samples, samples, micro, shuffled=False)
    metrics = []
    for rank in range(world_size):
        addends = Addends(make())
        for batch in plan.micro_batches(0, rank, world_size):
            update(addends.metric, *(tensor[batch.start : batch.stop] for tensor in data))
            addends.take()
        metrics.append(addends)
    return metrics


def merged_value(metrics: list[Addends], on_rank: int) -> float:
    """What this rank computes once it has the states of all."""
    _merge(metrics[on_rank].metric, list(map(_state, metrics)))
    return float(metrics[on_rank].metric.compute())


def value_alone(make: Callable[[], Metric], update: Update, data: tuple[Tensor, Tensor]) -> float:
    metric = make()
    update(metric, *data)
    return float(metric.compute())


SHARES = {
    "seed": st.integers(0, 10_000),
    "world_size": st.integers(1, 4),
    "micro": st.integers(1, 8),
    "data": st.data(),
}


@pytest.mark.parametrize(("make", "update"), COUNTING.values(), ids=COUNTING)
@settings(max_examples=25)
@given(**SHARES)
def test_ranks_together_give_the_identical_value_of_one_process(
    make: Callable[[], Metric],
    update: Update,
    seed: int,
    world_size: int,
    micro: int,
    data: st.DataObject,
) -> None:
    batch = split(seed, 21)
    on_rank = data.draw(st.integers(0, world_size - 1))
    metrics = of_ranks(make, update, batch, world_size, micro)
    assert merged_value(metrics, on_rank) == value_alone(make, update, batch)


@pytest.mark.parametrize(("make", "update"), SUMMING.values(), ids=SUMMING)
@settings(max_examples=25)
@given(**SHARES)
def test_ranks_together_give_the_sums_of_one_process(
    make: Callable[[], Metric],
    update: Update,
    seed: int,
    world_size: int,
    micro: int,
    data: st.DataObject,
) -> None:
    batch = split(seed, 21)
    on_rank = data.draw(st.integers(0, world_size - 1))
    metrics = of_ranks(make, update, batch, world_size, micro)
    double = update is average
    assert merged_value(metrics, on_rank) == pytest.approx(
        value_alone(make, update, batch), rel=1e-12 if double else 2e-4, abs=1e-5
    )


@pytest.mark.parametrize("name", ["weighted mean", "sum", "squared error", "R2"])
@settings(max_examples=25)
@given(seed=SHARES["seed"], micro=SHARES["micro"])
def test_sums_have_the_same_bits_on_any_number_of_ranks(name: str, seed: int, micro: int) -> None:
    make, update = SUMMING[name]
    outputs, labels = split(seed, 21)
    batch = outputs * 0.1, labels  # sums that round
    values = {
        merged_value(of_ranks(make, update, batch, world_size, micro), 0)
        for world_size in (1, 2, 3, 4)
    }
    assert len(values) == 1


class Covariance(Metric):
    """Adds up a large matrix, as FID does."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(40, 40), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.total += values

    def compute(self) -> Tensor:
        return self.total.sum()


def test_large_sums_are_not_kept_by_micro_batch() -> None:
    metrics = []
    for rank in range(2):
        addends = Addends(Covariance())
        for micro_batch in range(3):
            addends.metric.update(torch.full((40, 40), float(rank + micro_batch)))
            addends.take()
        assert _state(addends)["total"].shape == (40, 40)
        metrics.append(addends)
    assert merged_value(metrics, 0) == 1600 * 9


@pytest.mark.parametrize(("make", "update"), EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("on_rank", [0, 3])
def test_a_rank_without_any_sample_has_the_same_value(
    make: Callable[[], Metric], update: Update, on_rank: int
) -> None:
    """Six samples in two micro-batches for four ranks: two ranks have nothing to add."""
    batch = split(1, 6)
    metrics = of_ranks(make, update, batch, world_size=4, micro=3)
    assert [addends.metric.update_called for addends in metrics] == [False, True, False, True]
    value = merged_value(metrics, on_rank)
    assert value == pytest.approx(value_alone(make, update, batch), rel=1e-5)


@pytest.mark.parametrize(("make", "update"), EVERY.values(), ids=EVERY)
def test_all_ranks_compute_the_same_bits(make: Callable[[], Metric], update: Update) -> None:
    """Each merges into its own metric; a rank that decides differently would hang the others."""
    batch = split(2, 21)
    values = {
        merged_value(of_ranks(make, update, batch, world_size=3, micro=2), on_rank)
        for on_rank in range(3)
    }
    assert len(values) == 1


@pytest.mark.parametrize(
    ("make", "update"),
    [
        (lambda: MinMaxMetric(MulticlassAccuracy(CLASSES)), classify),
        (lambda: MeanSquaredError() + MeanSquaredError(), regress),
        (lambda: 2 * MulticlassAccuracy(CLASSES), classify),
    ],
    ids=["minimum and maximum of accuracy", "sum of two", "a factor times one"],
)
def test_a_metric_of_metrics_is_merged_or_refused(
    make: Callable[[], Metric], update: Update
) -> None:
    """Its states are in the metrics it is made of: one rank's value must not pass for all's."""

    def number(value: Any) -> float:
        return float(value["raw"] if isinstance(value, dict) else value)

    batch = split(3, 21)
    alone = make()
    update(alone, *batch)
    metrics = of_ranks(make, update, batch, world_size=2, micro=3)
    try:
        _merge(metrics[1].metric, list(map(_state, metrics)))
        value = number(metrics[1].metric.compute())
    except TrainingError:
        return
    assert value == pytest.approx(number(alone.compute()), rel=1e-5)


def test_merging_takes_nothing_from_what_was_gathered() -> None:
    """With one rank the gathered states are the metric's own: merging must not empty them."""
    batch = split(4, 12)
    (addends,) = of_ranks(BinaryAUROC, decide, batch, world_size=1, micro=6)
    assert merged_value([addends], 0) == value_alone(BinaryAUROC, decide, batch)
    assert sum(map(len, addends.metric.metric_state["preds"])) == 12


# --- the whole evaluation, on one rank ---------------------------------------------------------


class Inspecting(Classification):
    """Classification that looks at how it is called."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(CLASSES, CLASSES), nn.Dropout(0.5)), CLASSES)
        self.seen: list[int] = []
        self.fails = False

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        assert not self.training
        assert not torch.is_grad_enabled()
        if self.fails:
            raise KeyError("a bug in user code")
        self.seen += batch[0][:, 0].tolist()
        super().update(metrics, batch)


class Table(Metric):
    """Is not one number, and nobody has said what it looks like."""

    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.labels.append(labels)

    def compute(self) -> Tensor:
        return torch.cat(self.labels)


class Odd(Task):
    """A task whose evaluation gives what is not one number."""

    def forward(self, batch: Any) -> Loss:
        raise AssertionError("an evaluation calls update alone")

    def metrics(self) -> dict[str, Metric]:
        return {"table": Table()}

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        metrics["table"].update(*batch)


def evaluation(task: Task, samples: int = 21, micro: int = 4) -> Evaluation:
    outputs, labels = split(5, samples)
    outputs[:, 0] = torch.arange(samples)
    plan = Plan(samples, samples, micro, shuffled=False)
    ranks = Ranks(Place(), CPU, TIMEOUT)
    source = Source("val", TensorDataset(outputs, labels), plan)
    return Evaluation(task, Fetcher(source, CPU), ranks, nullcontext)


def test_every_sample_is_seen_once_in_eval_mode_without_gradients() -> None:
    task = Inspecting().train()
    made = evaluation(task)
    first = made.run()
    assert task.seen == list(range(21))
    assert task.training
    assert set(first) == {"loss", "accuracy", "f1"}
    assert made.run() == first
    assert task.seen == 2 * list(range(21))


def test_a_failing_evaluation_leaves_the_task_in_training_mode() -> None:
    task = Inspecting()
    task.fails = True
    with pytest.raises(KeyError, match="a bug in user code"):
        evaluation(task).run()
    assert task.training


def test_a_metric_that_is_not_one_number_is_named() -> None:
    with pytest.raises(TrainingError, match="metric table is not one number"):
        evaluation(Odd()).run()


@pytest.mark.long
def test_what_a_library_draws_when_it_is_imported_changes_no_sample(tmp_path: Path) -> None:
    """Samples draw from generators that the whole process shares."""
    options = ["experiment=ragged", "log.tensorboard=false", "eval.every_steps=100"]
    options += ["checkpoint.keep_best=0", "checkpoint.every_steps=null"]
    quiet = train(tmp_path / "quiet", 1, *options)
    drawing = [*options, "task._target_=drawing.Tagging", f"run.dir={tmp_path / 'drawing'}"]
    ended = run([*DDPTRAIN, *drawing])
    assert "drawing from step 99 on" in ended.stderr  # of the first evaluation
    assert read_result(tmp_path / "drawing")["weights_sha256"] == quiet["weights_sha256"]


def test_importing_what_metrics_need_is_given_the_time_of_a_start() -> None:
    """Wherever that is: in a log line, an evaluation, or a start that has nothing else to do."""
    code = (
        "import sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "from ddptrain import pulse\n"
        "from ddptrain.evaluate import Evaluation\n"
        "class Tells(MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torchmetrics': print(pulse.now.phase)\n"
        "sys.meta_path.insert(0, Tells())\n"
        "pulse.enter('log line', 3)\n"
        "Evaluation.load()\n"
        "print(pulse.now.phase, pulse.now.step)\n"
    )
    told = run([sys.executable, "-c", code]).stdout.splitlines()
    assert told == [START_UP, "log line 3"]


def test_micro_batches_of_an_evaluation_have_no_random_order() -> None:
    made = evaluation(Inspecting())
    plan = made.fetcher.source.plan
    assert plan.indices(MicroBatch(0, 0, 0, 0, 21)).tolist() == list(range(21))


def test_a_loss_that_is_not_a_number_is_not_left_out() -> None:
    mean = Mean()
    mean.update(torch.tensor(2.0), 2)
    mean.update(torch.tensor(float("nan")), 1)
    assert mean.compute().isnan()


def test_modules_that_a_user_has_frozen_stay_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(3, CLASSES), nn.Dropout(0.5), nn.BatchNorm1d(CLASSES))
    task = Classification(model, CLASSES)
    model[2].eval()
    with _in_eval_mode(task):
        assert not any(module.training for module in task.modules())
    assert [module.training for module in model] == [True, True, False]
    assert task.training
