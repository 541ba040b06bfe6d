"""Models of transformers and data of datasets, real ones, from a config alone."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow.parquet
import pytest
import torch
import torchmetrics
from huggingface_ranks import hashes
from launching import TORCHRUN, run
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddptrain import signatures
from ddptrain.build import build_source, build_task, build_trainer
from ddptrain.cli import main
from ddptrain.compose import compose
from ddptrain.data import HuggingFace, packages
from ddptrain.data.fetch import Fetcher, Source
from ddptrain.data.packages import import_package
from ddptrain.data.plan import Plan
from ddptrain.errors import Refused, TrainingError
from ddptrain.evaluate import Evaluation
from ddptrain.explain.attribution import INTEGRATED, METHODS, Attributions, Attributor
from ddptrain.explain.importance import REPEATS, Metric, measure
from ddptrain.explain.samples import Example
from ddptrain.launch.worker import TIMEOUT
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory, open_directory
from ddptrain.tasks import Transformers
from ddptrain.tasks.transformer_configs import check_entries
from ddptrain.tasks.transformer_models import KNOWN, USUAL, Name

CPU = torch.device("cpu")
GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
SECTION = re.search(r"^## Hugging Face models and data\n(.*?)^## ", GUIDE, re.DOTALL | re.MULTILINE)
assert SECTION is not None
EXAMPLES = dict(
    zip(("reviews", "notes"), re.findall(r"```yaml\n(.*?)```", SECTION[1], re.DOTALL), strict=True)
)
WORDS = ("one", "two", "three")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of a user's: the guide's two experiments and what they read, and its own cache."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "conf" / "experiment").mkdir(parents=True)
    for name, text in EXAMPLES.items():
        assert len(text.splitlines()) < 15
        (folder / "conf" / "experiment" / f"{name}.yaml").write_text(text)
    draw = random.Random(0)
    rows = ["review,opinion,stars"]
    for _ in range(200):
        kind = draw.randrange(2)
        words = [("poor", "fine")[kind], *draw.choices(["film", "plot", "end"], k=4)]
        draw.shuffle(words)
        rows.append(f"{' '.join(words)},{('bad', 'good')[kind]},{kind + draw.randrange(4)}")
    (folder / "reviews.csv").write_text("\n".join(rows) + "\n")
    (folder / "notes").mkdir()
    for name in ("b", "a"):
        lines = [" ".join(draw.choices(WORDS, k=12)) for _ in range(100)]
        (folder / "notes" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def only_here(of: socket.socket, address: object) -> None:
        assert of.family == socket.AF_UNIX, f"somebody wanted to reach {address}"
        connect(of, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", only_here)


def evaluated(folder: Path, *overrides: str) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of val before and after training, on one rank."""
    config = compose([*overrides, "log.tensorboard=false"])
    ranks = Ranks(Place(), CPU, TIMEOUT)
    made = build_trainer(config, ranks, RunDirectory(folder), Phases())
    before = made.evaluations["val"].run()
    made.task.train()
    batches = made.fetcher.steps(0, made.total_steps, 0, 1)
    for step in range(made.total_steps):
        made.step(step, batches)
    after = made.evaluations["val"].run()
    ranks.leave()
    return before, after


def test_a_bert_classifier_learns(tmp_path: Path) -> None:
    """One word in five tells the class, so no average of the others would do."""
    short = ["train.max_epochs=8", "data.train.length=32", "optim.lr=0.003"]
    short += ["model.config.num_hidden_layers=1", "train.micro_batch_size=32"]
    before, after = evaluated(tmp_path, "experiment=reviews", *short)
    assert before["accuracy"] < 0.8
    assert after["accuracy"] > 0.95


def test_a_gpt2_lowers_the_loss(tmp_path: Path) -> None:
    """From all tokens alike to below what counting letters would reach."""
    short = ["train.max_steps=40", "optim.lr=0.01", "model.config.n_layer=1"]
    before, after = evaluated(tmp_path, "experiment=notes", *short)
    assert before["bits_per_token"] == pytest.approx(8, abs=0.3)
    assert after["bits_per_token"] < 2.2


