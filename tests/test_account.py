"""What a step tells and what it divides by: exact means, whoever logs, however it is cut."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.account import RESERVED, Accounted, Window, add_logs, means
from ddptrain.data.plan import Plan
from ddptrain.errors import TrainingError
from ddptrain.fingerprints import Fingerprints
from ddptrain.launch.worker import TIMEOUT
from ddptrain.optim.clip import Clip
from ddptrain.optim.guard import Guard
from ddptrain.optim.loss_scale import LossScale
from ddptrain.optim.schedules import Constant
from ddptrain.parallel.ddp import DataParallel
from ddptrain.parallel.ranks import Ranks
from ddptrain.parallel.reduction import Mean
from ddptrain.place import Place
from ddptrain.step import Step
from ddptrain.tasks import Loss, Task

CPU = torch.device("cpu")
ONE = torch.ones(())
NAMES = st.sampled_from(["accuracy", "perplexity", "depth"])
# Small whole numbers, so that float32 has them exactly and the mean has one right answer.
LOGGED = st.dictionaries(NAMES, st.tuples(st.integers(-50, 50), st.none() | st.integers(0, 20)))
MICRO_BATCHES = st.lists(st.tuples(st.integers(1, 40), LOGGED), max_size=6)


def exact_means(of_ranks: list[list[tuple[int, dict[str, Any]]]]) -> dict[str, float]:
    """The same in fractions, over all ranks at once."""
    sums: dict[str, Fraction] = {}
    counts: dict[str, int] = {}
    for count, logs in (micro_batch for of_rank in of_ranks for micro_batch in of_rank):
        for name, (value, weight) in logs.items():
            sums[name] = sums.get(name, Fraction(0)) + (value * count if weight is None else value)
            counts[name] = counts.get(name, 0) + (count if weight is None else weight)
    return {name: float(sums[name] / counts[name]) for name in sorted(sums) if counts[name]}


@settings(max_examples=60)
@given(st.lists(MICRO_BATCHES, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_logged_values_are_exact_weighted_means(
    of_ranks: list[list[tuple[int, dict[str, Any]]]], chance: random.Random
) -> None:
    """Ranks differ in the keys, their order, the number of values and their weights."""
    taken = []
    for micro_batches in of_ranks:
        window = Window(CPU)
        for count, values in micro_batches:
            logs = {
                name: ONE * value if weight is None else (ONE * value, weight)
                for name, (value, weight) in values.items()
            }
            names = sorted(logs)
            chance.shuffle(names)
            told = window.add(Loss(ONE, count, {name: logs[name] for name in names}))
            assert told == len(logs)
        taken.append(window.logs())
        again = Window(CPU)  # as after a resume
        again.load(window.account.tolist(), window.logs())
        assert again.logs() == taken[-1]
        window.clear()
        assert window.logs() == {}
    merged = means(add_logs(taken))
    assert merged == pytest.approx(exact_means(of_ranks), rel=1e-12, abs=1e-12)
    assert list(merged) == sorted(merged)
    chance.shuffle(taken)
    assert means(add_logs(taken)) == pytest.approx(merged, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    "value",
    [
        0.25,
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.float64),
        torch.tensor([0.25]),
        torch.tensor(0.25, requires_grad=True),
        np.float32(0.25),
        (1, 4),
        (torch.tensor(1), torch.tensor(4)),
        (torch.tensor(1.0, dtype=torch.bfloat16), 4.0),
        (True, np.int64(4)),
    ],
)
def test_any_scalar_may_be_logged(value: Any) -> None:
    window = Window(CPU)
    window.add(Loss(ONE, 7, {"quarter": value}))
    logged = window.logs()
    assert not any(isinstance(part, Tensor) for part in logged["quarter"])
    assert means(logged) == {"quarter": 0.25}


def test_whole_numbers_and_doubles_keep_their_digits() -> None:
    """A count of tokens passes 2^24 early in a run, where float32 no longer has every number."""
    window = Window(CPU)
    window.add(Loss(ONE, 1, {"tokens": 2**24 + 1, "fine": torch.tensor(1 + 1e-12).double()}))
    window.add(Loss(ONE, 3, {"third": torch.tensor(1 / 3, dtype=torch.float64)}))
    exact = torch.tensor(1 + 1e-12).double().item()
    assert means(window.logs()) == {"tokens": 2**24 + 1, "fine": exact, "third": 1 / 3}


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_reserved_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(TrainingError, match=rf"Loss\.logs\['{name}'\].*choose another"):
        Window(CPU).add(Loss(ONE, 1, {name: ONE}))


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        torch.ones(2, 2),
        torch.ones(0),
        (torch.ones(3), 3),
        (3, torch.ones(3)),
        (1, 2, 3),
        (1,),
        (),
        "high",
        None,
        [1.0, 2.0],
        {"a": 1.0},
        np.ones(3),
    ],
)
def test_what_is_no_scalar_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TrainingError, match=r"Loss\.logs\['odd'\]") as told:
        Window(CPU).add(Loss(ONE, 1, {"fine": ONE, "odd": value}))
    assert "\n" not in str(told.value)


# --- the gradient ------------------------------------------------------------------------------

WIDTH = 5


class Ragged(Task):
    """Squared error over the tokens that count, of which each sample has another number."""

    def __init__(self, logs_name: str | None = None, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))
        self.logs_name = logs_name
        self.scale = scale

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        tokens, lengths = batch
        counted = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        losses = self.model(tokens).squeeze(-1).square() * counted * self.scale
        logs = {} if self.logs_name is None else {self.logs_name: (losses.sum(), counted.sum())}
        return Loss(losses.sum(), counted.sum(), logs)


def data(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (samples, 7, WIDTH), and how many of the 7 count: from none to all."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(samples, 7, WIDTH, generator=generator)
    lengths = torch.randint(0, 8, (samples,), generator=generator)
    lengths[0] = 7
    return tokens, lengths


def make_step(
    task: Task,
    plan: Plan,
    *,
    max_norm: float | None = None,
    skips: bool = False,
    loss_scale: LossScale | None = None,
) -> Step:
    """A step of plain descent with rate 1: the weights move by the gradient, negated."""
    ranks = Ranks(Place(), CPU, TIMEOUT)
    return Step(
        Accounted(task, Window(CPU), nullcontext),
        torch.optim.SGD(task.parameters(), lr=1.0),
        Constant(),
        plan,
        DataParallel(ranks, 25, Mean()),
        ranks,
        total_steps=100,
        clip=Clip(max_norm),
        penalty=None,
        average=None,
        guard=Guard(CPU, halts=not skips, stops=not skips),
        loss_scale=loss_scale,
        fingerprints=Fingerprints(task, plan, ranks, None, 100),
    )


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def gradient_of_step(make: Callable[[], Task], plan: Plan, batch: Any, **more: Any) -> Tensor:
    task = make()
    step = make_step(task, plan, **more)
    before = flat(task.parameters())
    parts = [tuple(t[b.start : b.stop] for t in batch) for b in plan.micro_batches(0)]
    step(0, iter(parts))
    return before - flat(task.parameters())


def gradient_by_hand(batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of the mean over all tokens that count, in one forward, in float64."""
    task = Ragged().double()
    tokens, lengths = batch
    loss = task((tokens.double(), lengths))
    (loss.sum / loss.count).backward()
    return flat(parameter.grad for parameter in task.parameters())


