"""Recommendation: what is held out, what is a negative, what is refused, and what is learnt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import train
from measured import values_on
from one_process import taken, train_here
from own_files import write_example
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.retrieval import RetrievalMAP

from ddptrain.build import build_source
from ddptrain.compose import compose
from ddptrain.data import Interactions
from ddptrain.data.fetch import Source
from ddptrain.data.hold_out import (
    GIVEN,
    LEFT_OUT,
    TEST,
    TRAIN,
    VAL,
    hold_out_interactions,
    hold_out_users,
    numbered_negatives,
)
from ddptrain.data.library_imports import StandardLibraryImports, imports, library_imports
from ddptrain.data.plan import MicroBatch, Plan
from ddptrain.data.splits import FRACTIONS, SPLITS
from ddptrain.errors import Refused
from ddptrain.models import MatrixFactorisation, TwoTower
from ddptrain.state import fingerprint
from ddptrain.tasks import Recommendation
from ddptrain.tasks.ranking_metrics import MRR, NDCG, HitRate
from ddptrain.tasks.recommendation import Name

Given = dict[str, Any]
SHORT = ["train.max_epochs=8", "eval.every_steps=null", "checkpoint.keep_best=0"]
PAIRS = st.sets(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=90)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def numbered(pairs: set[tuple[int, int]]) -> tuple[Any, Any]:
    """Users and items, each numbered from 0 without gaps, in order."""
    users, items = np.array(sorted(pairs)).T
    return np.unique(users, return_inverse=True)[1], np.unique(items, return_inverse=True)[1]


# What is held out.


@given(PAIRS)
def test_of_a_user_one_is_for_val_and_one_for_test_and_training_has_each_item(
    pairs: set[tuple[int, int]],
) -> None:
    users, items = numbered(pairs)
    roles = hold_out_interactions(users, items)
    assert {*roles.tolist()} <= {TRAIN, VAL, TEST}
    assert {*items[roles == TRAIN]} == {*items}
    for user in range(users.max() + 1):
        of_user = roles[users == user]
        assert (of_user == TRAIN).any()
        assert all((of_user == role).sum() <= 1 for role in (VAL, TEST))
        assert len(of_user) >= 3 or (of_user == TRAIN).all()


def test_where_every_item_is_common_nobody_with_three_is_passed_over() -> None:
    users, items = numbered({(user, (user + step) % 20) for user in range(20) for step in range(5)})
    roles = hold_out_interactions(users, items)
    held = [np.bincount(users[roles == role], minlength=20) for role in (VAL, TEST)]
    assert np.mean(held) > 0.9


@given(PAIRS)
def test_of_a_held_out_user_one_is_found_by_the_others(pairs: set[tuple[int, int]]) -> None:
    users, items = numbered(pairs)
    roles = hold_out_users(users, items, FRACTIONS)
    trained = {*items[roles == TRAIN]}
    for user in range(users.max() + 1):
        of_user = {*roles[users == user].tolist()}
        assert of_user == {TRAIN} or TRAIN not in of_user
        if found := of_user & {VAL, TEST}:
            assert len(found) == 1
            assert GIVEN in of_user
            assert np.isin(roles[users == user], list(found)).sum() == 1
    assert {*items[np.isin(roles, [VAL, TEST, GIVEN])]} <= trained
    assert all(item not in trained or roles[users == user].max() == LEFT_OUT
               for user, item in zip(users[roles == LEFT_OUT], items[roles == LEFT_OUT],
                                     strict=True))  # fmt: skip


@given(st.sets(st.integers(0, 30)), st.integers(1, 31))
def test_negatives_are_the_items_that_are_no_positives(chosen: set[int], items: int) -> None:
    positives = np.array(sorted(item for item in chosen if item < items), dtype=np.int64)
    rest = sorted({*range(items)} - {*positives.tolist()})
    assert numbered_negatives(positives, np.arange(len(rest))).tolist() == rest


# A file of the user's.


def table(rows: str, header: str = "who,what") -> str:
    Path("t.csv").write_text(f"{header}\n{rows}\n")
    return "t.csv"


def every_pair(users: int, items: int) -> str:
    return "\n".join(f"u{user},i{(user + 2 * step) % items}" for user in range(users)
                     for step in range(items // 2))  # fmt: skip


def test_a_sample_holds_one_interaction_or_one_user() -> None:
    path = table(every_pair(20, 9))
    training, val, test = (Interactions(split, path, "who", "what") for split in SPLITS)
    samples = [training[index] for index in range(len(training))]
    has = torch.zeros(20, 9, dtype=torch.bool)
    for sample in samples:
        has[sample["user"], sample["item"]] = True
    for sample in samples:
        known = has[sample["user"]].clone()
        known[sample["item"]] = False
        assert torch.equal(sample["known"], known)
        assert sample["weight"] == 1
    for sample in (val[index] for index in range(len(val))):
        assert torch.equal(sample["known"], has[sample["user"]])
        assert sample["relevant"].sum() == 1
        has[sample["user"]] |= sample["relevant"]  # in test those of val are known
    for sample in (test[index] for index in range(len(test))):
        assert torch.equal(sample["known"], has[sample["user"]])
        assert not (sample["relevant"] & sample["known"]).any()
    assert len(val) + len(test) + len(training) == 20 * 4


def test_the_order_of_rows_does_not_matter_and_repeats_add_up() -> None:
    rows = [f"{row},{1 + number % 3}" for number, row in enumerate(every_pair(12, 9).split())]
    columns = {"user": "who", "item": "what", "weight": "n"}
    path = table("\n".join(rows), "who,what,n")
    before = [Interactions(split, path, **columns) for split in SPLITS]
    halves = [row.replace(",1", ",0.5") for row in rows if row.endswith(",1")]
    others = [row for row in rows if not row.endswith(",1")]
    path = table("\n".join(halves + others[::-1] + halves), "who,what,n")
    for one, other in zip(before, (Interactions(s, path, **columns) for s in SPLITS), strict=True):
        assert len(one) == len(other)
        for index in range(len(one)):
            torch.testing.assert_close(one[index], other[index])
    weights = torch.stack([before[0][index]["weight"] for index in range(len(before[0]))])
    assert weights.mean() == pytest.approx(1)
    assert len(weights.unique()) == 3


def test_parquet_and_numbers_as_names() -> None:
    users, items = zip(*(row.split(",") for row in every_pair(12, 9).split()), strict=True)
    columns = {"who": [int(name[1:]) for name in users], "what": items}
    pyarrow.parquet.write_table(pyarrow.table(columns), "t.parquet")
    found = Interactions("val", "t.parquet", "who", "what")
    assert found.user_names == sorted(map(str, range(12)))
    assert found.item_names == [f"i{i}" for i in range(9)]


@pytest.mark.parametrize("kind", [pyarrow.int64(), pyarrow.uint64(), pyarrow.decimal128(20, 0)])
def test_whole_numbers_that_float64_has_not_are_names_of_their_own(kind: pyarrow.DataType) -> None:
    users = [2**60 + user for user in range(3) for _ in range(3)]
    columns = {"who": pyarrow.array(users).cast(kind), "what": ["i0", "i1", "i2"] * 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), "t.parquet")
    found = Interactions("train", "t.parquet", "who", "what")
    assert found.user_names == [str(2**60 + user) for user in range(3)]
    columns["who"] = pyarrow.array([*users[:8], None]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table(columns), "t.parquet")
    with pytest.raises(Refused, match="row 9 has no value in column 'who'"):
        Interactions("train", "t.parquet", "who", "what")


def test_negatives_are_drawn_by_epoch_and_sample_alone() -> None:
    data = Interactions("train", table(every_pair(12, 9)), "who", "what", negatives=50)
    source = Source("train", data, Plan(len(data), len(data), 4, seed=3))

    def drawn(epoch: int, indices: list[int]) -> Tensor:
        found = source.of_indices(indices, MicroBatch(0, 0, epoch, 0, len(indices)))
        has = found["known"].scatter(1, found["item"].unsqueeze(1), value=True)
        assert not has.gather(1, found["negatives"]).any()
        assert all(len(row.unique()) == 9 - has[0].sum() for row in found["negatives"])
        negatives: Tensor = found["negatives"]
        return negatives

    together = drawn(0, [5, 7])
    assert torch.equal(together[1:], drawn(0, [7]))
    assert not torch.equal(together, drawn(1, [5, 7]))


SAID = {"split_column": "part"}
WRONG: dict[str, tuple[str, str, Given, str]] = {
    "no such column": ("who,wat", "a,x", {}, "item: t.csv has no column 'what'; did you mean wat?"),
    "no item": ("who,what", "a,x\nb,", {}, "t.csv: line 3 has no value in column 'what'; correct"),
    "no weight": (
        "who,what,n", "a,x,1\na,y,0\na,z,", {"weight": "n"},
        "t.csv: line 3 (and 1 more) has a weight in column 'n' that is missing or not above 0; "
        "correct it, or take it out",
    ),
    "one interaction each": (
        "who,what", "\n".join(f"u{user},x" for user in range(20)), {"split": "test"},
        "t.csv: split test comes out empty: no user has three items, one each for train, val and "
        "test; take more rows, or set data.test=null",
    ),
    "items of one user": (
        "who,what", "\n".join(f"a,i{item}" for item in range(20)), {"split": "test"},
        "one interaction of each item stays in train, which leaves users with three items none to",
    ),
    "nothing left by test": (
        "who,what", "a,x\na,y\na,z" + "".join(f"\nu{user},x" for user in range(20)),
        {"split": "val"},
        "one interaction of each item stays in train, which leaves users with three items one at "
        "most, for test; take more rows, or set data.val=null",
    ),
    "no row of val": (
        "who,what,part", "a,x,train\na,y,test", SAID | {"split": "val"},
        "t.csv: no row has 'val' in column 'part'; set data.val=null if there is no such split",
    ),
    "no row of train": (
        "who,what,part", "a,x,val\na,y,val", SAID | {"split": "val"},
        "t.csv: no row has 'train' in column 'part'",
    ),
    "no user of train": (
        "who,what", every_pair(9, 9), {"split_by": "user", "fractions": [0, 0.5, 0.5],
                                       "split": "val"},
        "t.csv: fractions=[0, 0.5, 0.5] of 9 users leave none for train; choose others",
    ),
    "no user of val": (
        "who,what", every_pair(1, 9), {"split_by": "user", "split": "val"},
        "t.csv: fractions=[0.7, 0.15, 0.15] of 1 users leave none for val; choose others",
    ),
    "users of val have what nobody has": (
        "who,what", "\n".join(f"u{i},i{2 * i}\nu{i},i{2 * i + 1}" for i in range(20)),
        {"split_by": "user", "split": "val"},
        "t.csv: split val comes out empty: none of its users has two items that users of train",
    ),
    "an item only in test": (
        "who,what,part", "a,x,train\na,y,train\na,z,test", SAID,
        "t.csv: line 4 is of an item that no row of train has; correct it, or take it out",
    ),
    "a user only in test": (
        "who,what,part", "a,x,train\na,y,train\nb,x,test", SAID,
        "t.csv: line 4 is of a user that no row of train has",
    ),
    "in two splits": (
        "who,what,part", "a,x,train\na,y,train\na,x,test", SAID,
        "is in another split than a row of the same user and item",
    ),
    "no split": ("who,what,part", "a,x,trian", SAID, "'trian' in column 'part' is no split; did"),
    "no list": (
        "who,what", "a,x", {"missing_values": "na"},
        "missing_values: expected a list of texts, such as [one, two], got 'na'",
    ),
    "no way to split": (
        "who,what", "a,x", {"split_by": "itm"}, "split_by: expected one of interaction, user, got",
    ),
    "fewer users": (
        "who,what", every_pair(12, 9), {"users": 9},
        "t.csv: there are 12 users, but model.users=9; set model.users=12",
    ),
    "other items": (
        "who,what", every_pair(12, 9), {"items": 8},
        "there are 9 items (i0, i1, i2, i3, i4, i5, i6, i7, …), but model.items=8; set model.ite",
    ),
    "a vector for each user": (
        "who,what", every_pair(40, 9), {"users": 40, "split_by": "user"},
        "split_by=user holds out whole users, of whom a model with one vector for each user",
    ),
    "no negatives": ("who,what", every_pair(9, 9), {"negatives": 0}, "negatives: expected a nu"),
    "nothing is negative": (
        "who,what", "a,x\na,y\nb,x", {"negatives": 1}, "user 'a' has every item, which leaves none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(case: str) -> None:
    header, rows, options, message = WRONG[case]
    given: Given = {"split": "train", "user": "who", "item": "what"} | options
    with pytest.raises(Refused) as refused:
        Interactions(path=table(rows, header), **given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    write_example(tmp_path, "interactions")
    message = r"data.train: ratings.csv: there are 12 items \(film0, film1, film10, film11, film2, "
    with pytest.raises(Refused, match=message):
        build_source(compose(["experiment=mine", "model.items=7"]), "train")
    message = "data.val: ratings.csv: there are 30 users, but model.users=7; set model.users=30"
    with pytest.raises(Refused, match=message):
        build_source(compose(["experiment=mine", "model.users=7"]), "val")


@pytest.mark.long
def test_a_file_gives_the_same_bits_on_one_rank_and_on_two(tmp_path: Path) -> None:
    write_example(tmp_path, "interactions")
    short = [
        *("experiment=mine", "parallel.reduction=exact", "train.max_steps=4", "model=two_tower"),
        *("~model.users", "data.train.negatives=5", "task.loss=bpr"),
    ]
    alone = taken(tmp_path, *short)
    both = train(tmp_path / "both", 2, *short, folder=tmp_path)
    assert fingerprint(alone.task) == both["weights_sha256"]
    for metric, value in alone.evaluations["test"].run().items():
        assert both["metrics"][f"test/{metric}"] == value


# Losses, scores and metrics.


class Said(nn.Module):
    """A model that gives the scores it is made with, a row for each user."""

    def __init__(self, scores: list[list[float]]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, user: Tensor, known: Tensor, candidates: Tensor | None = None) -> Tensor:
        scores = self.scores[user]
        return scores if candidates is None else scores.gather(1, candidates)


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    for metric in metrics.values():
        metric.distributed_available_fn = bool  # other tests here have made a group of ranks
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def marks(*rows: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_metrics_are_those_worked_out_by_hand() -> None:
    """Of user 0 the item is third, behind two, for the best one is known; of user 1 it is first."""
    task = Recommendation(
        Said([[9.0, 5.0, 3.0, 4.0], [3.0, 4.0, 7.0, 2.0]]),
        k=2,
        metrics=["hit_rate", "ndcg", "mrr", {"map": RetrievalMAP()}],
    )
    metrics = task.metrics()
    batch = {
        "user": torch.tensor([0, 1]),
        "known": marks("x...", "..x."),
        "relevant": marks("..x.", ".x.."),
    }
    task.update(metrics, batch)
    found = values(metrics)
    assert found["hit_rate"] == 0.5
    assert found["ndcg"] == 0.5
    assert found["mrr"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["map"] == pytest.approx((1 / 3 + 1) / 2)
    by_hand = [
        math.log(1 + math.exp(2) + math.exp(1)), math.log(1 + math.exp(-1) + math.exp(-2)),
    ]  # fmt: skip
    assert found["loss"] == pytest.approx(sum(by_hand) / 2)
    task(batch).sum.backward()
    gradient = task.model.scores.grad
    assert torch.equal(gradient == 0, batch["known"])


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(1, 9), st.integers(2, 12)),
    distinct=st.sampled_from([1, 3, 1000]),
    odd=st.sampled_from([None, -math.inf, math.inf, math.nan]),
    ranks=st.integers(1, 3),
    micro=st.integers(1, 4),
    k=st.integers(1, 14),
)
def test_metrics_are_those_of_all_users_and_items_in_one_place(
    seed: int, size: tuple[int, int], distinct: int, odd: float, ranks: int, micro: int, k: int
) -> None:
    """On any number of ranks, with ties, and with users who have nothing to be found or ranked."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-distinct, distinct, size, generator=generator) / 2
    if odd is not None:
        scores[torch.rand(size, generator=generator) < 0.1] = odd
    known, relevant = torch.rand(2, *size, generator=generator) < torch.tensor([[[0.4]], [[0.3]]])
    known[0, :2], known[-1, 1:] = False, True
    users = torch.arange(size[0])
    data: Any = [{"user": user, "known": known[user], "relevant": relevant[user]} for user in users]
    names = {"hit_rate": HitRate(k), "ndcg": NDCG(k), "mrr": MRR()}

    def task() -> Recommendation:
        general = [{f"general_{name}": metric} for name, metric in names.items()]
        return Recommendation(Said(scores.tolist()), "bpr", k, [*get_args(Name), *general])

    found = values_on(ranks, task, (data,), micro)
    alone = values_on(1, task, (data,), micro)
    for name in names:
        assert found[name] == pytest.approx(found[f"general_{name}"], abs=1e-6, nan_ok=True)
        assert found[name] == pytest.approx(alone[name], abs=0, rel=0, nan_ok=True)