def test_two_ranks_and_a_resume_give_the_same_bits(tmp_path: Path, folder: Path) -> None:
    """With dropout, and with ranks that fill an empty cache at the same time."""
    script = Path(__file__).with_name("huggingface_ranks.py")
    file = tmp_path / "found.json"
    cache = tmp_path / "cache"
    command = [
        *("env", f"HF_DATASETS_CACHE={cache}", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"),
        *(*TORCHRUN, "2", str(script), str(file)),
    ]
    finished = run(command, folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "examples/s" not in finished.stderr
    found = json.loads(file.read_text())
    ranks = Ranks(Place(), CPU, TIMEOUT)
    alone = hashes(ranks, tmp_path)
    ranks.leave()
    for name, (whole, resumed) in alone.items():
        assert found[name] == [whole, whole], name
        assert resumed == whole
    assert alone["reviews"] != alone["notes"]
    assert (cache / "csv").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "found.json"]


@pytest.mark.parametrize("name", ["reviews", "notes"])
def test_the_seed_decides_the_weights_and_two_micro_batches_make_one(name: str) -> None:
    config = compose([f"experiment={name}", "model.config.num_hidden_layers=1"])
    tasks = [build_task(config, CPU) for _ in range(2)]
    config.seed = 1
    other = build_task(config, CPU)
    one, two, three = (torch.cat([p.flatten() for p in t.parameters()]) for t in (*tasks, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    batch = build_source(config, "train").dataset.__getitems__(range(4))
    task = tasks[0].eval()
    whole, halves = task(batch), [task({k: v[s] for k, v in batch.items()}) for s in HALVES]
    assert whole.sum.item() == pytest.approx(sum(h.sum.item() for h in halves), rel=1e-5)
    assert int(whole.count) == sum(int(h.count) for h in halves)


HALVES = (slice(0, 1), slice(1, 4))


def test_the_loss_is_the_models_own_where_all_tokens_count_alike() -> None:
    """Of one micro-batch the sum ÷ count is transformers' mean, with labels shifted and masked."""
    task = build_task(compose(["experiment=notes"]), CPU).eval()
    tokens = torch.randint(0, 258, (3, 20))
    mask = torch.arange(20).expand(3, 20) < torch.tensor([[20], [7], [1]])
    labels = tokens.masked_fill(~mask, -100)
    own = task.model(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss
    for batch in ({"labels": labels}, {}):
        loss = task({"input_ids": tokens, "attention_mask": mask.long(), **batch})
        assert int(loss.count) == 19 + 6
        assert (loss.sum / loss.count).item() == pytest.approx(own.item(), rel=1e-5)


def tiny(head: str, **entries: Any) -> torch.nn.Module:
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(vocab_size=20, intermediate_size=8, **sizes, **entries)
    model: torch.nn.Module = getattr(transformers, head)(config)
    return model


def test_what_is_predicted_goes_by_the_class() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (4, 6))
    numbers = Transformers(tiny("BertForSequenceClassification", num_labels=1)).eval()
    stars = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = numbers({"input_ids": tokens, "labels": stars})
    logits = numbers.model(input_ids=tokens).logits
    assert loss.sum.item() == pytest.approx((logits.flatten() - stars).square().sum().item())
    masked = Transformers(tiny("BertForMaskedLM"), metrics=["accuracy", "perplexity"]).eval()
    labels = tokens.masked_fill(torch.rand(4, 6) < 0.5, -100)
    metrics = masked.metrics()
    masked.update(metrics, {"input_ids": tokens, "labels": labels})
    logits = masked.model(input_ids=tokens).logits
    right = (logits.argmax(-1) == labels).sum() / (labels != -100).sum()
    assert metrics["accuracy"].compute().item() == pytest.approx(right.item())
    mean = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert metrics["loss"].compute().item() == pytest.approx(mean.item(), rel=1e-5)
    with pytest.raises(Refused, match="the name of BertModel does not tell what it predicts"):
        Transformers(tiny("BertModel"))
    with pytest.raises(Refused, match="there is no 'f1'; there is perplexity"):
        Transformers(tiny("BertForMaskedLM"), metrics=["f1"])
    headless = Transformers(tiny("BertModel"), predicts="class")
    with pytest.raises(TrainingError, match="BertModel gives no logits; take a class with a head"):
        headless({"input_ids": tokens, "labels": tokens[:, 0]})
    with pytest.raises(TrainingError, match=r"logits \(4,\) do not fit labels \(4, 2\)"):
        numbers({"input_ids": tokens, "labels": tokens[:, :2]})
    with pytest.raises(TrainingError, match=r"no labels, which task\.predicts=token needs"):
        masked({"input_ids": tokens})


HEADS = {"class": "BertForSequenceClassification", "token": "BertForMaskedLM"}


@pytest.mark.parametrize("predicts", KNOWN)
@pytest.mark.parametrize("metrics", ["the usual ones", "all"])
def test_each_metric_that_may_be_named_has_a_value(predicts: Any, metrics: str) -> None:
    torch.manual_seed(0)
    model = tiny(HEADS.get(predicts, "BertLMHeadModel"), is_decoder=predicts == "next_token")
    if predicts == "number":
        model = tiny(HEADS["class"], num_labels=1)
    task = Transformers(model, predicts, KNOWN[predicts] if metrics == "all" else None).eval()
    batch = {"input_ids": torch.randint(0, 20, (8, 6))}
    if predicts in ("class", "number"):
        batch["labels"] = torch.arange(8) % 2
    elif predicts == "token":
        batch["labels"] = batch["input_ids"]
    made = task.metrics()
    with torch.no_grad():
        task.update(made, batch)
    assert set(made) == {"loss", *(KNOWN if metrics == "all" else USUAL)[predicts]}
    values = tree_leaves([metric.compute() for metric in made.values()])
    assert all(value.isfinite().any() for value in values)


def test_a_config_may_name_each_metric_that_there_is() -> None:
    """What source tells of the task's argument, which refuses others, is what the task knows."""
    assert set(get_args(Name)) == {name for names in KNOWN.values() for name in names}
    compose(["experiment=reviews", "task.metrics=[reliability,relative_mae]"])


class Copies(TorchDispatchMode):
    """Notes the shapes of what is picked out of a tensor by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten.index.Tensor:
            self.shapes.append(tuple(result.shape))
        return result


def test_logits_are_copied_for_a_metric_that_reads_them_alone() -> None:
    class Seen(torchmetrics.MeanMetric):
        def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
            super().update(logits.argmax(-1) == labels)

    labels = torch.tensor([[3, -100, 7, 1]])
    model = tiny("BertForMaskedLM")
    of_loss: list[Any] = ["perplexity", "bits_per_token", "accuracy"]
    for metrics, copied in ((of_loss, False), ([*of_loss, {"seen": Seen()}], True)):
        task = Transformers(model, metrics=metrics).eval()
        made = task.metrics()
        with torch.no_grad(), Copies() as copies:
            task.update(made, {"input_ids": labels.clamp(0), "labels": labels})
        assert ((3, 20) in copies.shapes) is copied
    assert made["seen"].compute() == made["accuracy"].compute()


# What is explained.


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Named tensors, each of a row for a sample."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[torch.as_tensor(indices)] for name, tensor in self.tensors.items()}


def of_rows(**tensors: torch.Tensor) -> Source:
    rows = Rows(**tensors)
    return Source("test", rows, Plan(len(rows), len(rows), 4, shuffled=False))


def explained(
    model: torch.nn.Module, predicts: Any = None, **batch: torch.Tensor
) -> tuple[Attributor, Attributions]:
    task = Transformers(model, predicts)
    example = Example.of(task, of_rows(**batch), CPU, 0)
    attributor = Attributor(task, example, METHODS[example.kind], steps=50)
    return attributor, attributor.attribute(batch)


def test_a_classifier_goes_by_the_word_that_decides(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same files on one rank and on two."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "film", "plot", "end", "poor", "fine"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("words.json")
    given = ["experiment=reviews", "data.train.tokenizer=words.json", "data.train.length=8"]
    given += ["model.config.vocab_size=6", "model.config.num_hidden_layers=1", "optim.lr=0.003"]
    given += ["log.tensorboard=false", f"run.dir={tmp_path / 'run'}", "eval.micro_batch_size=8"]
    config = compose(given)
    directory = open_directory(config, given)
    ranks = Ranks(Place(), CPU, TIMEOUT)
    trainer = build_trainer(config, ranks, directory, Phases())
    batches = trainer.fetcher.steps(0, trainer.total_steps, 0, 1)
    for step in range(trainer.total_steps):
        trainer.step(step, batches)
    trainer.checkpoints.save(trainer.state(trainer.total_steps), durable=True)
    trainer.checkpoints.settle()
    ranks.leave()
    assert main(["explain", str(directory.path)]) == 0
    told = capsys.readouterr().out
    assert "the class it predicts, of 30 samples of test" in told
    command = [*TORCHRUN, "2", "-m", "ddptrain", "explain", str(directory.path)]
    finished = run([*command, "--output", str(tmp_path / "two")], folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name in ("test.csv", "test.json", "test-samples.png"):
        alone = (directory.explained / name).read_bytes()
        assert alone == (tmp_path / "two" / name).read_bytes(), name
    with (directory.explained / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["token"] for row in rows} == set(words)
    assert rows[0]["token"] in ("poor", "fine")  # the other class may be that of the baseline
    assert float(rows[0]["share"]) > 2 * float(rows[1]["share"])
    assert float(rows[0]["mean attribution"]) > 0
    assert (rows[-1]["token"], float(rows[-1]["share"])) == ("[PAD]", 0)
    facts = json.loads((directory.explained / "test.json").read_text())
    assert facts["largest_convergence_delta"] < 0.01 * facts["mean_absolute_change"]


def tiny_gpt2() -> torch.nn.Module:
    import transformers

    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    model: torch.nn.Module = transformers.GPT2ForSequenceClassification(config)
    return model


def test_a_subclass_says_what_is_explained() -> None:
    class Mine(Transformers):
        def explained(self, inputs: torch.Tensor) -> torch.Tensor:
            return -self.model(input_ids=inputs).logits

    torch.manual_seed(0)
    task = Mine(tiny("BertForSequenceClassification")).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([0])}
    usual = Transformers(task.model).eval().explained_of(batch)
    assert torch.equal(task.explained_of(batch), -usual)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("first", [torch.zeros(6).long(), torch.arange(6)], ids=["types", "places"])
def test_tokens_are_told_from_their_positions_and_types(name: str, first: torch.Tensor) -> None:
    """Where these are the same numbers; what fills up has no part in it."""
    torch.manual_seed(0)
    model = tiny("BertForSequenceClassification") if name == "bert" else tiny_gpt2()
    tokens = torch.cat([first[None], torch.randint(1, 20, (3, 6))])
    tokens[1, 4:] = 0
    mask = (tokens != 0).long()
    mask[0] = 1
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}
    attributor, found = explained(model, **batch)
    assert attributor.lookup is not None
    assert attributor.lookup.layer is model.get_input_embeddings()
    values = found.by_method[INTEGRATED]
    assert not values[tokens == 0].any()
    assert values[tokens != 0].all()
    assert found.deltas.abs().max() < 0.01 * found.changes.abs().max()
    model.eval()
    of_batch, empty = (
        model(input_ids=t, attention_mask=mask).logits for t in (tokens, torch.zeros_like(tokens))
    )
    assert torch.equal(found.explained, of_batch.argmax(1))
    if name == "bert":  # GPT2 looks in the tokens for where a text ends
        whole = (of_batch - empty).gather(1, found.explained[:, None]).squeeze(1).detach()
        torch.testing.assert_close(values.sum(1), whole, atol=1e-5, rtol=0)


def test_the_baseline_of_tokens_is_what_the_model_fills_up_with() -> None:
    torch.manual_seed(0)
    model = tiny("BertForSequenceClassification", num_labels=1, pad_token_id=3)
    tokens = torch.tensor([[5, 3, 0, 7], [3, 3, 9, 1]])
    _, found = explained(model, input_ids=tokens, labels=torch.tensor([1.0, 2.0]))
    assert torch.equal(found.by_method[INTEGRATED] != 0, tokens != 3)
    assert found.explained.tolist() == [-1, -1]


def test_images_of_a_column_are_explained() -> None:
    import datasets
    import transformers

    torch.manual_seed(0)
    pixels = torch.rand(6, 1, 4, 4)
    rows = {"pixel_values": pixels.tolist(), "kind": [0, 1] * 3}
    datasets.Dataset.from_dict(rows).to_parquet("p.parquet")
    data = load(path="p.parquet", columns=["pixel_values"], label="kind", fractions=[1, 0, 0])
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=8, image_size=4, patch_size=2, num_channels=1
    )
    batch = data.__getitems__(range(6))
    attributor, found = explained(transformers.ViTForImageClassification(config), **batch)
    assert (attributor.kind, attributor.outputs) == ("images", 2)
    assert {values.shape for values in found.by_method.values()} == {(6, 4, 4)}
    assert found.deltas.abs().max() < 0.01 * found.changes.abs().max()


class Weighed(torch.nn.Module):
    """A model of numbers, which gives what one of transformers does."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=(x @ self.weights * scale)[:, None])


def test_numbers_are_explained_with_the_rest_of_each_sample_as_it_is() -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(9, 3), "scale": torch.rand(9) + 1}
    model = Weighed()
    batch["labels"] = model(**batch).logits.detach().squeeze(1)
    _, found = explained(model, "number", **batch)
    expected = model.weights * batch["x"] * batch["scale"][:, None]
    torch.testing.assert_close(found.by_method[INTEGRATED], expected.detach(), atol=1e-5, rtol=0)
    source = of_rows(**batch)
    fetcher, ranks = Fetcher(source, CPU), Ranks(Place(), CPU, TIMEOUT)
    evaluation = Evaluation(Transformers(model, "number"), fetcher, ranks, contextlib.nullcontext)
    batches = list(fetcher.fetch(source.plan.micro_batches(0)))
    importance = measure(evaluation, batches, Metric("loss", is_larger_better=False))
    assert importance.value == 0
    assert importance.worse[2] == [0] * REPEATS
    assert 0 < importance.means[0] < importance.means[1]
    with pytest.raises(Refused, match="which of x, y is to be explained, Linear does not tell"):
        explained(torch.nn.Linear(1, 1), "number", x=batch["x"], y=batch["x"])


def test_what_is_predicted_of_each_token_is_not_explained() -> None:
    import transformers

    tokens = torch.ones(2, 4).long()
    for head in ("LMHeadModel", "ForMaskedLM"):
        with pytest.raises(
            Refused, match="there are scores of each token; explained is"
        ) as refused:
            explained(tiny(f"Bert{head}", is_decoder=head != "ForMaskedLM"), input_ids=tokens)
        assert "\n" not in str(refused.value)
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    with pytest.raises(Refused, match="both the encoder and the decoder read the tokens"):
        explained(
            transformers.T5ForSequenceClassification(transformers.T5Config(**sizes)),
            input_ids=tokens,
        )


def test_tokens_have_names() -> None:
    names = load(text="review", label="opinion", length=8).token_names
    assert names is not None
    assert [names[n] for n in (0, 1, ord("a") + 2, ord(" ") + 2, 2, 255)] == [
        *("[PAD]", "[END]", "a", "␣", "\\x00", "\\xfd"),
    ]  # fmt: skip
    assert len(names) == 258
    import transformers

    names = load(text="review", length=8, tokenizer=transformers.ByT5Tokenizer()).token_names
    assert names is not None
    assert [names[n] for n in (0, 1, ord("a") + 3, ord(" ") + 3)] == ["<pad>", "</s>", "a", "␣"]
    assert load(text=None, columns=["stars"]).token_names is None


# What comes out of files.


def load(split: str = "train", **more: Any) -> HuggingFace:
    return HuggingFace(split, **{"path": "reviews.csv", "fractions": [0.5, 0.25, 0.25]} | more)


def test_a_text_is_cut_or_filled_up() -> None:
    Path("two.jsonl").write_text('{"t": "héé", "y": 2}\n{"t": "abcdefgh", "y": 1}\n' * 8)
    data = load(path="two.jsonl", text="t", label="y", length=6, fractions=[1, 0, 0])
    batch = data.__getitems__([0, 1])
    assert batch["input_ids"].tolist() == [
        [ord("h") + 2, *(b + 2 for b in "éé".encode()), 0],
        [ord(c) + 2 for c in "abcdef"],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert (batch["labels"].tolist(), data.class_names) == ([1, 0], ["1", "2"])
    assert {name: tensor.tolist() for name, tensor in data[1].items()} == {
        name: tensor[1].tolist() for name, tensor in batch.items()
    }


def test_packed_texts_are_predicted_token_by_token_once() -> None:
    data = load(path="notes/a.txt", text="text", length=10, pack=True, fractions=[1, 0, 0])
    lines = Path("notes/a.txt").read_text().splitlines()
    expected = [n for line in lines for n in (*(b + 2 for b in line.encode()), 1)]
    windows = data.__getitems__(range(len(data)))["input_ids"].tolist()
    predicted = windows[0][:1] + [n for window in windows for n in window[1:]]
    assert predicted == expected[: len(predicted)]
    assert len(expected) - len(predicted) < 9
    whole = load(
        path="notes", text="text", length=10, pack=True, options={"sample_by": "document"},
        fractions=[1, 0, 0],
    )  # fmt: skip
    assert bytes(n - 2 for n in whole[0]["input_ids"].tolist()).decode() == "\n".join(lines)[:10]


def test_splits_of_a_saved_folder_and_its_class_names() -> None:
    import datasets

    kind = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"ids": datasets.List(datasets.Value("int32")), "y": kind})
    rows = [{"ids": list(range(1, 2 + i)), "y": i % 2} for i in range(6)]
    part = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(train=part, validation=part.select([5, 4])).save_to_disk("saved")
    more = {"path": "saved", "label": "y", "columns": ["ids"], "length": 3, "outputs": 2}
    data, val = load(**more), load("val", **more)
    assert (len(data), len(val), data.class_names) == (6, 2, ["no", "yes"])
    assert val.__getitems__([0, 1])["ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert data[1]["ids"].tolist() == [1, 2, 0]
    with pytest.raises(Refused, match=r"no split 'test' for test, only train, validation; set"):
        load("test", **more)
    assert load("test", **more, splits={"test": "validation"})[0]["labels"] == 1
    with pytest.raises(Refused, match=r"'ids' of saved \(train\) have 1 to 6 numbers; set length"):
        load(**more | {"length": None})
    parts = {"train": "reviews.csv", "val": "saved"}
    with pytest.raises(Refused, match="saved holds splits of its own, train, validation; give it"):
        load("val", path=parts, columns=["stars"])
    with pytest.raises(Refused, match="names nothing for test, only for train, val"):
        load("test", path=parts, columns=["stars"])


def test_columns_of_numbers_are_handed_on() -> None:
    import datasets

    rows = {"x": [0.5, 1.5, 2.5], "grid": [[[1, 2], [3, 4]]] * 3, "input_ids": [[5], [6, 7], [8]]}
    datasets.Dataset.from_dict(rows).to_parquet("n.parquet")
    wanted = ["x", "grid", "input_ids"]
    data = load(path="n.parquet", columns=wanted, length=2, label="x", fractions=[1, 0, 0])
    batch = data.__getitems__([2, 1])
    assert batch["x"].dtype == batch["labels"].dtype == torch.float32
    assert batch["grid"].shape == (2, 2, 2)
    assert batch["input_ids"].tolist() == [[8, 0], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_a_changed_file_is_read_anew_and_workers_give_the_same() -> None:
    data = load(text="review", label="opinion", length=16)
    assert load("val", text="review", label="opinion", length=16).class_names == ["bad", "good"]
    source = build_source(compose(["experiment=reviews"]), "val")
    alone, loaded = (Fetcher(source, CPU, workers).digest() for workers in (0, 1))
    assert alone == loaded
    lines = Path("reviews.csv").read_text()
    Path("copy.csv").write_text(lines)
    assert len(load(path="copy.csv", text="review", length=16)) == len(data)
    Path("copy.csv").write_text(lines + "more,bad,1\nstill more,bad,1\n")
    os.utime("copy.csv", (1, 1))
    assert len(load(path="copy.csv", text="review", length=16)) == len(data) + 1


def test_tokenizers_of_transformers() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    more = {"path": "notes/a.txt", "text": "text", "length": 14, "tokenizer": "tokenizer.json"}
    first = Path("notes/a.txt").read_text().splitlines()[0].split()
    assert load(**more, fractions=[1, 0, 0])[0]["input_ids"].tolist() == [
        *(words[word] for word in first), 0, 0,
    ]  # fmt: skip
    packed = more | {"pack": True, "fractions": [1, 0, 0]}
    with pytest.raises(Refused, match="pack: the tokenizer says of no token that it ends a text"):
        load(**packed)
    with pytest.raises(
        Refused, match=r"end: the tokenizer has no token 'thre'; did you mean three"
    ):
        load(**packed, end="thre")
    assert load(**packed, end="?")[0]["input_ids"].tolist() == [
        *(words[word] for word in first), words["?"],
        words[Path("notes/a.txt").read_text().splitlines()[1].split()[0]],
    ]  # fmt: skip
    with pytest.raises(
        Refused, match="end: 'one' goes between texts that pack joins; set pack=true"
    ):
        load(**more, end="one")
    with pytest.raises(Refused, match="end: bytes have an end of their own; leave 'x' out"):
        load(**packed | {"tokenizer": "bytes"}, end="x")
    source = build_source(
        compose(
            [
                *("experiment=notes", "data.train.pack=false", "model.config.vocab_size=384"),
                "data.train.tokenizer={_target_:transformers.ByT5Tokenizer}",
            ]
        ),
        "train",
    )
    assert source.dataset[0]["input_ids"][-1] in (0, 1)  # its end, or what fills up after it
    with pytest.raises(Refused, match=r"has 4 tokens, but model\.config\.vocab_size=3; set"):
        load(**more, vocabulary=3)
    with pytest.raises(Refused, match=r"tokenizer: reviews\.csv is no tokenizer\.json"):
        load(**more | {"tokenizer": "reviews.csv"})
    with pytest.raises(Refused, match=r"tokenizer: t\.json: no such file"):
        load(**more | {"tokenizer": "t.json"})
    with pytest.raises(Refused, match="tokenizer: int is none; expected bytes"):
        load(**more | {"tokenizer": 3})


# What is refused.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"text": "revew"}, "text: reviews.csv has no column 'revew'; did you mean review"),
        ({"label": "opnion"}, "label: reviews.csv has no column 'opnion'; did you mean opinion"),
        ({"split": "dev"}, "split: expected one of train, val, test, got 'dev'"),
        ({"path": "away.csv"}, "away.csv: no such file, no folder with"),
        ({"path": "https://x.org/a.csv"}, "a.csv: no such file, .* nothing is fetched"),
        ({"path": "conf/experiment/notes.yaml"}, "nothing reads .yaml; expected files whose"),
        ({"path": "*s.csv", "options": {"delimitr": ";"}}, "did you mean options.delimiter"),
        ({"path": "ragged.csv"}, "ragged.csv: cannot be read by datasets: ParserError: "),
        ({"path": "gap.csv"}, "'review' has no value in 1 of 4 rows, first in row 2; fill"),
        (
            {"path": "hole.csv", "label": "stars"},
            "'stars' has no value in 1 of 3 rows, first in row 2",
        ),
        (
            {"path": "hole.parquet", "label": "stars"},
            "'stars' has no value in 1 of 3 rows, .* row 2",
        ),
        ({"path": "empty.jsonl"}, "empty.jsonl: it is empty"),
        ({"path": "empty.json"}, "empty.json: it is empty"),
        ({"path": "empty.csv"}, "empty.csv: it is empty"),
        ({"path": "empty.txt"}, "empty.txt: it is empty"),
        ({"outputs": 3}, "there are 2 classes .bad, good., but the model has 3 outputs; give it 2"),
        ({"outputs": 1}, "they are classes, but the model has one output, for a number"),
        ({"length": None}, "length: a text needs it"),
        ({"length": 900, "positions": 512}, "length: 900 tokens, but the model has 512 positions"),
        ({"vocabulary": 99}, "has 258 tokens, but model.config.vocab_size=99; set"),
        ({"text": "stars"}, "text: column 'stars' of reviews.csv is of int64, not text"),
        ({"columns": ["opinion"]}, "columns: 'opinion' of reviews.csv is of type .*string"),
        ({"columns": "stars"}, r"columns: expected a list of texts, such as \[one, two\], got 'st"),
        ({"text": None}, "text: name the column of texts, or under columns those of numbers"),
        ({"pack": True}, "pack: it joins texts for a language model"),
        ({"columns": ["input_ids"]}, "columns: input_ids and attention_mask come of text"),
        ({"splits": {"train": "all"}}, "no split 'all' for train, only train"),
        ({"fractions": [0, 0.5, 0.5]}, "of 200 rows leave none for train"),
    ],
)
def test_one_line_says_what_is_wrong(more: dict[str, Any], message: str) -> None:
    Path("ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    Path("gap.csv").write_text("review,opinion\na,x\n,y\nb,x\nc,y\n")
    Path("hole.csv").write_text("review,stars\na,0.5\nb,nan\nc,1.5\n")
    hole = {"review": ["a", "b", "c"], "stars": [0.5, float("nan"), 1.5]}
    pyarrow.parquet.write_table(pyarrow.table(hole), "hole.parquet")
    for suffix in ("jsonl", "json", "csv", "txt"):
        Path(f"empty.{suffix}").write_text("")
    usual = {"text": "review", "label": "opinion", "length": 16}
    with pytest.raises(Refused, match=message) as refused:
        load(**usual | more)
    assert "\n" not in str(refused.value)


THREE = ["experiment=reviews", "data.train.label=kind", "log.tensorboard=false"]
THREE += ["data.train.path=three.csv", "model.config.hidden_size=8", "~model.config.num_labels"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["+model.config.id2label={0: a, 1: b, 2: c}"], None),
        ([], r"data\.train: label: there are 3 classes \(a, b, c\), but the model has 2 outputs"),
        (
            ["data.train.label=share"],
            "data.train: label: they are numbers, but the model has 2 out",
        ),
        (
            ["task.predicts=number"],
            "3 classes, but the model predicts a number; set data.train.out",
        ),
    ],
)
def test_the_outputs_of_a_model_are_its_own(
    more: list[str], message: str | None, tmp_path: Path
) -> None:
    """Known only once it is built: of names of classes, of transformers' default, of a folder."""
    Path("three.csv").write_text(
        "review,kind,share\n" + "".join(f"x,{k},0.5\n" for k in "abc" * 20)
    )
    config = compose([*THREE, *more])
    ranks = Ranks(Place(), CPU, TIMEOUT)
    try:
        with pytest.raises(Refused, match=message) if message else contextlib.nullcontext():
            build_trainer(config, ranks, RunDirectory(tmp_path), Phases())
    finally:
        ranks.leave()


