"""What `ddptrain explain` attributes is right, and the same numbers on any number of ranks."""

from __future__ import annotations

import csv
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import TORCHRUN, run, train
from own_files import write_reviews
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from ddptrain.build import build_trainer
from ddptrain.cli import main
from ddptrain.compose import compose
from ddptrain.data.fetch import Fetcher, Source
from ddptrain.data.plan import Plan
from ddptrain.errors import Refused
from ddptrain.evaluate import Evaluation
from ddptrain.explain import command, tokens
from ddptrain.explain.attribution import INTEGRATED, SALIENCY, Attributions, Attributor
from ddptrain.explain.importance import REPEATS, Importance, Metric, measure, permuted
from ddptrain.explain.samples import Drawn, Example, inputs_of, labels_of, with_inputs
from ddptrain.launch.worker import TIMEOUT
from ddptrain.models import TextClassifier
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import open_directory
from ddptrain.tasks import Classification, Loss, Regression, Task

CPU = torch.device("cpu")
Array = np.ndarray[Any, Any]
SEEDS = st.integers(0, 10_000)


class Shifted(Classification):
    """Held against ones."""

    def baseline(self, inputs: Tensor) -> Tensor:
        return torch.ones_like(inputs)


class Named(TensorDataset):
    """Numbers whose columns have names."""

    feature_names = ("one", "two", "none")


def example(
    *tensors: Tensor, kind: type[TensorDataset] = TensorDataset, task: Task | None = None
) -> Example:
    dataset = kind(*tensors)
    size = len(dataset)
    source = Source("test", dataset, Plan(size, size, 4, shuffled=False))
    return Example.of(task or Task(), source, CPU, 0)


def attributed(task: Task, inputs: Tensor, *methods: str, steps: int = 200) -> Attributions:
    batch = (inputs, torch.zeros(len(inputs), dtype=torch.int64))
    return Attributor(task, example(*batch, task=task), methods, steps).attribute(batch)


@settings(max_examples=20)
@given(SEEDS)
def test_a_linear_model_is_explained_by_its_weights(seed: int) -> None:
    torch.manual_seed(seed)
    layer, inputs = nn.Linear(5, 3), torch.randn(7, 5)
    found = attributed(Shifted(layer, classes=3), inputs, INTEGRATED, steps=20)
    weights = layer.weight[layer(inputs).argmax(1)].detach()
    torch.testing.assert_close(
        found.by_method[INTEGRATED], weights * (inputs - 1), atol=1e-6, rtol=0
    )
    scores = layer(inputs).amax(1) - layer(torch.ones(5))[found.explained]
    torch.testing.assert_close(found.changes, scores.detach(), atol=1e-5, rtol=0)
    assert found.deltas.abs().max() < 1e-5


