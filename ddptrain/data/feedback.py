"""Implicit feedback: which users have to do with which items, to train on or to be found again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddptrain.data.hold_out import (
    FEWEST,
    GIVEN,
    TEST,
    TRAIN,
    VAL,
    Indices,
    hold_out_interactions,
    hold_out_users,
    numbered_negatives,
)
from ddptrain.data.splits import SPLITS, check_split, no_samples, split_indices
from ddptrain.errors import Refused

SHOWN = 8
SPLIT_BY = ("interaction", "user")


@dataclass(frozen=True)
class Observed:
    """Who had to do with what, each pair once, in the order of users, then of items.

    ``users`` and ``items``, positions in ``user_names`` and ``item_names``, have shape (N,), and so
    have ``roles``, each one of ``ddptrain.data.hold_out``, and ``weights`` (float32).
    """

    users: Indices
    items: Indices
    roles: Indices
    weights: npt.NDArray[np.float32]
    user_names: Sequence[str]
    item_names: Sequence[str]


class Feedback(Dataset[dict[str, Tensor]]):
    """One split of what was observed, as ``ddptrain.tasks.Recommendation`` takes it.

    In training a sample is one interaction: ``user`` and ``item``, int64, shape (); ``weight``,
    float32, shape (); ``known``, the other items that the user is known to have, bool, shape
    (items,); and with ``negatives`` so many of those that the user is not known to have, int64,
    shape (negatives,), drawn anew in each epoch, each as likely as any other. In val and test it
    is one user: ``user``; ``relevant``, the items to be found, and ``known``, those that are no
    answer, bool, shape (items,). In test, those of val are known. Raises ``Refused``.
    """

    def __init__(
        self,
        split: str,
        where: str,
        observed: Observed,
        users: int | None,
        items: int | None,
        negatives: int | None = None,
    ) -> None:
        role = SPLITS.index(split)
        mine = np.flatnonzero(observed.roles == role)
        shown = [TRAIN, GIVEN, VAL] if role == TEST else [TRAIN, GIVEN]
        self.user_names, self.item_names = observed.user_names, observed.item_names
        self.is_training = role == TRAIN
        self.negatives = negatives
        self._observed = observed
        self._known = _ByUser(observed, np.flatnonzero(np.isin(observed.roles, shown)))
        self._mine = _ByUser(observed, mine)
        self._samples = mine if self.is_training else np.unique(observed.users[mine])
        _check_sizes(where, observed, users, items)
        if negatives is not None:
            self._check_negatives(where, negatives)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._interaction(index) if self.is_training else self._user(index)

    def _interaction(self, index: int) -> dict[str, Tensor]:
        position, observed = self._samples[index], self._observed
        user, item = int(observed.users[position]), int(observed.items[position])
        positives = self._known.items(user)
        known = self._marked(positives)
        known[item] = False  # or the answer would be among what is given
        sample = {
            "user": torch.tensor(user),
            "item": torch.tensor(item),
            "weight": torch.tensor(observed.weights[position]),
            "known": known,
        }
        if self.negatives is not None:
            sample["negatives"] = self._draw(positives, self.negatives)
        return sample

    def _user(self, index: int) -> dict[str, Tensor]:
        user = int(self._samples[index])
        return {
            "user": torch.tensor(user),
            "relevant": self._marked(self._mine.items(user)),
            "known": self._marked(self._known.items(user)),
        }

    def _draw(self, positives: Indices, count: int) -> Tensor:
        """From torch's generator, which is keyed by (seed, epoch, index) before each sample."""
        numbers = torch.randint(len(self.item_names) - len(positives), (count,))
        return torch.from_numpy(numbered_negatives(positives, numbers.numpy()))

    def _marked(self, items: Indices) -> Tensor:
        marks = torch.zeros(len(self.item_names), dtype=torch.bool)
        marks[torch.from_numpy(items)] = True
        return marks

    def _check_negatives(self, where: str, negatives: int) -> None:
        if negatives < 1:
            raise Refused(f"negatives: expected a number above 0, or null, got {negatives}")
        counts = np.bincount(self._known.users)
        if counts.max() == len(self.item_names):
            raise Refused(
                f"{where}: user {self.user_names[int(counts.argmax())]!r} has every item, which "
                "leaves none to draw as a negative; take that user out, or set "
                "data.train.negatives=null"
            )


class _ByUser:
    """The items of each user, in order, of some of what was observed."""

    def __init__(self, observed: Observed, chosen: Indices) -> None:
        self.users = observed.users[chosen]
        self._items = observed.items[chosen]

    def items(self, user: int) -> Indices:
        first, last = np.searchsorted(self.users, (user, user + 1))
        return self._items[first:last]


def divide(
    where: str,
    split: str,
    users: Indices,
    items: Indices,
    split_by: str,
    fractions: Sequence[float],
) -> Indices:
    """A role for each interaction, int64, shape (N,).

    Raises ``Refused`` at what is no choice, and with the reason if nothing is left for training or
    for ``split``.
    """
    check_split(split)
    if split_by not in SPLIT_BY:
        raise Refused(f"split_by: expected one of {', '.join(SPLIT_BY)}, got {split_by!r}")
    if split_by == "user":
        count = int(users.max()) + 1
        for needed in ("train", split):
            if not split_indices(count, needed, fractions).size:
                raise no_samples(where, needed, fractions, f"{count} users")
        roles = hold_out_users(users, items, fractions)
    else:
        roles = hold_out_interactions(users, items)
    if (roles == SPLITS.index(split)).any():
        return roles
    raise Refused(
        f"{where}: split {split} comes out empty: {_why_empty(split, users, roles, split_by)}; "
        f"take more rows, or set data.{split}=null"
    )


def _why_empty(split: str, users: Indices, roles: Indices, split_by: str) -> str:
    if split_by == "user":
        return "none of its users has two items that users of train have as well"
    if np.bincount(users).max() < FEWEST:
        return "no user has three items, one each for train, val and test"
    kept = "one interaction of each item stays in train, which leaves users with three items"
    return f"{kept} {'one at most, for test' if (roles == TEST).any() else 'none to hold out'}"


def _check_sizes(where: str, observed: Observed, users: int | None, items: int | None) -> None:
    """Refuse a model made for fewer users, or for another number of items; None passes."""
    count = len(observed.user_names)
    if users is not None and (observed.roles == GIVEN).any():
        raise Refused(
            f"{where}: split_by=user holds out whole users, of whom a model with one vector for "
            "each user (model.users) learns nothing; take model=two_tower, or set "
            "data.train.split_by=interaction"
        )
    if users is not None and users < count:
        raise Refused(
            f"{where}: there are {count} users, but model.users={users}; set model.users={count}"
        )
    count = len(observed.item_names)
    if items is not None and items != count:
        names = ", ".join(observed.item_names[:SHOWN]) + (", …" if count > SHOWN else "")
        raise Refused(
            f"{where}: there are {count} items ({names}), but model.items={items}; "
            f"set model.items={count}"
        )