def test_a_misspelt_entry_of_a_models_config_is_refused() -> None:
    with pytest.raises(Refused, match=r"unknown key model\.config\.hiden_size: .* hidden_size\?"):
        build_task(compose(["experiment=reviews", "model.config.hiden_size=8"]), CPU)
    with pytest.raises(Refused, match="expected int, got str"):
        build_task(compose(["experiment=reviews", "model.config.hidden_size=eight"]), CPU)
    with pytest.raises(Refused, match="did you mean accuracy"):
        compose(["experiment=notes", "task.metrics=[acuracy]"])


def test_a_model_on_disk_has_what_entries_it_has(tmp_path: Path) -> None:
    """Also those of an older version; what a user writes beside is looked at as ever."""
    sizes = ["model.config.n_embd=8", "model.config.n_layer=1"]
    model = build_task(compose(["experiment=notes", *sizes]), CPU).model
    model.config.n_ctx = 64
    model.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    assert {"model_type", "n_ctx"} <= plain.keys()
    config = compose(["experiment=notes"])
    config.model = {
        "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": str(tmp_path),
    }
    read = build_task(config, CPU).model
    assert torch.equal(read.transformer.wte.weight, model.transformer.wte.weight)
    given = {"_target_": "transformers.GPT2Config", "model_type": "gpt2", "hidden_size": 8}
    check_entries("model", {"config": {**given, "attn_implementation": "eager"}})
    with pytest.raises(Refused, match=r"unknown key model\.config\.n_ctx: GPT2Config has no such"):
        check_entries("model", {"config": {**given, "n_ctx": 64}})