@settings(max_examples=10)
@given(SEEDS)
def test_an_image_has_the_sum_and_the_largest_of_its_channels(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    inputs = torch.rand(4, 3, 2, 2)
    found = attributed(Classification(model, classes=2), inputs, INTEGRATED, SALIENCY, steps=20)
    weights = model[1].weight[model(inputs).argmax(1)].detach().view(4, 3, 2, 2)
    whole = (weights * inputs).sum(1)
    torch.testing.assert_close(found.by_method[INTEGRATED], whole, atol=1e-6, rtol=0)
    assert torch.equal(found.by_method[SALIENCY], weights.abs().amax(1))


def test_tokens_add_up_to_the_score_and_what_fills_up_has_none() -> None:
    torch.manual_seed(0)
    model = TextClassifier(classes=3, width=8)
    text = torch.randint(1, 256, (6, 20))
    text[:3, 12:] = 0
    values = attributed(Classification(model, classes=3), text, INTEGRATED)
    assert values.deltas.abs().max() < 0.02 * values.changes.abs().max()
    total = values.by_method[INTEGRATED].sum(1)
    torch.testing.assert_close(total, values.changes + values.deltas, atol=1e-5, rtol=0)
    assert not values.by_method[INTEGRATED][:3, 12:].any()
    assert values.by_method[INTEGRATED].ne(0).sum() > 60


def importance(inputs: Tensor, targets: Tensor, model: nn.Module, micro: int) -> Importance:
    dataset = TensorDataset(inputs, targets)
    source = Source("test", dataset, Plan(len(inputs), len(inputs), micro, shuffled=False))
    fetcher = Fetcher(source, CPU)
    evaluation = Evaluation(Regression(model), fetcher, Ranks(Place(), CPU, TIMEOUT), nullcontext)
    batches = list(fetcher.fetch(source.plan.micro_batches(0)))
    return measure(evaluation, batches, Metric("loss", is_larger_better=False))


class Fitted(nn.Linear):
    """A model that scikit-learn takes for one."""

    def fit(self) -> None: ...


def negative_loss(model: nn.Module, inputs: Array, targets: Array) -> float:
    with torch.no_grad():
        outputs = model(torch.from_numpy(inputs)).flatten()
    return -float((outputs - torch.from_numpy(targets)).square().mean())


def test_permutation_importance_ranks_as_scikit_learn_does() -> None:
    from sklearn.inspection import permutation_importance

    torch.manual_seed(0)
    model = Fitted(5, 1)
    with torch.no_grad():
        model.weight[:] = torch.tensor([[0.5, -2.0, 0.0, 1.0, 4.0]])
    inputs = torch.randn(40, 5)
    targets = model(inputs).detach().flatten() + 0.1 * torch.randn(40)
    found = importance(inputs, targets, model, micro=40)
    assert found.worse[2] == [0.0] * REPEATS
    given = {"scoring": negative_loss, "n_repeats": REPEATS, "random_state": 0}
    known = permutation_importance(model, inputs.numpy(), targets.numpy(), **given)
    order = np.argsort(known.importances_mean).tolist()
    assert np.argsort(found.means).tolist() == order == [2, 0, 3, 1, 4]
    np.testing.assert_allclose(found.means, known.importances_mean, rtol=0.3)
    # Were it within a micro-batch, one of a single sample would change nothing.
    other = importance(inputs, targets, model, micro=1)
    assert other.value == pytest.approx(found.value)
    for one, two in zip(other.worse, found.worse, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@given(st.integers(1, 40), SEEDS)
def test_a_permuted_column_is_its_numbers_by_the_key(size: int, key: int) -> None:
    column = torch.arange(size)
    assert permuted(column, key).sort().values.tolist() == column.tolist()
    assert torch.equal(permuted(column, key), permuted(column, key))


@given(st.data(), st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), SEEDS)
def test_each_drawn_sample_is_explained_once(
    data: st.DataObject, whole: int, micro: int, ranks: int, seed: int
) -> None:
    samples = data.draw(st.integers(1, whole))
    plan = Drawn(samples, samples, micro, seed, False, whole)
    seen = [
        index
        for rank in range(ranks)
        for batch in plan.micro_batches(0, rank, ranks)
        for index in plan.indices(batch).tolist()
    ]
    alone = Drawn(samples, samples, samples, seed, False, whole)
    assert seen == alone.indices(alone.micro_batches(0)[0]).tolist()
    assert seen == sorted(set(seen))
    assert len(seen) == samples
    assert set(seen) <= set(range(whole))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose test split is three micro-batches, with averaged weights."""
    folder = tmp_path_factory.mktemp("explain") / "run"
    short = ["train.max_steps=20", "log.tensorboard=false", "train.average.kind=ema"]
    small = ["eval.micro_batch_size=32", "task.metrics=[auroc]", "train.micro_batch_size=32"]
    train(folder, 1, "experiment=breast_cancer", *small, *short)
    return folder


def test_features_have_the_same_numbers_on_any_number_of_ranks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(trained), "--steps", "20"]) == 0
    told = capsys.readouterr().out
    assert "step 20: its output, of 85 samples of test" in told
    assert "auroc worse by" in told
    assert "… and 10 more" in told
    two = [*TORCHRUN, "2", "-m", "ddptrain", "explain", str(trained), "--steps", "20"]
    finished = run([*two, "--out", str(tmp_path / "two")])
    assert finished.returncode == 0, finished.stderr
    names = {"test.csv", "test.json", "test-features.png"}
    for folder in (trained / "explain", tmp_path / "two"):
        assert {file.name for file in folder.iterdir()} == names
    for name in names:
        alone = (trained / "explain" / name).read_bytes()
        assert alone == (tmp_path / "two" / name).read_bytes(), name
    facts = json.loads((trained / "explain" / "test.json").read_text())
    with (trained / "explain" / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["feature"] for row in rows} >= {"mean radius", "worst concave points"}
    assert [row["feature"] for row in rows] == [row["feature"] for row in facts["table"]]
    worse = [float(row["auroc worse by"]) for row in rows]
    assert worse == sorted(worse, reverse=True)
    assert worse[0] > 0
    assert (facts["metric"], facts["samples"], len(rows)) == ("auroc", 85, 30)
    last = ["--method", "integrated-gradients", "--steps", "20", "--last"]
    assert main(["explain", str(trained), *last, "--output", str(tmp_path / "last")]) == 0
    with (tmp_path / "last" / "test.csv").open() as file:
        other = {row["feature"]: row["mean attribution"] for row in csv.DictReader(file)}
    averaged = {row["feature"]: row["mean attribution"] for row in rows}
    assert averaged.keys() == other.keys()
    assert averaged != other
    assert facts["largest_convergence_delta"] < 0.1 * facts["mean_absolute_change"]


def stored(folder: Path, *overrides: str) -> str:
    """A run that has a checkpoint, and has not been trained."""
    given = ["log.tensorboard=false", f"run.dir={folder / 'run'}", *overrides]
    config = compose(given)
    directory = open_directory(config, given)
    trainer = build_trainer(config, Ranks(Place(), CPU, TIMEOUT), directory, Phases())
    trainer.checkpoints.save(trainer.state(0), durable=True)
    trainer.checkpoints.settle()
    return str(directory.path)


def test_a_gaussian_is_explained_by_its_mean_alone() -> None:
    """Where the logarithm of the variance is larger, too."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(3, 2), torch.randn(6, 3)
    assert len(set(layer(inputs).argmax(1).tolist())) == 2
    found = attributed(Regression(layer, loss="gaussian"), inputs, INTEGRATED, steps=20)
    expected = layer.weight[0].detach() * inputs
    torch.testing.assert_close(found.by_method[INTEGRATED], expected, atol=1e-6, rtol=0)
    assert found.explained.tolist() == [-1] * 6


def test_a_number_that_is_explained_is_called_no_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tmp_path, "experiment=diabetes")
    given = ["--method", INTEGRATED, "--samples", "9", "--steps", "5"]
    assert main(["explain", folder, *given]) == 0
    assert "step 0: the number it predicts, of 9 samples of test" in capsys.readouterr().out


