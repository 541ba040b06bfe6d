"""Every epoch must be a permutation: one sample lost or favoured would never be noticed later."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from itertools import permutations, product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from ddptrain.data.plan import Plan
from ddptrain.data.shuffle import Permutation
from ddptrain.keys import derive

KEYS = st.integers(0, 2**64 - 1)
IMPROBABLE = 1e-3
"""The keys are fixed, so this is no chance of a red run: it was passed once, and stays passed."""


def order(size: int, key: int) -> npt.NDArray[np.int64]:
    return Permutation(size, key)(np.arange(size))


def is_bijection(values: npt.NDArray[np.int64], size: int) -> bool:
    return bool(np.array_equal(np.sort(values), np.arange(size)))


def keys(count: int) -> list[int]:
    """Keys as the plan makes them, of neighbouring seeds."""
    return [derive(seed, "shuffle", 0) for seed in range(count)]


@pytest.mark.parametrize("size", range(1, 65))
def test_small_sizes_are_permuted(size: int) -> None:
    for key in (0, 1, 2**64 - 1, derive(0, "shuffle", size)):
        assert is_bijection(order(size, key), size)


@settings(max_examples=150)
@given(st.integers(1, 3000), KEYS)
def test_any_size_is_permuted_under_any_key(size: int, key: int) -> None:
    assert is_bijection(order(size, key), size)


@given(st.integers(1, 1 << 62), KEYS, st.data())
def test_a_position_maps_alike_alone_and_among_others(
    size: int, key: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    permutation = Permutation(size, key)
    together = permutation(positions)
    alone = [int(permutation([position])[0]) for position in positions]
    assert together.tolist() == alone
    assert together.dtype == np.int64


@pytest.mark.parametrize(("size", "repeats"), [(3, 100), (4, 50), (5, 15)])
def test_all_permutations_are_equally_likely(size: int, repeats: int) -> None:
    possible = list(permutations(range(size)))
    seen = Counter(tuple(order(size, key).tolist()) for key in keys(repeats * len(possible)))
    assert chisquare([seen[p] for p in possible]).pvalue > IMPROBABLE


@pytest.fixture(scope="module")
def orders() -> npt.NDArray[np.int64]:
    """2,000 orders of 50 things, one a row."""
    return np.stack([order(50, key) for key in keys(2000)])


def test_every_value_is_equally_likely_at_every_position(orders: npt.NDArray[np.int64]) -> None:
    count, size = orders.shape
    table = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    statistic = float(((table - count / size) ** 2 / (count / size)).sum())
    freedom = (size - 1) ** 2
    # The rows and columns of the table add up, so it has (n - 1)² degrees of freedom; with so
    # many the statistic is normal with variance twice as large.
    assert abs(statistic - freedom) < 3.5 * math.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours(orders: npt.NDArray[np.int64]) -> None:
    size = orders.shape[1]
    steps = (orders[:, 1::2] - orders[:, ::2]) % size
    counts = np.bincount(steps.ravel(), minlength=size)
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > IMPROBABLE


def test_different_keys_give_different_orders() -> None:
    found = {order(100, key).tobytes() for key in keys(500)}
    assert len(found) == 500


def test_epochs_and_seeds_give_different_orders() -> None:
    found = set()
    for seed, epoch in product(range(20), range(20)):
        plan = Plan(100, 100, 100, seed)
        (batch,) = plan.micro_batches(epoch)
        found.add(plan.indices(batch).tobytes())
    assert len(found) == 400


@pytest.mark.parametrize("size", [10**10, 2**31 + 11, 2**53 + 1, 3**39, 2**62 - 57, 2**62])
def test_huge_ranges_are_permuted(size: int) -> None:
    """No two of a sample of positions share a value, at both ends and in between."""
    chance = np.random.default_rng(0)
    middle = chance.integers(10_000, size - 10_000, size=20_000)
    positions = np.unique(
        np.concatenate([np.arange(10_000), middle, np.arange(size - 10_000, size)])
    )
    values = Permutation(size, 7)(positions)
    assert values.min() >= 0
    assert values.max() < size
    assert len(np.unique(values)) == len(positions)
    bins = np.bincount((values / size * 100).astype(int), minlength=100)
    assert chisquare(bins).pvalue > IMPROBABLE


def test_ten_thousand_million_positions_take_no_memory() -> None:
    tracemalloc.start()
    try:
        Permutation(10**10, 1)(np.arange(10**9, 10**9 + 1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18


@pytest.mark.parametrize("size", [0, -1, (1 << 62) + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"1 to 2\^62 elements"):
        Permutation(size, 0)