def test_an_evaluation_keeps_two_numbers_of_a_micro_batch() -> None:
    task = Recommendation(Said([[1.0] * 50] * 20))
    metrics = task.metrics()
    nothing = torch.zeros(20, 50, dtype=torch.bool)
    batch = {"user": torch.arange(20), "known": nothing, "relevant": nothing.clone()}
    batch["relevant"][:, 7] = True
    task.update(metrics, batch)
    for metric in metrics.values():
        states = [t for kept in metric.metric_state.values() for t in kept]
        assert sum(tensor.untyped_storage().nbytes() for tensor in states) <= 16


def training(**more: Tensor) -> dict[str, Tensor]:
    return {
        "user": torch.tensor([0, 1]),
        "item": torch.tensor([2, 0]),
        "weight": torch.tensor([1.0, 3.0]),
        "known": marks("x...", ".xxx"),
        **more,
    }


def test_losses_are_those_worked_out_by_hand() -> None:
    scores = [[9.0, 5.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    softmax = Recommendation(Said(scores))(training())
    assert softmax.sum.item() == pytest.approx(math.log(1 + math.exp(2) + math.exp(1)))
    bpr = Recommendation(Said(scores), "bpr")(training())
    first = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(1))) / 2
    assert bpr.sum.item() == pytest.approx(first)  # of user 1 every item is known: nothing to say
    assert bpr.count == 2
    negatives = torch.tensor([[1, 1], [1, 3]])
    drawn = Recommendation(Said(scores), "bpr")(training(negatives=negatives))
    second = (math.log(1 + math.exp(1)) + math.log(1 + math.exp(3))) / 2
    assert drawn.sum.item() == pytest.approx(math.log(1 + math.exp(2)) + 3 * second)


