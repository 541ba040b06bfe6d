"""Every metric is scikit-learn's on all predictions of a split, on any number of ranks."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import DDPTRAIN, PROJECT, TORCHRUN, run
from measured import (
    CASES,
    CPU,
    Data,
    K,
    data_of,
    evaluation_of,
    plain,
    task_of,
    values_of,
    values_on,
)
from scipy.stats import norm
from sklearn import metrics as sklearn
from sklearn.calibration import calibration_curve
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryCohenKappa, MulticlassAccuracy

from ddptrain.compose import compose
from ddptrain.config import Config
from ddptrain.errors import Refused, TrainingError
from ddptrain.launch.worker import TIMEOUT
from ddptrain.observe.loggers import JsonLines, ShowsPictures, TensorBoard
from ddptrain.observe.observer import Observer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import open_directory
from ddptrain.tasks import (
    BinaryClassification,
    Classification,
    LanguageModel,
    Recommendation,
    Regression,
)
from ddptrain.tasks.calibration_metrics import Reliability
from ddptrain.tasks.classification_metrics import ROC, MulticlassConfusionMatrix
from ddptrain.tasks.regression_metrics import CoverageCurve

NEAR = 1e-6
Array = Any


def expected(kind: str, data: Data, classes: int) -> dict[str, Any]:
    """The same from scikit-learn, with all predictions in one place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not defined
        if kind == "binary":
            scores = data[0].flatten().double().sigmoid().numpy()
            return of_classes(scores, scores > 0.5, data[1].numpy(), "binary")
        if kind == "multiclass":
            scores = data[0].double().softmax(1).numpy()
            return of_classes(scores, scores.argmax(1), data[1].numpy(), "macro")
        if kind == "regression":
            return of_numbers(*(tensor.numpy() for tensor in data))
        if kind == "gaussian":
            return of_intervals(*(tensor.numpy() for tensor in data))
        if kind == "text":
            model = task_of(kind, classes).model
            chances = model(data[0][:, :-1]).double().softmax(-1).flatten(0, 1).numpy()
            following = data[0][:, 1:].flatten().numpy()
            loss = sklearn.log_loss(following, chances, labels=range(classes))
            return {"perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2)}
        return of_groups(*(tensor.numpy() for tensor in data))


def of_numbers(outputs: Array, targets: Array) -> dict[str, float]:
    mae = sklearn.mean_absolute_error(targets, outputs)
    return {
        "mae": mae,
        "rmse": sklearn.root_mean_squared_error(targets, outputs),
        "r2": sklearn.r2_score(targets, outputs),
        "relative_mae": mae / sklearn.mean_absolute_error(targets, np.zeros_like(targets)),
    }


def of_intervals(outputs: Array, targets: Array) -> dict[str, Any]:
    """With scipy's quantiles of each sample's own distribution."""
    means, deviations = outputs[:, 0], np.exp(outputs[:, 1] / 2)
    levels = np.linspace(0.05, 0.95, 19)
    low, high = norm.interval(levels[:, None], means, deviations)
    shares = ((targets >= low) & (targets <= high)).mean(1)
    curve = np.stack([levels, shares], axis=1)
    return of_numbers(means, targets) | {"coverage": shares[17], "coverage_curve": curve}


def of_classes(scores: Array, predicted: Array, labels: Array, average: str) -> dict[str, Any]:
    bins = calibration(scores, predicted, labels)
    if average == "binary":
        one_hot, columns, classes = labels, [(labels, scores)], 2
    else:
        classes = scores.shape[1]
        one_hot = np.eye(classes)[labels]
        columns = list(zip(one_hot.T, scores.T, strict=True))
    return {
        "accuracy": sklearn.accuracy_score(labels, predicted),
        "precision": sklearn.precision_score(labels, predicted, average=average),
        "recall": sklearn.recall_score(labels, predicted, average=average),
        "f1": sklearn.f1_score(labels, predicted, average=average),
        "auroc": sklearn.roc_auc_score(one_hot, scores),
        "average_precision": sklearn.average_precision_score(one_hot, scores),
        "calibration_error": sum(n * abs(right - sure) for sure, right, n in bins),
        "reliability": bins,
        "confusion_matrix": sklearn.confusion_matrix(labels, predicted, labels=range(classes)),
        "roc": [sklearn.roc_curve(*case, drop_intermediate=False)[:2] for case in columns],
        "pr": [sklearn.precision_recall_curve(*case)[1::-1] for case in columns],
    }


def calibration(scores: Array, predicted: Array, labels: Array) -> Array:
    """Mean confidence, accuracy and share of each of fifteen bins that has a sample."""
    is_binary = scores.ndim == 1
    confidence = scores if is_binary else scores.max(1)
    is_right = labels == 1 if is_binary else predicted == labels
    edges = torch.linspace(0, 1, 16, dtype=torch.float64).numpy()
    inside = [
        (confidence >= low) & ((confidence < high) | (high == 1)) for low, high in pairwise(edges)
    ]
    return np.array(
        [
            (confidence[bin_].mean(), is_right[bin_].mean(), bin_.mean())
            for bin_ in inside
            if bin_.any()
        ]
    )


def of_groups(scores: Array, targets: Array, groups: Array) -> dict[str, float]:
    """Means over groups; with ties, the irrelevant before the relevant."""
    hits, gains, reciprocals = [], [], []
    for group in np.unique(groups):
        own, of_own = scores[groups == group], targets[groups == group]
        relevant = own[of_own > 0]
        if len(relevant) == 0:
            rank = math.inf
        else:
            rank = 1 + int(((own >= relevant.max()) & (of_own == 0)).sum())
        hits.append(rank <= K)
        reciprocals.append(1 / rank)
        gain = sklearn.ndcg_score([of_own], [own], k=K) if len(own) > 1 else float(of_own[0] > 0)
        gains.append(gain)
    means = map(np.mean, (hits, gains, reciprocals))
    return dict(zip(("hit_rate", "ndcg", "mrr"), means, strict=True))


def assert_same(found: dict[str, Any], right: dict[str, Any]) -> None:
    assert found.keys() == right.keys() | {"loss"}
    for name, value in right.items():
        if name in ("roc", "pr"):
            assert len(found[name]) == len(value)
            for curve, its in zip(found[name], value, strict=True):
                assert_same_curve(*map(np.array, plain(curve)), *its)
        else:
            here = np.array(plain(found[name]))
            assert here == pytest.approx(value, rel=NEAR, abs=NEAR, nan_ok=True), name


def assert_same_curve(x: Array, y: Array, its_x: Array, its_y: Array) -> None:
    if np.isnan(x).any():  # a class without a sample: scikit-learn gives a line of sorts
        assert np.isnan(its_x).any() or np.isnan(its_y).any() or (its_x[:-1] == 1).all()
        return
    assert x == pytest.approx(its_x, abs=NEAR)
    assert y == pytest.approx(its_y, abs=NEAR)


@pytest.mark.parametrize(
    "kind", ["binary", "multiclass", "regression", "gaussian", "text", "ranking"]
)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    samples=st.integers(2, 60),
    classes=st.integers(2, 8),
    ties=st.booleans(),
    world_size=st.integers(1, 3),
    micro=st.integers(1, 9),
)
def test_is_what_scikit_learn_gives_for_all_predictions(
    kind: str, seed: int, samples: int, classes: int, ties: bool, world_size: int, micro: int
) -> None:
    """A class, or all but one, may have no sample; a group may be spread over the ranks."""
    if kind == "multiclass":
        classes = max(classes, 3)
    data = data_of(kind, seed, samples, classes, ties)
    found = values_on(world_size, lambda: task_of(kind, classes), data, micro)
    assert_same(found, expected(kind, data, classes))