def test_images_are_drawn_by_class(tmp_path: Path) -> None:
    folder = stored(tmp_path, "experiment=digits", "model.channels=4")
    given = ["--samples", "60", "--steps", "5", "--split", "val"]
    assert main(["explain", folder, *given]) == 0
    files = {file.name: file for file in (tmp_path / "run" / "explain").iterdir()}
    assert set(files) == {"val.csv", "val.json", "val-samples.png", "val-classes.png"}
    table = json.loads(files["val.json"].read_text())["table"]
    assert sum(row["samples"] for row in table if row["method"] == SALIENCY) == 60
    for row in table:
        shares = [
            share for name, share in row.items() if name not in ("class", "samples", "method")
        ]
        assert len(shares) == 9
        assert sum(shares) == pytest.approx(1)


def test_tokens_are_named(tmp_path: Path) -> None:
    write_reviews(tmp_path)
    data = ["data=text_folder", f"data.train.folder={tmp_path / 'reviews'}", "data.train.length=64"]
    model = ["model=text_classifier", "model.classes=2", "task=classification", "task.classes=2"]
    length = ["train.max_steps=1", "train.global_batch_size=8"]
    folder = stored(tmp_path, *data, *model, *length, "run.name=reviews")
    assert main(["explain", folder, "--steps", "20"]) == 0
    table = json.loads((tmp_path / "run" / "explain" / "test.json").read_text())["table"]
    assert sum(row["share"] for row in table) == pytest.approx(1)
    by_token = {row["token"]: row for row in table}
    assert {"f", "␣"} <= set(by_token)
    assert by_token["\\x00"]["share"] == 0
    assert (tmp_path / "run" / "explain" / "test-samples.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_without_names_are_drawn() -> None:
    values = torch.ones(1, 3)
    none = torch.zeros(1)
    found = Attributions(values.long(), none.long(), none.long(), none, none, {INTEGRATED: values})
    report = tokens.report(found, str, lambda _: "")
    assert [row[0] for row in report.rows] == [""]
    assert report.pictures["samples"].png.startswith(b"\x89PNG")


PADDED = """
import torch
from torch.utils.data import Dataset


class Padded(Dataset):
    def __len__(self):
        return 8

    def __getitems__(self, indices):
        length = 4 if 0 in indices else 6
        return torch.ones(len(indices), length).long(), torch.zeros(len(indices)).long()
"""


def test_samples_of_several_shapes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "padded.py").write_text(PADDED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = [f"+data.{split}._target_=padded.Padded" for split in ("train", "test")]
    model = ["model=text_classifier", "model.classes=2", "task=classification", "task.classes=2"]
    length = ["train.max_steps=1", "train.global_batch_size=8", "train.micro_batch_size=4"]
    folder = stored(tmp_path, *data, *model, *length, "run.name=padded")
    assert main(["explain", folder]) == 2
    told = capsys.readouterr().err
    assert "micro-batches have samples of shapes (4,) and (6,)" in told
    assert "give all samples one length" in told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--samples", "86"], "--samples 86: data.test (BreastCancer) has 1 to 85 to explain"),
        (["--samples", "0"], "--samples 0"),
        (["--steps", "0"], "--steps 0: expected a number above 0"),
        (["--method", "saliency"], "--method saliency: inputs of data.test (BreastCancer) are"),
    ],
)
def test_what_a_run_does_not_have_is_refused(
    given: list[str], said: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(trained), *given]) == 2
    assert capsys.readouterr().err.startswith(f"ddptrain: {said}")