@pytest.mark.parametrize("loss", ["softmax", "bpr"])
def test_a_user_who_has_every_item_gives_no_gradient_that_is_none(loss: Any) -> None:
    model = Said([[9.0, 5.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    Recommendation(model, loss)(training()).sum.backward()
    assert model.scores.grad is not None
    assert model.scores.grad.isfinite().all()
    assert not model.scores.grad[1].any()


MODELS = {"mf": lambda: MatrixFactorisation(3, 5, 4), "towers": lambda: TwoTower(5, (6,), 4)}


@pytest.mark.parametrize("name", MODELS)
def test_candidates_have_the_scores_that_they_have_among_all(name: str) -> None:
    model = MODELS[name]()
    user, known = torch.tensor([2, 0]), marks("x..x.", ".....")
    candidates = torch.tensor([[4, 1, 1], [0, 3, 2]])
    nn.init.normal_(model.items.biases)
    scores = model(user, known)
    torch.testing.assert_close(model(user, known, candidates), scores.gather(1, candidates))
    model(user, known, candidates).sum().backward()
    assert not model.items.vectors.weight.grad.is_sparse


def test_two_towers_score_a_user_whom_training_has_not_seen() -> None:
    model = TwoTower(5).eval()
    known = marks("x..x.", ".x...")
    seen, never_seen = (model(torch.tensor(users), known) for users in ([0, 1], [10**6, 10**7]))
    assert torch.equal(seen, never_seen)
    assert not torch.equal(seen[0], seen[1])


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(Refused, match="loss: expected one of softmax, bpr, got 'wrap'"):
        Recommendation(nn.Identity(), "wrap")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="k: expected a number of items above 0, got 0"):
        Recommendation(nn.Identity(), k=0)
    with pytest.raises(Refused, match="there is no 'ndgc'; there is hit_rate, ndcg, mrr"):
        Recommendation(nn.Identity(), metrics=["ndgc"])  # type: ignore[list-item]


# What the standard library imports.


def test_imports_are_resolved() -> None:
    source = """
import os.path, sys as system
from . import parser, VERSION
from ..mail import header
def later():
    from .parser import Parser
    try: import winreg
    except ImportError: pass
"""
    modules = {"post.box", "post.box.parser", "post.mail", "post.mail.header"}
    found = {*imports(source, "post.box", True, modules)}
    expected = {"os.path", "sys", "post.box.parser", "post.box", "post.mail.header", "winreg"}
    assert found == expected
    assert {*imports("from . import parser", "post.box.tools", False, modules)} == {
        "post.box.parser"
    }


def test_the_standard_library_imports_what_it_does() -> None:
    found = library_imports()
    assert {"re", "io", "email.errors"} <= found["email.feedparser"]
    assert "email.feedparser" in found["email.parser"]
    assert not [module for module in found if ".test" in module]
    assert all(module not in items for module, items in found.items())


def popularity(split: str, split_by: str = "interaction") -> dict[str, float]:
    """What it gives to rank for everybody by how many of training have an item."""
    training, held_out = (StandardLibraryImports(s, 200, split_by) for s in ("train", split))
    items = torch.stack([training[index]["item"] for index in range(len(training))])
    counts = items.bincount(minlength=200).float()
    found = {"hit_rate": HitRate(10), "ndcg": NDCG(10)}
    for sample in (held_out[index] for index in range(len(held_out))):
        is_answer = ~sample["known"]
        targets = sample["relevant"][is_answer].long()
        for metric in found.values():
            metric.update(counts[is_answer], targets, sample["user"].expand_as(targets))
    return values(found)


@pytest.mark.parametrize("name", ["recommendation", "recommendation_two_tower"])
def test_a_short_run_finds_more_than_what_is_popular(tmp_path: Path, name: str) -> None:
    found = train_here(tmp_path, f"experiment={name}", *SHORT)
    for metric, value in popularity("test").items():
        assert found[metric] > 1.1 * value


def test_two_towers_find_what_a_file_imports_that_training_has_not_seen(tmp_path: Path) -> None:
    by_user = ["experiment=recommendation_two_tower", "data.train.split_by=user"]
    found = train_here(tmp_path, *by_user, *SHORT)
    for metric, value in popularity("test", split_by="user").items():
        assert found[metric] > 1.1 * value
