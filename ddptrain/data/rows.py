"""Which rows of a table are training, and which are the split that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from ddptrain.data.splits import SPLITS, check_named, check_split, no_samples, split_indices
from ddptrain.data.tabular import Floats, TabularFile, Texts
from ddptrain.errors import Refused
from ddptrain.nearest import suggest

logger = logging.getLogger(__name__)
Values = Floats | Texts
Indices = npt.NDArray[np.int64]


@dataclass
class Part:
    """The rows of one split, and those columns of its file that were read so far."""

    split: str
    file: TabularFile
    rows: Indices
    columns: dict[str, Values] = field(default_factory=dict)

    def texts(self, name: str) -> Texts:
        """A column that was read as text, shape (rows of this split,)."""
        return cast("Texts", self.columns[name][self.rows])

    def numbers(self, name: str) -> Floats:
        """A column that was read as numbers, shape (rows of this split,)."""
        return cast("Floats", self.columns[name][self.rows])

    def place(self, position: int) -> str:
        """Where a user finds the row at ``position`` of this split."""
        return f"{self.file.path}: {self.file.place(int(self.rows[position]))}"


@dataclass
class Parts:
    """The training rows, from which everything is learnt, and those of the split asked for."""

    training: Part
    mine: Part

    def all(self) -> Iterable[Part]:
        """Each file once, training first."""
        return (self.training,) if self.mine.file is self.training.file else self._both()

    def _both(self) -> tuple[Part, Part]:
        return (self.training, self.mine)

    def check_columns(self, key: str, names: Iterable[str]) -> None:
        """Refuse names that are no columns. Raises ``Refused``."""
        for part in self.all():
            for name in names:
                part.file.check_column(name, key)

    def read(self, name: str, as_text: bool) -> None:
        """Read a column of all rows. Raises ``Refused`` at the first that is not of its kind."""
        for part in self.all():
            file = part.file
            part.columns[name] = file.texts(name) if as_text else file.numbers(name)

    def refuse_missing(self, names: Iterable[str], remedy: str) -> None:
        """Refuse columns that lack values, in whatever split. Raises ``Refused``."""
        for part in self.all():
            for name in names:
                absent = np.flatnonzero(_is_missing(part.columns[name]))
                if absent.size:
                    count, rows = absent.size, part.file.length
                    raise Refused(
                        f"{part.file.path}: column {name!r} has no value in {count} of {rows} "
                        f"rows, first in {part.file.place(int(absent[0]))}; fill them in, {remedy}"
                    )

    def drop_incomplete(self, names: Iterable[str]) -> None:
        """Leave out the rows that lack a value; which split the others are in stays."""
        before = len(self.mine.rows)
        for part in self._both():
            lacking = np.zeros(part.file.length, dtype=bool)
            for name in names:
                lacking |= _is_missing(part.columns[name])
            part.rows = part.rows[~lacking[part.rows]]
            if not part.rows.size:
                raise Refused(
                    f"{part.file.path}: missing=drop leaves no row of split {part.split}; "
                    "exclude the columns that lack most values, or set missing=mean"
                )
        if dropped := before - len(self.mine.rows):
            logger.warning(
                "data.%s: %s of %s rows lack a value and are dropped",
                *(self.mine.split, dropped, before),
            )


def read_parts(
    path: str | Mapping[str, str],
    split: str,
    split_column: str | None,
    fractions: Sequence[float],
    missing_values: Sequence[str],
    delimiter: str | None,
) -> Parts:
    """Read the file or files at ``path``, and divide their rows. Raises ``Refused``."""
    check_split(split)
    if isinstance(path, str):
        file = TabularFile(path, missing_values, delimiter)
        columns: dict[str, Values] = {}
        training, mine = (
            Part(name, file, _rows_of(file, name, split_column, fractions), columns)
            for name in ("train", split)
        )
        return Parts(training, mine)
    if split_column is not None:
        raise Refused("split_column: there is a file for each split; leave split_column out")
    parts = {}
    for name in ("train", split):
        check_named(path, name)
        if name not in parts:
            file = TabularFile(path[name], missing_values, delimiter)
            parts[name] = Part(name, file, np.arange(file.length))
    return Parts(parts["train"], parts[split])


def _rows_of(
    file: TabularFile, split: str, split_column: str | None, fractions: Sequence[float]
) -> Indices:
    if split_column is None:
        rows = split_indices(file.length, split, fractions)
        if not rows.size:
            raise no_samples(file.path, split, fractions, f"{file.length} rows")
        return rows
    return np.flatnonzero(said_splits(file, split_column, (split,)) == split)


def said_splits(file: TabularFile, split_column: str, needed: Iterable[str]) -> Texts:
    """The split that a column names for each row.

    Raises ``Refused`` at what is none, and if no row is of one of those ``needed``.
    """
    file.check_column(split_column, "split_column")
    said = file.texts(split_column)
    for row in np.flatnonzero(~np.isin(said, np.array(SPLITS, dtype=object))):
        raise Refused(
            f"{file.path}: {file.place(int(row))}: {said[row]!r} in column {split_column!r} "
            f"is no split{suggest(said[row], list(SPLITS))}"
        )
    for split in needed:
        if not (said == split).any():
            raise Refused(
                f"{file.path}: no row has {split!r} in column {split_column!r}; set "
                f"data.{split}=null if there is no such split"
            )
    return said


def _is_missing(values: Values) -> npt.NDArray[np.bool_]:
    missing = values == "" if values.dtype == object else np.isnan(values.astype(np.float64))
    return np.asarray(missing, dtype=np.bool_)
