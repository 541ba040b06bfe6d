"""A CSV or Parquet file of the user's of who had to do with what, as implicit feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddptrain.data.encoding import number_texts
from ddptrain.data.feedback import Feedback, Observed, divide
from ddptrain.data.hold_out import TRAIN, Indices
from ddptrain.data.rows import said_splits
from ddptrain.data.splits import FRACTIONS, SPLITS, check_split
from ddptrain.data.tabular import Floats, TabularFile, Texts, check_lists
from ddptrain.errors import Refused


class Interactions(Feedback):
    """The rows of a table as interactions of users with items, each pair once.

    Weights of rows with the same user and item add up; by their mean over training they are
    divided, so that they say how much an interaction counts beside others. The order of rows does
    not matter. ``conf/data/interactions.yaml`` has a comment for each option. Raises ``Refused``,
    with file, column and row, on what cannot be trained with, and on a model that is made for
    other numbers of users or items.
    """

    def __init__(
        self,
        split: str,
        path: str,
        user: str,
        item: str,
        weight: str | None = None,
        split_by: str = "interaction",
        fractions: Sequence[float] = FRACTIONS,
        split_column: str | None = None,
        negatives: int | None = None,
        missing_values: Sequence[str] = (),
        delimiter: str | None = None,
        users: int | None = None,
        items: int | None = None,
    ) -> None:
        check_split(split)
        check_lists({"missing_values": missing_values})
        file = TabularFile(path, missing_values, delimiter)
        for key, column in {"user": user, "item": item, "weight": weight}.items():
            if column is not None:
                file.check_column(column, key)
        pairs = _Pairs.of(_named(file, user), _named(file, item))
        weights = pairs.sums(_weights(file, weight))
        if split_column is None:
            roles = divide(path, split, pairs.users, pairs.items, split_by, fractions)
        else:
            roles = _said_roles(file, split_column, split, pairs)
        weights /= weights[roles == TRAIN].mean()
        observed = Observed(
            *(pairs.users, pairs.items, roles, weights.astype(np.float32)),
            *(pairs.user_names.tolist(), pairs.item_names.tolist()),
        )
        super().__init__(split, path, observed, users, items, negatives)


@dataclass(frozen=True)
class _Pairs:
    """Each pair of a user and an item once, and which pair a row is of."""

    users: Indices
    items: Indices
    user_names: Texts
    item_names: Texts
    of_rows: Indices

    @classmethod
    def of(cls, users: Texts, items: Texts) -> _Pairs:
        user_names, user_of = np.unique(users, return_inverse=True)
        item_names, item_of = np.unique(items, return_inverse=True)
        pairs, of_rows = np.unique(user_of * len(item_names) + item_of, return_inverse=True)
        return cls(*np.divmod(pairs, len(item_names)), user_names, item_names, of_rows)

    def sums(self, values: Floats) -> Floats:
        """Of a number for each row, the sum for each pair."""
        return np.bincount(self.of_rows, weights=values).astype(np.float64)


def _named(file: TabularFile, column: str) -> Texts:
    """A column that says who or what. Raises ``Refused`` if a row does not."""
    names = file.texts(column)
    _refuse_rows(file, names == "", f"has no value in column {column!r}")
    return names


def _weights(file: TabularFile, column: str | None) -> Floats:
    if column is None:
        return np.ones(file.length)
    weights = file.numbers(column)
    _refuse_rows(
        file, ~(weights > 0), f"has a weight in column {column!r} that is missing or not above 0"
    )
    return weights


def _said_roles(file: TabularFile, split_column: str, split: str, pairs: _Pairs) -> Indices:
    """The roles by a column of splits. Raises ``Refused`` where training lacks what is asked."""
    roles_of_rows = number_texts(said_splits(file, split_column, ("train", split)), SPLITS)
    roles = np.empty(len(pairs.users), dtype=np.int64)
    roles[pairs.of_rows] = roles_of_rows
    _refuse_rows(
        file,
        roles[pairs.of_rows] != roles_of_rows,
        "is in another split than a row of the same user and item",
    )
    trained = roles == TRAIN
    for what, numbers in (("a user", pairs.users), ("an item", pairs.items)):
        unknown = ~np.isin(numbers, numbers[trained])
        _refuse_rows(file, unknown[pairs.of_rows], f"is of {what} that no row of train has")
    return roles


def _refuse_rows(file: TabularFile, at_fault: npt.NDArray[np.bool_], why: str) -> None:
    rows = np.flatnonzero(at_fault)
    if rows.size:
        more = f" (and {rows.size - 1} more)" if rows.size > 1 else ""
        place = file.place(int(rows[0]))
        raise Refused(f"{file.path}: {place}{more} {why}; correct it, or take it out")