@pytest.mark.parametrize("ranks", [1, 3])
def test_real_ranks_give_what_scikit_learn_gives(ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    script = str(Path(__file__).with_name("measured.py"))
    finished = run([*TORCHRUN, str(ranks), script, str(file)], PROJECT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for found, (kind, seed, samples, classes, ties) in zip(
        json.loads(file.read_text()), CASES, strict=True
    ):
        data = data_of(kind, seed, samples, classes, ties)
        assert_same(found, expected(kind, data, classes))


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_many_samples_are_as_near(kind: str) -> None:
    data = data_of(kind, 7, 100_000, 4, ties=False)
    found = values_on(1, lambda: task_of(kind, 4), data, 5000)
    assert_same(found, expected(kind, data, 4))


def test_the_reliability_of_yes_is_scikit_learns_calibration_curve() -> None:
    scores, labels = data_of("binary", 4, 300, 2, ties=False)
    found = values_on(3, lambda: task_of("binary", 2), (scores, labels), 7)["reliability"]
    right, sure = calibration_curve(labels, scores.flatten().double().sigmoid(), n_bins=15)
    assert found[:, 0].numpy() == pytest.approx(sure, abs=NEAR)
    assert found[:, 1].numpy() == pytest.approx(right, abs=NEAR)
    assert found[:, 2].sum() == pytest.approx(1)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    """Such as that of a logit of 50, beside one that is nearly 1 and wrong."""
    data = torch.tensor([[50.0], [50.0], [4.0], [4.0]]), torch.tensor([1, 1, 0, 0])
    found = values_on(1, lambda: task_of("binary", 2), data, 4)
    assert_same(found, expected("binary", data, 2))


def test_logits_that_float32_takes_for_certain_keep_their_order() -> None:
    data = torch.tensor([[20.0], [25.0], [22.0], [30.0]]), torch.tensor([0, 1, 0, 1])
    assert values_on(1, lambda: task_of("binary", 2), data, 2)["auroc"] == 1


def test_scores_below_zero_rank_as_any_others() -> None:
    data = torch.tensor([-3.0, -1.0, -2.0]), torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0])
    found = values_on(1, lambda: task_of("ranking", 0), data, 1)
    assert (found["mrr"], found["hit_rate"], found["ndcg"]) == (1, 1, 1)


