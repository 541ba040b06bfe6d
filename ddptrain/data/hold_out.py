"""Which interactions of users with items are trained on, and which are held out, to be found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ddptrain.data.shuffle import Permutation
from ddptrain.data.splits import SPLITS, split_indices
from ddptrain.keys import derive

Indices = npt.NDArray[np.int64]

TRAIN, VAL, TEST = range(len(SPLITS))
GIVEN = len(SPLITS)
"""Of a user that training does not have: shown to the model when it is to find the rest."""
LEFT_OUT = GIVEN + 1
FEWEST = 3
"""Interactions of a user of which one each can be held out for val and test."""


def hold_out_interactions(users: Indices, items: Indices) -> Indices:
    """A role for each interaction, int64, shape (N,): of each user one is for val and one for test.

    ``users`` and ``items``, shape (N,), are numbered from 0; no pair is there twice. Which two it
    is, a fixed permutation of the interactions says. A user with fewer than three is trained on
    alone, and so is one interaction of each item, for a model learns nothing of an item otherwise.
    """
    order = _fixed_order(len(users))
    is_kept = np.zeros(len(users), dtype=bool)
    is_kept[_first_of_each(items, order)] = True
    roles = np.full(len(users), TRAIN)
    enough = np.bincount(users) >= FEWEST
    for role in (TEST, VAL):
        free = order[~is_kept[order] & enough[users[order]]]
        chosen = free[_first_of_each(users[free], np.arange(len(free)))]
        roles[chosen] = role
        is_kept[chosen] = True
    return roles


def hold_out_users(users: Indices, items: Indices, fractions: Sequence[float]) -> Indices:
    """A role for each interaction, int64, shape (N,): whole users are for val and test.

    One interaction of each of these is to be found, the others are given. What training does not
    know of an item is left out, and so is a user of whom then fewer than two are left.
    """
    roles = np.full(len(users), TRAIN)
    split_of = np.empty(int(users.max()) + 1, dtype=np.int64)
    for number, split in enumerate(SPLITS):
        split_of[split_indices(len(split_of), split, fractions)] = number
    held = split_of[users]
    is_known = np.isin(items, items[held == TRAIN])
    roles[held != TRAIN] = GIVEN
    roles[~is_known] = LEFT_OUT
    enough = np.bincount(users, weights=is_known) >= 2
    roles[(held != TRAIN) & ~enough[users]] = LEFT_OUT
    order = _fixed_order(len(users))
    free = order[roles[order] == GIVEN]
    chosen = free[_first_of_each(users[free], np.arange(len(free)))]
    roles[chosen] = held[chosen]
    return roles


def numbered_negatives(positives: Indices, numbers: Indices) -> Indices:
    """The n-th item, from 0, of those that are not in ``positives``, for each n of ``numbers``.

    ``positives`` are in order, and none is there twice. Between two of them the items that are no
    positives have numbers that differ from their own by the positives before.
    """
    before = positives - np.arange(len(positives))
    return numbers + np.searchsorted(before, numbers, side="right")


def _fixed_order(count: int) -> Indices:
    return Permutation(count, derive(0, "split"))(np.arange(count))


def _first_of_each(values: Indices, order: Indices) -> Indices:
    """The first position of each value in ``order``."""
    _, first = np.unique(values[order], return_index=True)
    return order[first]
