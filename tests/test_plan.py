"""Which samples make up a step: each once per epoch, in one order for any number of ranks."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddptrain.config import TrainConfig
from ddptrain.data.plan import BLOCK, MicroBatch, Plan

BIG = 10**6


@st.composite
def plans(draw: st.DrawFn, most: int = 300) -> Plan:
    """Plans of up to ``most`` samples; M micro-batches a step, as the config guarantees."""
    samples = draw(st.integers(1, most))
    micro = draw(st.integers(1, 40))
    accumulation = draw(st.integers(1, 9))
    shuffled = draw(st.booleans())
    return Plan(samples, micro * accumulation, micro, draw(st.integers(0, 2**63)), shuffled)


WORLDS = st.integers(1, 12)


def of_all_ranks(plan: Plan, step: int, world_size: int) -> list[list[MicroBatch]]:
    return [plan.micro_batches(step, rank, world_size) for rank in range(world_size)]


def samples_of(plan: Plan, step: int, world_size: int = 1) -> list[int]:
    """The samples of a step, in rank order."""
    parts = of_all_ranks(plan, step, world_size)
    return [int(i) for mine in parts for batch in mine for i in plan.indices(batch)]


@given(plans(), WORLDS, st.integers(0, 3))
def test_every_sample_exactly_once_per_epoch(plan: Plan, world_size: int, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    seen = Counter[int]()
    for step in range(first, first + plan.steps_per_epoch):
        seen.update(samples_of(plan, step, world_size))
    assert seen == Counter(range(plan.samples))


@given(plans(), WORLDS, st.integers(0, 1000))
def test_order_does_not_depend_on_the_number_of_ranks(
    plan: Plan, world_size: int, step: int
) -> None:
    assert samples_of(plan, step, world_size) == samples_of(plan, step)


@given(plans(), st.lists(WORLDS, min_size=1, max_size=4), st.data())
def test_an_epoch_that_is_resumed_on_other_ranks_is_whole_and_in_order(
    plan: Plan, worlds: list[int], data: st.DataObject
) -> None:
    """Stopped after any steps, each time going on with another number of ranks."""
    steps = plan.steps_per_epoch
    stops = sorted(data.draw(st.lists(st.integers(0, steps), max_size=len(worlds) - 1)))
    seen: list[int] = []
    for world_size, (first, last) in zip(worlds, pairwise([0, *stops, steps]), strict=False):
        for step in range(first, last):
            seen += samples_of(plan, step, world_size)
    reached = [0, *stops, steps][min(len(worlds), len(stops) + 1)]
    alone = [i for step in range(reached) for i in samples_of(plan, step)]
    assert seen == alone
    if reached == steps:
        assert sorted(seen) == list(range(plan.samples))


@given(plans(), WORLDS, st.integers(0, 1000))
def test_ranks_share_out_the_micro_batches_of_one_process(
    plan: Plan, world_size: int, step: int
) -> None:
    parts = of_all_ranks(plan, step, world_size)
    alone = plan.micro_batches(step)
    assert [batch for mine in parts for batch in mine] == alone
    for rank, mine in enumerate(parts):
        count = len(alone)
        assert len(mine) == count * (rank + 1) // world_size - count * rank // world_size
        assert all(plan.rank_of(batch, world_size) == rank for batch in mine)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(plans(), st.integers(0, 1000))
def test_micro_batches_are_contiguous_and_full_but_for_the_last(plan: Plan, step: int) -> None:
    batches = plan.micro_batches(step)
    epoch, in_epoch = divmod(step, plan.steps_per_epoch)
    assert batches[0].start == in_epoch * plan.global_batch_size
    for before, after in pairwise(batches):
        assert before.stop == after.start
        assert len(before) == plan.micro_batch_size
    assert 0 < len(batches[-1]) <= plan.micro_batch_size
    for index, batch in enumerate(batches):
        assert (batch.step, batch.index, batch.epoch) == (step, index, epoch)


@given(plans(), st.integers(0, 3))
def test_only_the_last_step_of_an_epoch_is_short(plan: Plan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    sizes = [
        sum(map(len, plan.micro_batches(step)))
        for step in range(first, first + plan.steps_per_epoch)
    ]
    assert all(size == plan.global_batch_size for size in sizes[:-1])
    assert 0 < sizes[-1] <= plan.global_batch_size
    assert sum(sizes) == plan.samples


@given(plans(), st.integers(0, 200), st.integers(0, 40))
def test_samples_before_counts_what_the_steps_hold(plan: Plan, first: int, count: int) -> None:
    held = sum(len(b) for s in range(first, first + count) for b in plan.micro_batches(s))
    assert plan.samples_before(first + count) - plan.samples_before(first) == held
    assert plan.samples_before(0) == 0


@given(plans(most=10**12), st.integers(0, 10**9), st.integers(0, 10**9))
def test_samples_before_is_exact_far_out(plan: Plan, epochs: int, steps: int) -> None:
    steps %= plan.steps_per_epoch
    step = epochs * plan.steps_per_epoch + steps
    assert plan.samples_before(step) == epochs * plan.samples + steps * plan.global_batch_size
    assert plan.micro_batches(step)[0].epoch == epochs


@given(plans())
def test_the_same_plan_gives_the_same_samples_whatever_was_asked_before(plan: Plan) -> None:
    steps = range(2 * plan.steps_per_epoch)
    again = Plan(
        plan.samples, plan.global_batch_size, plan.micro_batch_size, plan.seed, plan.shuffled
    )
    backwards = {step: samples_of(again, step) for step in reversed(steps)}
    assert backwards == {step: samples_of(plan, step) for step in steps}


@given(st.integers(20, 300), st.integers(0, 100))
def test_a_shuffled_epoch_is_not_in_order_and_an_unshuffled_one_is(samples: int, seed: int) -> None:
    (batch,) = Plan(samples, samples, samples, seed).micro_batches(0)
    assert Plan(samples, samples, samples, seed).indices(batch).tolist() != [*range(samples)]
    unshuffled = Plan(samples, samples, samples, seed, shuffled=False)
    assert unshuffled.indices(batch).tolist() == [*range(samples)]


@pytest.mark.parametrize("samples", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_an_epoch_of_several_blocks_is_whole(samples: int) -> None:
    plan = Plan(samples, 1000, 250, seed=3)
    seen = [i for step in range(plan.steps_per_epoch) for i in samples_of(plan, step)]
    assert sorted(seen) == list(range(samples))


@settings(max_examples=60)
@given(st.integers(-600, 600), st.integers(1, 600), st.integers(0, 5))
def test_a_micro_batch_may_cross_the_border_of_a_block(offset: int, length: int, seed: int) -> None:
    samples = 3 * BLOCK - 100
    start = min(max(2 * BLOCK + offset, 0), samples - length)
    plan = Plan(samples, samples, samples, seed)
    (epoch,) = plan.micro_batches(0)
    part = MicroBatch(0, 0, 0, start, start + length)
    assert np.array_equal(plan.indices(part), plan.indices(epoch)[start : start + length])


def test_a_micro_batch_may_span_whole_blocks() -> None:
    plan = Plan(4 * BLOCK, 4 * BLOCK, 4 * BLOCK, seed=1)
    (batch,) = plan.micro_batches(0)
    assert sorted(plan.indices(batch).tolist()) == list(range(4 * BLOCK))


def test_step_a_million_costs_what_the_first_does() -> None:
    """Of a set so large that anything proportional to the step or the set would not return."""
    plan = Plan(10**10, 1024, 8, seed=1)

    def seconds(step: int) -> float:
        began = time.perf_counter()
        for batch in plan.micro_batches(step):
            plan.indices(batch)
        return time.perf_counter() - began

    seconds(0)
    early = min(seconds(step) for step in range(100, 2000, 100))
    late = min(seconds(BIG + step) for step in range(100, 2000, 100))
    assert late < 5 * early + 0.001


def test_micro_batches_are_small_values() -> None:
    """A worker gets them through a pipe, one for each forward."""
    batch = Plan(100, 20, 5).micro_batches(7)[2]
    assert batch == MicroBatch(step=7, index=2, epoch=1, start=50, stop=55)
    assert not hasattr(batch, "__dict__")


@pytest.mark.parametrize(
    ("wanted", "samples", "sizes", "micro_batches"),
    [
        ("all", 86, (86, 16), None),
        ("all", 9, (9, 9), None),
        (1, 86, (1, 1), 1),
        (64, 86, (64, 16), 4),
    ],
)
def test_sizes_of_batch_stochastic_and_mini_batch_descent(
    wanted: int | str, samples: int, sizes: tuple[int, int], micro_batches: int | None
) -> None:
    train = TrainConfig(global_batch_size=wanted, micro_batch_size=16)
    assert train.sizes(samples) == sizes
    assert train.micro_batches() == micro_batches
    plan = Plan(samples, *train.sizes(samples))
    assert sum(map(len, plan.micro_batches(0))) == sizes[0]