def test_a_model_that_says_the_same_of_all_items_finds_nothing() -> None:
    data = torch.zeros(10), torch.tensor([1] + 9 * [0]), torch.zeros(10).long()
    found = values_on(1, lambda: task_of("ranking", 0), data, 5)
    assert (found["mrr"], found["hit_rate"]) == (0.1, 0)


@pytest.mark.parametrize("scores", [[math.nan] * 4, [3.0, 2.0, 1.0, math.nan]])
def test_scores_that_are_nan_find_nothing(scores: list[float]) -> None:
    data = torch.tensor(scores), torch.tensor([1, 0, 0, 0]), torch.zeros(4).long()
    found = values_on(2, lambda: task_of("ranking", 0), data, 2)
    assert all(math.isnan(found[name]) for name in ("mrr", "hit_rate", "ndcg"))


def alone() -> Ranks:
    return Ranks(Place(), CPU, TIMEOUT)


def test_what_is_not_defined_is_nan_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    data = torch.randn(9, 1), torch.zeros(9).long()
    evaluation = evaluation_of(task_of("binary", 2), data, alone(), 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            values = values_of(evaluation)
    assert math.isnan(values["auroc"])
    assert values["average_precision"] == 0
    assert [record.message for record in caplog.records] == [
        "val/auroc: not defined, for all samples are of one class; it is NaN",
        "val/average_precision: not defined, for no sample is positive; that counts as 0",
    ]


def test_a_class_without_a_sample_is_named(caplog: pytest.LogCaptureFixture) -> None:
    data = torch.randn(9, 4), torch.arange(9) % 3
    with caplog.at_level(logging.WARNING):
        evaluation_of(task_of("multiclass", 4), data, alone(), 4).run()
    assert [record.message for record in caplog.records] == [
        "val/auroc: not defined, for no sample, or every one, is of class 3; it is NaN",
        "val/average_precision: not defined, for no sample is of class 3; that counts as 0",
    ]


def test_a_loss_that_is_no_number_is_said(caplog: pytest.LogCaptureFixture) -> None:
    data = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 2.0])
    with caplog.at_level(logging.WARNING):
        evaluation_of(Regression(nn.Identity(), metrics=[]), data, alone(), 1).run()
    assert [record.message for record in caplog.records] == ["val/loss: it is NaN"]


# --- choosing ----------------------------------------------------------------------------------

