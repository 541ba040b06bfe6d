"""Ranks meet before they form a group, and only with those that live."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict

import pytest
from torch.distributed import HashStore, PrefixStore

from ddptrain.errors import PeerFailed, TrainingError
from ddptrain.parallel.roll_call import Attempt, Process, exchange, meet

Board = PrefixStore


def board() -> Board:
    return PrefixStore("roll-call", HashStore())


def together(
    where: Board, world_size: int, delays: dict[int, float] | None = None
) -> list[Attempt]:
    """One attempt in which all ranks come, some of them later."""
    found: dict[int, Attempt] = {}

    def come(rank: int) -> None:
        time.sleep((delays or {}).get(rank, 0.0))
        found[rank] = meet(where, rank, world_size, 20.0)

    threads = [threading.Thread(target=come, args=[rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world_size)]


@pytest.mark.parametrize("late", [{}, {0: 0.2}, {1: 0.2}, {0: 0.1, 2: 0.2}])
def test_all_ranks_have_one_name_for_what_they_begin(late: dict[int, float]) -> None:
    attempts = together(board(), 3, late)
    assert len({attempt.name for attempt in attempts}) == 1
    assert len({process.name for process in attempts[0].processes}) == 3


def test_what_an_attempt_has_left_is_not_taken_for_the_next() -> None:
    where = board()
    names = [together(where, size, {size - 1: 0.1})[0].name for size in (3, 3, 2, 4, 3)]
    assert len(set(names)) == 5


def test_a_process_that_died_on_its_way_is_not_waited_for_but_its_successor() -> None:
    """It has left its name; rank 0 reads that, and must not begin with it."""
    where = board()
    where.set("here-1", json.dumps(asdict(Process())))
    attempts = together(where, 2, {1: 0.3})
    assert attempts[0].name == attempts[1].name


def test_who_does_not_come_is_named() -> None:
    where = board()
    where.set("here-2", json.dumps(asdict(Process())))  # of one that has gone
    with pytest.raises(TrainingError, match=r"of 4 ranks 1, 2, 3 did not come within 0\.3 s"):
        meet(where, 0, 4, 0.3)


def test_who_is_missing_is_told_to_all_who_are_there() -> None:
    where, told = board(), []

    def come() -> None:
        with pytest.raises(PeerFailed) as raised:
            meet(where, 1, 3, 5.0)
        told.append(str(raised.value))

    waiting = threading.Thread(target=come)
    waiting.start()
    with pytest.raises(TrainingError, match=r"of 3 ranks 2 did not come within 0\.5 s") as raised:
        meet(where, 0, 3, 0.5)
    waiting.join()
    assert told == [str(raised.value)]


def test_who_came_and_says_nothing_is_named() -> None:
    with pytest.raises(PeerFailed, match=r"of 3 ranks 1, 2 came, and said nothing within 0\.2 s"):
        exchange(board(), 0, 3, "mine", 0.2)


def test_the_others_say_that_rank_0_knows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddptrain.parallel.roll_call.AFTER_RANK_0", 0.1)
    with pytest.raises(PeerFailed, match="rank 0 did not begin"):
        meet(board(), 1, 2, 0.1)