@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("is_short", [False, True])
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000))
def test_gradient_is_that_of_the_mean_over_the_whole_batch(
    accumulation: int, is_short: bool, seed: int
) -> None:
    """Also for an epoch's last step, whose micro-batches are fewer and not all full."""
    micro = 12 // accumulation
    samples = 7 if is_short else 12
    plan = Plan(samples, 12, micro, shuffled=False)
    batch = data(samples, seed)
    found = gradient_of_step(Ragged, plan, batch)
    expected = gradient_by_hand(batch)
    assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-7


@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_gradient_is_as_exact_as_float32_can_tell(accumulation: int) -> None:
    """In float64, where the weights' own rounding does not hide an error of the division."""
    batch = data(12, seed=1)
    doubled = (batch[0].double(), batch[1])
    plan = Plan(12, 12, 12 // accumulation, shuffled=False)
    found = gradient_of_step(lambda: Ragged().double(), plan, doubled)
    torch.testing.assert_close(found, gradient_by_hand(batch), rtol=1e-12, atol=1e-15)


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), max_norm=st.floats(1e-3, 10))
def test_clipping_is_that_of_the_mean_gradient(seed: int, max_norm: float) -> None:
    batch = data(12, seed)
    plan = Plan(12, 12, 4, shuffled=False)
    expected = gradient_by_hand(batch)
    norm = expected.norm().item()
    found = gradient_of_step(Ragged, plan, batch, max_norm=max_norm)
    clipped = expected * min(1.0, max_norm / norm)
    assert (found - clipped).norm() <= 1e-6 * clipped.norm() + 1e-7


@pytest.mark.parametrize("scale", [1.0, 2.0**12, 2.0**24])
def test_the_loss_scale_cancels(scale: float) -> None:
    """A power of two: not one bit of the gradient may differ."""
    batch = data(12, seed=3)
    plan = Plan(12, 12, 4, shuffled=False)
    scaled = gradient_of_step(Ragged, plan, batch, loss_scale=LossScale(CPU, scale))
    assert torch.equal(scaled, gradient_of_step(Ragged, plan, batch))


