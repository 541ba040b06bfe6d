"""Learning rates are a function of the step alone: the same after a resume, on any ranks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddptrain.optim.schedules import Constant, Cosine, Linear, Schedule, Warmup

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


@given(final=FINALS, warmup=FRACTIONS, total=TOTALS)
def test_the_end_of_the_run_is_where_final_is(final: float, warmup: float, total: int) -> None:
    for kind in (Linear, Cosine):
        schedule = kind(warmup=warmup, final=final)
        if round(warmup * total) < total:
            assert schedule(total, total) == pytest.approx(final, abs=1e-12)


@given(
    kind=st.sampled_from([Constant, Linear, Cosine]),
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
