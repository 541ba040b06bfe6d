"""Learning rates are a function of the step alone: the same after a resume, on any ranks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddptrain.optim.patience import Patience, Plateau
from ddptrain.optim.schedules import (
    ByEpoch,
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Polynomial,
    Schedule,
    StepDecay,
    Warmup,
    WarmupStableDecay,
)

ALL = [
    Constant, Linear, Cosine, Polynomial, Exponential, StepDecay, MultiStep, CosineRestarts,
    OneCycle, WarmupStableDecay,
]  # fmt: skip
TOTALS = st.integers(1, 2000)
FRACTIONS = st.floats(0, 1, exclude_max=True)
FINALS = st.floats(0, 1)


def table(schedule: Schedule, total: int) -> list[float]:
    return [schedule(step, total) for step in range(total)]


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine])
@given(steps=st.integers(1, 50), total=st.integers(51, 500))
def test_warm_up_in_steps_is_a_straight_line_to_one(
    kind: type[Warmup], steps: int, total: int
) -> None:
    factors = table(kind(warmup=steps), total)
    assert factors[:steps] == [(step + 1) / steps for step in range(steps)]
    assert factors[steps - 1] == 1.0
    assert factors[steps] == 1.0


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine])
@given(fraction=FRACTIONS, total=TOTALS)
def test_a_warm_up_below_one_is_a_fraction_of_the_run(
    kind: type[Warmup], fraction: float, total: int
) -> None:
    in_steps = round(fraction * total)
    if in_steps:
        assert table(kind(warmup=fraction), total) == table(kind(warmup=in_steps), total)
    else:
        assert kind(warmup=fraction)(0, total) == 1.0


def test_no_warm_up_begins_at_the_full_rate() -> None:
    assert [kind()(0, 10) for kind in (Constant, Linear, Cosine)] == [1.0, 1.0, 1.0]


def test_a_warm_up_of_one_is_one_step_and_not_the_whole_run() -> None:
    assert table(Constant(warmup=1), 4) == [1.0, 1.0, 1.0, 1.0]
    assert table(Constant(warmup=4), 4) == [0.25, 0.5, 0.75, 1.0]


def test_values_by_hand() -> None:
    assert table(Linear(warmup=2, final=0.5), 6) == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625]
    cosine = Cosine(warmup=0.5, final=0.1)
    assert cosine(0, 20) == 0.1
    assert cosine(9, 20) == 1.0
    assert cosine(10, 20) == 1.0
    assert cosine(15, 20) == pytest.approx(0.55)
    assert cosine(20, 20) == pytest.approx(0.1)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))
    assert Cosine(final=0.1)(5, 20) == pytest.approx(quarter)


@pytest.mark.parametrize("kind", [Linear, Cosine])
@given(warmup=FRACTIONS | st.integers(1, 100), final=FINALS, total=st.integers(1, 600))
def test_up_and_then_down_between_the_bounds(
    kind: type[Linear] | type[Cosine], warmup: float, final: float, total: int
) -> None:
    factors = table(kind(warmup=warmup, final=final), total)
    peak = round(warmup * total) if warmup < 1 else int(warmup)
    assert all(before < after for before, after in pairwise(factors[:peak]))
    assert all(before >= after - 1e-12 for before, after in pairwise(factors[peak:]))
    assert all(final - 1e-12 <= factor <= 1 for factor in factors[peak:])
    assert all(0 < factor <= 1 for factor in factors[:peak])


@given(final=st.floats(0.001, 1), warmup=FRACTIONS, total=TOTALS)
def test_the_end_of_the_run_is_where_final_is(final: float, warmup: float, total: int) -> None:
    for kind in (Linear, Cosine, Polynomial, Exponential, OneCycle):
        schedule = kind(warmup=warmup, final=final)
        if round(warmup * total) < total:
            assert schedule(total, total) == pytest.approx(final, abs=1e-12)


@given(
    kind=st.sampled_from(ALL),
    warmup=FRACTIONS,
    total=TOTALS,
    steps=st.lists(st.integers(0, 1999), min_size=1, max_size=30),
)
def test_a_schedule_remembers_nothing(
    kind: type[Warmup], warmup: float, total: int, steps: list[int]
) -> None:
    schedule, fresh = kind(warmup=warmup), kind(warmup=warmup)
    forwards = {step: schedule(step, total) for step in sorted(steps)}
    assert {step: schedule(step, total) for step in steps} == forwards
    assert {step: fresh(step, total) for step in reversed(steps)} == forwards


def test_a_run_without_an_end_in_sight_does_not_decay() -> None:
    assert Cosine(warmup=10)(10_000, 1 << 62) == pytest.approx(1.0)


def by_torch(kind: str, total: int, **arguments: object) -> list[float]:
    """The rates of a scheduler of torch's, for an optimiser whose rate is 1."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **arguments)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@given(total=st.integers(2, 300), every=st.integers(1, 60), factor=st.floats(0.1, 0.9))