def test_the_log_line_has_the_means_since_the_last_one() -> None:
    """Loss and logged values over three steps, one of them short; then nothing is left over."""
    plan = Plan(20, 8, 4, shuffled=False)
    task = Ragged(logs_name="again")
    step = make_step(task, plan)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    step.base_rates = [0.0]
    batch = data(20, seed=5)
    for s in range(3):
        parts = [tuple(t[b.start : b.stop] for t in batch) for b in plan.micro_batches(s)]
        step(s, iter(parts))
    whole = task(batch)
    mean = (whole.sum / whole.count).item()
    read = step.read()
    assert read["loss"] == pytest.approx(mean, rel=1e-6)
    assert read["again"] == pytest.approx(mean, rel=1e-6)
    assert read["grad_norm"] > 0
    assert set(read) == {"loss", "lr", "grad_norm", "again"}
    step.module.window.clear()
    left = step.read()
    assert math.isnan(left["loss"])
    assert "again" not in left


# --- what is odd -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("skips", [False, True])
def test_a_step_in_which_nothing_counts_never_makes_the_weights_nan(
    max_norm: float | None, skips: bool
) -> None:
    """Every token of the global batch is padding: the mean over none is 0 / 0."""
    plan = Plan(8, 4, 2, shuffled=False)
    tokens, _ = data(4, seed=0)
    task = Ragged()
    before = flat(task.parameters())
    step = make_step(task, plan, max_norm=max_norm, skips=skips)
    step(0, iter([(tokens[:2], torch.zeros(2)), (tokens[2:], torch.zeros(2))]))
    assert torch.equal(flat(task.parameters()), before)


def test_a_micro_batch_in_which_nothing_counts_adds_nothing() -> None:
    plan = Plan(8, 4, 2, shuffled=False)
    tokens, lengths = data(4, seed=0)
    lengths[2:] = 0
    found = gradient_of_step(Ragged, plan, (tokens, lengths))
    expected = gradient_by_hand((tokens[:2], lengths[:2]))
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_that_is_skipped_leaves_no_trace_in_the_log_line(value: float) -> None:
    """The line after it has the means of the good steps only: loss, count and logged values."""
    plan = Plan(12, 4, 2, shuffled=False)
    batch = data(12, seed=2)
    batch[0][5, 0, 0] = value  # in the second of three steps
    task = Ragged(logs_name="again")
    step = make_step(task, plan, skips=True)
    step.base_rates = [0.0]
    before = flat(task.parameters())
    for s in range(3):
        step(s, iter([tuple(t[b.start : b.stop] for t in batch) for b in plan.micro_batches(s)]))
    assert torch.equal(flat(task.parameters()), before)
    good = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    whole = task((batch[0][good], batch[1][good]))
    mean = (whole.sum / whole.count).item()
    read = step.read()
    assert read["skipped_steps"] == 1
    assert read["loss"] == pytest.approx(mean, rel=1e-6)
    assert read["again"] == pytest.approx(mean, rel=1e-6)


class Forgetful(Task):
    """A task with a bug in what it returns."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.result = result

    def forward(self, batch: Any) -> Any:
        total = functional.softplus(self.weight).sum()
        return self.result(total)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda total: total, r"Forgetful\.forward returned Tensor, expected ddptrain\.Loss"),
        (lambda total: None, r"Forgetful\.forward returned NoneType, expected ddptrain\.Loss"),
        (lambda total: (total, 3), r"Forgetful\.forward returned tuple, expected ddptrain\.Loss"),
        (lambda total: Loss(total.expand(3), 3), "sum"),
        (lambda total: Loss(total, torch.ones(3)), "count"),
        (lambda total: Loss(total.item(), 3), "sum"),  # type: ignore[arg-type]
        (lambda total: Loss(total, None), "count"),  # type: ignore[arg-type]
    ],
)
def test_a_task_that_returns_something_else_is_told_what_is_expected(
    result: Callable[[Tensor], Any], message: str
) -> None:
    step = make_step(Forgetful(result), Plan(4, 4, 4))
    with pytest.raises((TypeError, TrainingError), match=message) as told:
        step(0, iter([0]))
    assert "Forgetful" in str(told.value)


def test_parameters_without_a_gradient_are_listed_by_name() -> None:
    task = Ragged()
    task.left_over = nn.Linear(2, 2)
    step = make_step(task, Plan(4, 4, 4, shuffled=False))
    with pytest.raises(
        TrainingError, match=r"2 of 6 .*left_over\.weight, left_over\.bias.*requires_grad=False"
    ):
        step(0, iter([data(4, seed=0)]))