def test_of_many_features_importance_is_measured_only_if_it_is_asked_for(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MANY_FEATURES", 29)  # there are 30
    few = ["--samples=4", "--steps=2"]
    told = {}
    for name, asked in (("default", []), ("permutation", ["--method", "permutation"])):
        output = str(trained.parent / name)
        assert main(["explain", str(trained), *few, *asked, "--output", output]) == 0
        told[name] = capsys.readouterr().out
    assert "permutation  not measured: 30 features, each in 5 orders, are" in told["default"]
    assert "integrated   a score's change" in told["default"]
    assert "permutation  auroc is" in told["permutation"]


def test_other_splits_methods_and_inputs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["model.layers=1", "model.width=8", "model.heads=1", "model.context=16"]
    folder = stored(tmp_path, "experiment=stdlib_lm", *tiny)
    assert main(["explain", folder, "--split", "test"]) == 2
    assert "--split test: data.test is not set in" in capsys.readouterr().err
    assert main(["explain", folder]) == 2
    assert "its batch is a tensor of int64, (1, 17); supported are" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["explain", folder, "--method", "lime"])
    assert "invalid choice: 'lime'" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_cannot_be_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["experiment=digits", f"run.dir={tmp_path / 'run'}"]
    directory = open_directory(compose(given), given)
    assert main(["explain", str(directory.path)]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err


class Own(Task):
    """A user's, which says itself what is explained."""

    def __init__(self, model: nn.Module | None = None, rounds: bool = False) -> None:
        super().__init__()
        self.network = model or nn.Linear(3, 1)
        self.rounds = rounds

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        return Loss(self.network(batch[0]).sum(), len(batch[0]))

    def explained(self, inputs: Tensor) -> Tensor:
        scores = self.network(inputs)
        return scores.round().detach() if self.rounds else scores


class Silent(Own):
    """One that does not."""

    explained = Task.explained


class Twice(nn.Module):
    """Looks tokens up in two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9, 2) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        return sum(table(tokens).mean(1) for table in self.tables)


def test_a_task_of_a_users_says_what_is_explained() -> None:
    task, inputs = Own(), torch.randn(4, 3)
    found = attributed(task, inputs, INTEGRATED)
    expected = task.network.weight.detach() * inputs
    torch.testing.assert_close(found.by_method[INTEGRATED], expected, atol=1e-6, rtol=0)
    assert found.explained.tolist() == [-1] * 4


class Asked(Task):
    """Scores a question and its answer, whose tokens one table has."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.weights = nn.Parameter(torch.randn(2, 4))

    def explained_at(self, batch: dict[str, Tensor]) -> tuple[str, None]:
        return "question", None

    def explained_of(self, batch: dict[str, Tensor]) -> Tensor:
        of_answer = self.table(batch["answer"]).sum(1) @ self.weights[1]
        return self.table(batch["question"]).sum(1) @ self.weights[0] + 5 * of_answer


def of_tokens(batch: dict[str, Tensor]) -> Example:
    source = Source("test", [batch], Plan(1, 1, 1, shuffled=False))
    return Example(source, batch, "tokens", [], has_classes=False)


@pytest.mark.parametrize("answer", [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])])
def test_other_tokens_of_the_same_table_are_left_as_they_are(answer: Tensor) -> None:
    """Also where the first sample's are the same."""
    torch.manual_seed(0)
    task = Asked()
    batch = {"question": torch.tensor([[1, 2, 3]]), "answer": answer}
    made = Attributor(task, of_tokens(batch), [INTEGRATED], 20)
    more = {"question": torch.tensor([[7, 0, 8], [1, 1, 2]]), "answer": answer.expand(2, -1)}
    found = made.attribute(more)
    vectors = task.table(more["question"]) - task.table(torch.zeros(1).long())
    expected = (vectors @ task.weights[0]).detach()
    torch.testing.assert_close(found.by_method[INTEGRATED], expected, atol=1e-5, rtol=0)