@pytest.mark.parametrize("package", ["datasets", "transformers"])
def test_without_the_packages_one_line_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Refused, match=rf"with {package}, and .* install 'ddptrain\[huggingface\]'"):
        import_package(package)


ASKED = """
import socket, sys
from hydra.utils import instantiate
from ddptrain.errors import Refused
from ddptrain.parts import build_part

def ask(*where, **more):
    print("asked", where[0])
    raise OSError("no network")

socket.getaddrinfo = ask
name = "transformers.AutoTokenizer.from_pretrained"
try:
    build_part("tokenizer", instantiate, {"_target_": name, "_args_": ["some/body"]})
except Refused as error:
    print(error)
"""


def test_a_tokenizer_that_a_config_names_asks_no_network() -> None:
    """In a fresh process, whose first part it is; the libraries read the environment once."""
    names = [name for name in os.environ if name.endswith("_OFFLINE")]
    finished = run(["env", *(f"-u{name}" for name in names), sys.executable, "-c", ASKED])
    assert "tokenizer: could not build transformers.AutoTokenizer" in finished.stdout
    assert "asked" not in finished.stdout


@pytest.mark.parametrize("asked", ["0", "1"])
def test_one_variable_of_the_environment_decides_for_all_libraries(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in packages.OTHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(packages.HUB, asked)
    packages.stay_offline()
    assert [os.environ[name] for name in packages.OTHERS] == [asked, asked]


def test_a_model_of_a_package_that_is_not_there_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(signatures.EXTRAS, "tranformers", "huggingface")
    with pytest.raises(Refused, match=r"no module 'tranformers' .*ddptrain\[huggingface\]"):
        compose(["experiment=reviews", "model._target_=tranformers.BertModel"])