def test_steps_are_torchs(total: int, every: int, factor: float) -> None:
    ours = table(StepDecay(every=every, factor=factor), total)
    assert ours == pytest.approx(by_torch("StepLR", total, step_size=every, gamma=factor))
    gamma = table(StepDecay(every=1, factor=factor), total)
    assert gamma == pytest.approx(by_torch("ExponentialLR", total, gamma=factor))
    stones = [every, 2 * every + 1]
    ours = table(MultiStep(milestones=stones, factor=factor), total)
    assert ours == pytest.approx(by_torch("MultiStepLR", total, milestones=stones, gamma=factor))


@given(total=st.integers(2, 200), power=st.floats(0.5, 4))
def test_a_polynomial_is_torchs(total: int, power: float) -> None:
    theirs = by_torch("PolynomialLR", total, total_iters=total, power=power)
    assert table(Polynomial(power=power), total) == pytest.approx(theirs, abs=1e-9)


@given(total=st.integers(2, 300), period=st.integers(1, 40), growth=st.integers(1, 3))
def test_restarts_are_torchs(total: int, period: int, growth: int) -> None:
    theirs = by_torch("CosineAnnealingWarmRestarts", total, T_0=period, T_mult=growth)
    ours = table(CosineRestarts(period=period, growth=growth), total)
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_one_cycle_goes_up_and_down_once() -> None:
    rates = table(OneCycle(rise=0.25, start=0.1), 400)
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(1.0)
    assert all(before < after for before, after in pairwise(rates[:101]))
    assert all(before > after for before, after in pairwise(rates[100:]))


def test_stable_until_the_decay() -> None:
    for shape in ("linear", "sqrt", "cosine"):
        rates = table(WarmupStableDecay(warmup=10, decay=50, final=0.1, shape=shape), 200)
        assert rates[9:151] == [1.0] * 142
        assert all(before > after for before, after in pairwise(rates[150:]))
        assert rates[-1] < (0.3 if shape != "sqrt" else 0.12)
    assert table(WarmupStableDecay(decay=0.0), 5) == [1.0] * 5
    all_of_it = table(WarmupStableDecay(warmup=5, decay=100, shape="linear"), 10)
    assert all_of_it[4:6] == [1.0, 1.0]
    assert all_of_it[9] == pytest.approx(0.2)


def test_by_epochs_the_rate_changes_between_them_only() -> None:
    schedule = ByEpoch(MultiStep(warmup=2, milestones=[3]), 10)
    assert table(schedule, 45) == [0.5] * 10 + [1.0] * 20 + [pytest.approx(0.1)] * 15
    assert ByEpoch(Linear(), 10)(35, 45) == Linear()(3, 5)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Linear, {"warmup": -1}),
        (Polynomial, {"power": 0}),
        (Exponential, {"final": 0.0}),
        (CosineRestarts, {"period": 0}),
        (CosineRestarts, {"growth": 0.5}),
        (StepDecay, {"every": 0}),
        (MultiStep, {"milestones": [0, 1]}),
        (OneCycle, {"rise": 1.0}),
        (WarmupStableDecay, {"shape": "cube"}),
        (Plateau, {"factor": 1.0}),
        (Plateau, {"mode": "least"}),
        (Plateau, {"patience": 0}),
    ],
)
def test_numbers_that_cannot_be_are_named(kind: type, wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}="):
        kind(**wrong)


VALUES = st.lists(st.floats(0, 1) | st.just(math.nan), max_size=40)


@given(values=VALUES, mode=st.sampled_from(["min", "max"]), patience=st.integers(1, 4))
def test_a_plateau_is_torchs(values: list[float], mode: str, patience: int) -> None:
    """But for the count of evaluations: torch's waits for one more than its patience."""
    ours = Plateau(mode=mode, patience=patience, threshold=0.01, factor=0.5)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, 0.5, patience - 1, threshold=0.01, threshold_mode="abs", eps=0
    )
    for step, value in enumerate(values):
        ours.heed(value)
        theirs.step(value)
        assert ours(step, 100) == optimizer.param_groups[0]["lr"]


@given(values=VALUES, cut=st.integers(0, 40))
def test_patience_goes_on_from_its_numbers(values: list[float], cut: int) -> None:
    whole, first, second = (Patience("val/loss", "min", 3, 0.0) for _ in range(3))
    for value in values:
        whole.heed(value)
    for value in values[:cut]:
        first.heed(value)
    second.load(first.numbers())
    for value in values[cut:]:
        second.heed(value)
    assert second.numbers() == whole.numbers()