DIGITS = "experiment=digits"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([DIGITS, "task.metrics=[accuracy,acc]"], "task.metrics: ddptrain.tasks.Classification"),
        ([DIGITS, "task.metrics=[recal]"], "did you mean recall?"),
        ([DIGITS, "task.metrics=[accuracy,perplexity]"], "knows no 'perplexity'; there is"),
        (
            [DIGITS, "task.metrics=[{k:{_target_:torchmetrics.classification.BinaryKappa}}]"],
            "task.metrics[0].k._target_",
        ),
        (
            ["experiment=breast_cancer", "task.metrics=[auroc,rocs]"],
            "task.metrics: ddptrain.tasks.BinaryClassification knows no 'rocs'; did you mean roc?",
        ),
        (
            [DIGITS, "~task.classes", "task=regression", "task.loss=hubert"],
            "task.loss: ddptrain.tasks.Regression knows no 'hubert'; did you mean huber?",
        ),
    ],
)
def test_a_name_that_there_is_not_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(Refused) as refused:
        compose(overrides)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("classification", Classification(nn.Identity(), 10)),
        ("binary", BinaryClassification(nn.Identity())),
        ("regression", Regression(nn.Identity())),
        ("language_model", LanguageModel(nn.Identity())),
        ("recommendation", Recommendation(nn.Identity())),
    ],
)
def test_a_tasks_file_says_the_defaults_of_its_class(name: str, task: Any) -> None:
    file = Path(__file__).parents[1] / "conf" / "task" / f"{name}.yaml"
    node = yaml.safe_load(file.read_text())
    assert node["metrics"] == list(task.chosen)
    for key in node.keys() - {"_target_", "classes", "metrics"}:
        assert node[key] == getattr(task, key)


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        (["acuracy"], "there is no 'acuracy'; there is accuracy, precision"),
        (["accuracy", "accuracy"], "accuracy is there twice"),
        (["f1", {"f1": BinaryCohenKappa()}], "f1 is there twice"),
        ([{"loss": BinaryCohenKappa()}], "loss is there twice"),
        ([{"kappa": "f1"}], "kappa is str, no torchmetrics.Metric"),
        ([5], "expected names"),
    ],
)
def test_a_task_made_in_python_refuses_as_well(entries: list[Any], line: str) -> None:
    with pytest.raises(Refused, match=line.replace("{", "")):
        BinaryClassification(nn.Identity(), entries)


def test_another_of_torchmetrics_is_merged_and_fresh_each_time() -> None:
    entries: list[Any] = ["rmse", {"squared": MeanSquaredError()}]
    task = Regression(nn.Identity(), metrics=entries)
    data = data_of("regression", 3, 30, 6, ties=False)
    evaluation = evaluation_of(task, data, alone(), 4)
    first = evaluation.run()
    assert first["squared"] == pytest.approx(first["rmse"] ** 2, rel=1e-5)
    assert evaluation.run() == first


def test_a_gaussian_loss_is_the_densitys_and_needs_two_outputs() -> None:
    outputs, targets = torch.tensor([[1.0, 0.0], [5.0, 2.0]]), torch.tensor([0.5, 2.0])
    task = Regression(nn.Identity(), "gaussian")
    density = norm.logpdf(targets, outputs[:, 0], torch.exp(outputs[:, 1] / 2)).sum()
    assert task((outputs, targets)).sum.item() == pytest.approx(-density, rel=NEAR)
    for wrong in (torch.ones(2, 1), torch.ones(4)):
        with pytest.raises(TrainingError, match="a mean and the logarithm of a variance"):
            task((wrong, targets))
    with pytest.raises(Refused, match="coverage needs a model that says how sure it is"):
        Regression(nn.Identity(), metrics=["mae", "coverage"])


def test_changes_that_are_all_nothing_have_no_relative_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = Regression(nn.Identity(), metrics=["relative_mae"])
    with caplog.at_level(logging.WARNING):
        values = evaluation_of(task, (torch.ones(3), torch.zeros(3)), alone(), 2).run()
    assert math.isnan(values["relative_mae"])
    assert "relative_mae: not defined, for all targets are 0" in caplog.text


def test_regression_learns_by_each_loss() -> None:
    outputs, targets = torch.tensor([[1.0], [5.0]]), torch.tensor([0.5, 2.0])
    sums = {
        name: Regression(nn.Identity(), name)((outputs, targets)).sum.item()
        for name in ("squared", "absolute", "huber")
    }
    assert sums == {"squared": 9.25, "absolute": 3.5, "huber": 0.125 + 2.5}
    steep = Regression(nn.Identity(), "huber", huber_delta=10.0)((outputs, targets))
    assert steep.sum.item() == 9.25 / 2
    with pytest.raises(TrainingError, match=r"gives \(2, 2\) for targets of shape \(2,\)"):
        Regression(nn.Identity())((torch.ones(2, 2), targets))


# --- pictures ----------------------------------------------------------------------------------

