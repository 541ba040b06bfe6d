"""Which checkpoints stay: exactly the k best and the newest, however often a run was resumed."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddptrain.checkpoint.retention import Entry, Retention

SCORES = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.integers(0, 3)
ENTRIES = st.lists(
    st.builds(Entry, st.integers(0, 1000), SCORES), max_size=25, unique_by=lambda entry: entry.step
)
RETENTIONS = st.builds(Retention, st.integers(1, 5), st.integers(0, 5), st.booleans())


def has_score(entry: Entry) -> bool:
    return entry.score is not None and not math.isnan(entry.score)


def is_better(retention: Retention, one: Entry, other: Entry) -> bool:
    assert one.score is not None
    assert other.score is not None
    if one.score == other.score:
        return one.step < other.step
    return (one.score > other.score) == retention.larger_is_better


@given(RETENTIONS, ENTRIES)
def test_exactly_the_newest_and_the_k_best_are_kept(
    retention: Retention, entries: list[Entry]
) -> None:
    kept = retention.keep(entries)
    newest = {entry.step for entry in sorted(entries, key=lambda e: e.step)[-retention.keep_last :]}
    best = {entry.step for entry in retention.best(entries)}
    assert kept == newest | best
    assert len(newest) == min(retention.keep_last, len(entries))
    assert len(best) == min(retention.keep_best, sum(map(has_score, entries)))


@given(ENTRIES, st.lists(st.integers(0, 1000), max_size=8), st.integers(0, 3))
def test_the_last_steps_at_fault_can_be_taken_again(
    entries: list[Entry], faults: list[int], keep_faults: int
) -> None:
    """In time: what is kept at a fault stays until so many later ones have come."""
    kept = Retention(1, keep_faults=keep_faults, faults=lambda: faults).keep(entries)
    steps = [entry.step for entry in entries]
    wanted = {max(steps)} if steps else set()
    for fault in sorted(faults, reverse=True)[:keep_faults]:
        if before := [step for step in steps if step <= fault]:
            wanted.add(max(before))
    assert kept == wanted


@given(RETENTIONS, ENTRIES)
def test_no_other_entry_is_better_than_one_of_the_best(
    retention: Retention, entries: list[Entry]
) -> None:
    best = retention.best(entries)
    others = [entry for entry in entries if has_score(entry) and entry not in best]
    assert all(has_score(entry) for entry in best)
    for good in best[-1:]:
        assert not any(is_better(retention, other, good) for other in others)


@given(RETENTIONS, ENTRIES, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(
    retention: Retention, entries: list[Entry], chance: random.Random
) -> None:
    shuffled = entries.copy()
    chance.shuffle(shuffled)
    assert retention.keep(shuffled) == retention.keep(entries)
    assert retention.best(shuffled) == retention.best(entries)


@given(RETENTIONS, ENTRIES)
def test_deciding_after_each_save_ends_as_deciding_once(
    retention: Retention, entries: list[Entry]
) -> None:
    """What a resume sees on disk is all there is to know: nothing else was remembered."""
    on_disk: list[Entry] = []
    for count, entry in enumerate(sorted(entries, key=lambda e: e.step), start=1):
        on_disk.append(entry)
        kept = retention.keep(on_disk)
        on_disk = [e for e in on_disk if e.step in kept]
        everything = sorted(entries, key=lambda e: e.step)[:count]
        assert kept == retention.keep(everything)


@given(RETENTIONS, ENTRIES)
def test_the_newest_is_never_given_up(retention: Retention, entries: list[Entry]) -> None:
    if entries:
        assert max(entry.step for entry in entries) in retention.keep(entries)


@pytest.mark.parametrize(("larger_is_better", "expected"), [(True, [4, 1]), (False, [2, 3])])
def test_nan_is_never_among_the_best(larger_is_better: bool, expected: list[int]) -> None:
    entries = [Entry(0, math.nan), Entry(1, 0.8), Entry(2, 0.1), Entry(3, 0.2), Entry(4, 0.9)]
    entries.append(Entry(5, math.nan))
    best = Retention(1, 2, larger_is_better).best(entries)
    assert [entry.step for entry in best] == expected


def test_of_equals_the_earlier_stays() -> None:
    entries = [Entry(step, 0.5) for step in (30, 10, 20)]
    for larger_is_better in (True, False):
        assert Retention(1, 1, larger_is_better).best(entries) == [Entry(10, 0.5)]
        assert Retention(1, 2, larger_is_better).keep(entries) == {10, 20, 30}


def test_without_an_evaluation_there_is_no_best() -> None:
    entries = [Entry(step) for step in range(5)]
    assert Retention(2, 3).best(entries) == []
    assert Retention(2, 3).keep(entries) == {3, 4}