class Misled(Asked):
    """Says of its batches what they are not."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self.told = told

    def explained_at(self, batch: dict[str, Tensor]) -> Any:
        return self.told


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("question", r"gives 'question'; expected are two places, or keys"),
        (("qestion", None), r"names 'qestion', which the batch of .* a dict of question, answer"),
        (("question", "label"), "names 'label', which the batch of"),
    ],
)
def test_a_task_that_names_what_is_not_there_is_refused(told: Any, said: str) -> None:
    dataset = [{"question": torch.tensor([1, 2]), "answer": torch.tensor([3])}]
    source = Source("test", dataset, Plan(1, 1, 1, shuffled=False))
    with pytest.raises(Refused, match=r"task: Misled\.explained_at\(batch\) " + said):
        Example.of(Misled(told), source, CPU, 0)


def test_an_own_method_is_told_by_its_name() -> None:
    class Odd(Asked):
        def explained_of(self, batch: dict[str, Tensor]) -> Tensor:
            return self.table(batch["question"])

    batch = {"question": torch.tensor([[1, 2, 3]])}
    with pytest.raises(Refused, match=r"Odd\.explained_of\(batch\) gives \(1, 3, 4\)"):
        Attributor(Odd(), of_tokens(batch), [INTEGRATED], 20)


def test_images_in_half_precision_are_explained_in_single() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).bfloat16()
    task, pixels = Classification(model, classes=3), torch.randn(2, 3, 2, 2).bfloat16()
    found = attributed(task, pixels, INTEGRATED, SALIENCY, steps=5)
    assert {values.dtype for values in found.by_method.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("task", "inputs", "said"),
    [
        (Silent(), torch.randn(4, 3), "Silent has no model .* explained\\(inputs\\)"),
        (Own(rounds=True), torch.randn(4, 3), "Own.explained\\(inputs\\) has no gradient"),
        (Own(nn.Unflatten(1, (1, 3))), torch.randn(4, 3), "gives \\(1, 1, 3\\) for 1 samples"),
        (Own(Twice()), torch.ones(4, 5, dtype=torch.int64), "Own does so 2 times"),
        (Own(), torch.ones(4, 3, dtype=torch.int32), "int32, \\(1, 3\\); supported are"),
    ],
)
def test_what_cannot_be_traced_back_is_refused(task: Task, inputs: Tensor, said: str) -> None:
    with pytest.raises(Refused, match=said):
        attributed(task, inputs, INTEGRATED)


class Keyed(Own):
    """Whose batches are mappings."""

    def explained_at(self, batch: dict[str, Tensor]) -> tuple[str, str]:
        return "x", "y"


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


def test_a_batch_of_any_kind_has_its_inputs_where_the_task_says() -> None:
    inputs, targets, others = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.ones(4, 3)
    batches: list[tuple[Task, Any]] = [
        (Own(), (inputs, targets, "more")),
        (Own(), [inputs, targets]),
        (Own(), Pair(inputs, targets)),
        (Keyed(), {"x": inputs, "y": targets, "z": "more"}),
    ]
    for task, batch in batches:
        assert inputs_of(task, batch, "test") is inputs
        assert torch.equal(labels_of(task, batch), targets)
        assert torch.equal(task.explained_of(batch), task.explained(inputs))
        mixed = with_inputs(task, batch, others)
        assert type(mixed) is type(batch)
        assert inputs_of(task, mixed, "test") is others
        assert inputs_of(task, batch, "test") is inputs
        assert with_inputs(task, mixed, inputs) == batch
    with pytest.raises(Refused, match="test: its batch is a dict of user, known; supported are"):
        inputs_of(Own(), {"user": targets, "known": inputs}, "test")


def test_features_are_called_what_the_data_set_says() -> None:
    inputs = torch.randn(4, 3)
    assert example(inputs, inputs, kind=Named).feature_names == ["one", "two", "none"]
    windows = example(torch.randn(4, 2, 2), inputs).feature_names
    assert windows == ["feature 0, 0", "feature 0, 1", "feature 1, 0", "feature 1, 1"]
    part = Subset(Named(inputs, inputs), [0, 1])
    source = Source("test", part, Plan(2, 2, 2, shuffled=False))
    names = Example.of(Task(), source, CPU, 0).feature_names
    assert names == ["one", "two", "none"]
    with pytest.raises(Refused, match="it has 3 feature_names, and a sample 4 features"):
        example(torch.randn(4, 4), inputs, kind=Named)