PNG = b"\x89PNG"


def test_a_run_leaves_pictures_of_each_evaluation(tmp_path: Path) -> None:
    """And no more of them when it is started again."""
    options = [
        *("experiment=breast_cancer", f"run.dir={tmp_path / 'run'}", "train.max_steps=30"),
        *("eval.every_steps=10", "checkpoint.every_steps=10"),
        "task.metrics=[auroc,roc,pr,confusion_matrix,"
        "{kappa:{_target_:torchmetrics.classification.BinaryCohenKappa}}]",
    ]
    finished = run([*TORCHRUN, "2", "-m", "ddptrain", *options])
    assert finished.returncode == 0, finished.stderr[-3000:]
    (tmp_path / "run" / "result.json").unlink()
    again = run([*DDPTRAIN, *options])
    assert again.returncode == 0, again.stderr[-3000:]
    for split in ("val", "test"):
        for metric in ("roc", "pr", "confusion_matrix"):
            file = tmp_path / "run" / "plots" / f"{split}-{metric}.png"
            assert file.read_bytes().startswith(PNG)
            steps = [event.step for event in images(tmp_path / "run", f"{split}/{metric}")]
            assert steps == ([10, 20, 30] if split == "val" else [30])
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line.keys() == {"step", "split", "loss", "auroc", "kappa"}


def images(run_dir: Path, name: str) -> list[Any]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return list(events.Images(name))


def test_pictures_cannot_be_what_the_best_is_chosen_by(tmp_path: Path) -> None:
    refused = run(
        [
            *(*DDPTRAIN, "experiment=breast_cancer", f"run.dir={tmp_path / 'run'}"),
            *("task.metrics=[auroc,roc]", "checkpoint.metric=val/roc"),
        ]
    )
    assert refused.returncode == 2
    assert "checkpoint.metric=val/roc: the task has no such metric" in refused.stderr


@pytest.fixture
def config() -> Config:
    return compose([DIGITS])


def observer(config: Config, folder: Path, resumed_at: int) -> Observer:
    config.run.dir = str(folder)
    run_directory = open_directory(config, [])
    made = Observer(config, run_directory, Phases(), speaks=True, world_size=1)
    made.open(resumed_at, 100)
    return made


def draw(axes: Any) -> None:
    axes.plot([0, 1])


def tell(made: Observer, step: int) -> None:
    made.log(step, "val", {"loss": 1.0})
    made.show(step, "val", {"roc": draw})


def test_steps_of_pictures_rise_whatever_was_told_before_a_resume(
    config: Config, tmp_path: Path
) -> None:
    first = observer(config, tmp_path / "run", 0)
    for step in (10, 20, 30):
        tell(first, step)
    first.close()
    second = observer(config, tmp_path / "run", 20)
    for step in (20, 30, 40):
        tell(second, step)
    second.close()
    assert [event.step for event in images(tmp_path / "run", "val/roc")] == [10, 20, 30, 40]


def test_a_picture_that_fails_is_said_once_and_stops_nothing(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(axes: Any) -> None:
        raise ZeroDivisionError("no plot")

    made = observer(config, tmp_path / "run", 0)
    with caplog.at_level(logging.WARNING):
        for step in (10, 20):
            made.log(step, "val", {"loss": 1.0})
            made.show(step, "val", {"odd": fail, "roc": draw})
    made.close()
    assert [record.message for record in caplog.records if "drawn" in record.message] == [
        "val/odd cannot be drawn: ZeroDivisionError('no plot'); training goes on"
    ]
    assert len(images(tmp_path / "run", "val/roc")) == 2


def test_loggers_without_pictures_are_left_alone(tmp_path: Path) -> None:
    assert isinstance(TensorBoard(tmp_path, 0, ""), ShowsPictures)
    assert not isinstance(JsonLines(tmp_path / "lines", 0), ShowsPictures)


def test_a_metric_of_several_numbers_is_drawn_by_its_own_plot(
    config: Config, tmp_path: Path
) -> None:
    accuracy = MulticlassAccuracy(4, average="none")
    task = Classification(nn.Identity(), 4, metrics=["f1", {"each": accuracy}])
    evaluation = evaluation_of(task, data_of("multiclass", 1, 40, 4, False), alone(), 8)
    assert evaluation.run().keys() == {"loss", "f1"}
    made = observer(config, tmp_path / "run", 0)
    made.show(10, "val", evaluation.pictures)
    made.close()
    assert len(images(tmp_path / "run", "val/each")) == 1


@pytest.mark.parametrize("classes", [2, 30])
def test_curves_and_matrices_of_few_and_many_classes_can_be_drawn(
    classes: int, config: Config, tmp_path: Path
) -> None:
    """One of which has no sample."""
    task = task_of("multiclass", classes)
    scores, labels = data_of("multiclass", 1, 90, classes, False)
    evaluation = evaluation_of(task, (scores, labels.clamp(min=1)), alone(), 8)
    evaluation.run()
    made = observer(config, tmp_path / "run", 0)
    made.show(10, "val", evaluation.pictures)
    made.close()
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {
        f"val-{name}.png" for name in ("roc", "pr", "confusion_matrix", "reliability")
    }


def seen(draw_on: Callable[[Any], None]) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    draw_on(axes)
    return axes


def test_pictures_name_the_classes_of_the_data() -> None:
    """Also where a name is no word for matplotlib, too long, or there is none for a class."""
    data = data_of("multiclass", 1, 90, 4, False)
    evaluation = evaluation_of(task_of("multiclass", 4), data, alone(), 8)
    names = ["_cat", "$dog$", "a very long name of a class, \udc80"]
    evaluation.fetcher.source.dataset.class_names = names  # type: ignore[attr-defined]
    evaluation.run()
    shown = ["_cat", r"\$dog\$", "a very lo…a class, ?", "3"]
    matrix = seen(evaluation.pictures["confusion_matrix"])
    matrix.figure.canvas.draw()
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels()):
        assert [label.get_text() for label in labels] == shown
    for curves in ("roc", "pr"):
        named = seen(evaluation.pictures[curves]).get_legend_handles_labels()[1]
        assert named[-4:] == ["class _cat", *shown[1:3], "class 3"]


@pytest.mark.parametrize("names", [lambda: ["a"], 3, {0: "cat"}, "ab"])
def test_what_is_no_list_of_names_ends_no_evaluation(names: Any) -> None:
    evaluation = evaluation_of(
        task_of("multiclass", 3), data_of("multiclass", 1, 30, 3, False), alone(), 8
    )
    evaluation.fetcher.source.dataset.class_names = names  # type: ignore[attr-defined]
    evaluation.run()
    matrix = seen(evaluation.pictures["confusion_matrix"])
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["0", "1", "2"]


def test_a_picture_may_have_names_of_its_own() -> None:
    own = MulticlassConfusionMatrix(2)
    own.class_names = ["no", "yes"]
    task = Classification(nn.Identity(), 2, metrics=[{"own": own}])
    evaluation = evaluation_of(task, data_of("multiclass", 1, 30, 2, False), alone(), 8)
    evaluation.fetcher.source.dataset.class_names = ["0", "1"]  # type: ignore[attr-defined]
    evaluation.run()
    matrix = seen(evaluation.pictures["own"])
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["no", "yes"]


def test_a_picture_shows_the_points_of_the_curve_and_the_counts_of_the_matrix() -> None:
    points = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    axes = seen(lambda on: ROC().plot([points], on))
    chance, curve = axes.lines
    assert list(chance.get_xdata()) == list(chance.get_ydata())
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0, 0.5, 1], [0, 1, 1])
    counts: Tensor = torch.tensor([[7, 1], [0, 4]])
    matrix = seen(lambda on: MulticlassConfusionMatrix(2).plot(counts, on))
    assert [text.get_text() for text in matrix.texts] == ["7", "1", "0", "4"]
    assert matrix.get_xlabel() == "predicted class"
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["0", "1"]
    bins = torch.tensor([[0.1, 0.2, 0.75], [0.9, 0.8, 0.25]])
    said, curve = seen(lambda on: Reliability().plot(bins, on)).lines
    assert list(said.get_xdata()) == list(said.get_ydata())
    assert list(curve.get_xdata()) == pytest.approx([0.1, 0.9])
    assert list(curve.get_ydata()) == pytest.approx([0.2, 0.8])
    shares = torch.tensor([[0.5, 0.6], [0.9, 0.7]])
    curve = seen(lambda on: CoverageCurve().plot(shares, on)).lines[1]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == (
        pytest.approx([0.5, 0.9]),
        pytest.approx([0.6, 0.7]),
    )
