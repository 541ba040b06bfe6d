"""The columns of a CSV or Parquet file as numbers or texts, each row with its place in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ddptrain.errors import Refused
from ddptrain.nearest import suggest

Floats = npt.NDArray[np.float64]
Texts = npt.NDArray[np.object_]

NUMBER = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")


class TabularFile:
    """The columns of one file. A missing value is NaN among numbers, and "" among texts.

    Missing are an empty cell, a null, a NaN, and the texts in ``missing_values``; spaces around a
    text do not count. Raises ``Refused``, with file, column and row, on what cannot be used.
    """

    def __init__(
        self, path: str, missing_values: Sequence[str] = (), delimiter: str | None = None
    ) -> None:
        self.path = path
        self.file = Path(path).expanduser()
        suffix = self.file.suffix.lower()
        if suffix not in DELIMITERS and suffix not in PARQUET:
            expected = ", ".join([*DELIMITERS, *PARQUET])
            raise Refused(f"{path}: expected a file whose name ends in one of {expected}")
        if not self.file.is_file():
            raise Refused(f"{path}: no such file (looked for from {Path.cwd()})")
        self.is_parquet = suffix in PARQUET
        self.delimiter = delimiter or DELIMITERS.get(suffix, ",")
        self._arrow = _import_pyarrow()
        columns = self._read_parquet() if self.is_parquet else self._read_csv()
        self.columns = {name: self._cleaned(c, missing_values) for name, c in columns.items()}
        self.length = len(next(iter(columns.values()), ()))
        self._numbers: dict[str, Floats | None] = {}
        if self.length == 0:
            raise Refused(f"{path}: it is empty; a header and rows are expected")

    def check_column(self, name: str, key: str) -> None:
        """Refuse a column that is not there; ``key`` is what names it in the config."""
        if name not in self.columns:
            hint = suggest(name, list(self.columns))
            one = " (one column only: is delimiter another?)" if len(self.columns) == 1 else ""
            raise Refused(f"{key}: {self.path} has no column {name!r}{hint}{one}")

    def is_text(self, name: str) -> bool:
        """Whether a column holds text: by its type in Parquet, by most of its values in CSV."""
        column = self._typed(name)
        if not self._is_string(column) or self.is_parquet:
            return self._is_string(column)
        if self._parsed(name) is not None:
            return False
        matches = self._arrow.compute.match_substring_regex(column, NUMBER)
        numeric = self._arrow.compute.sum(matches).as_py() or 0
        return bool(2 * numeric < len(column) - column.null_count)

    def numbers(self, name: str, remedy: str = "") -> Floats:
        """A column as float64, shape (rows,). Raises ``Refused`` at what is no finite number.

        ``remedy`` is what to do about that; by default what a table has options for.
        """
        if (values := self._parsed(name)) is not None:
            return values
        compute, column = self._arrow.compute, self._typed(name)
        if self._is_string(column):
            matches = compute.match_substring_regex(column, NUMBER)
            if (first := compute.index(matches, False).as_py()) >= 0:
                raise self._not_a_number(name, first, column[first].as_py(), remedy)
        values = compute.cast(column, self._arrow.float64(), safe=False).to_numpy()
        first = int(np.flatnonzero(np.isinf(values))[0])
        raise self._not_a_number(name, first, str(column[first].as_py()), remedy)

    def texts(self, name: str) -> Texts:
        """A column as str, shape (rows,); a whole number as "3", not "3.0"."""
        column, types = self._typed(name), self._arrow.types
        # Not by way of float64, which takes whole numbers from 2⁵³ on for each other.
        is_whole = types.is_integer(column.type)
        is_whole |= types.is_decimal(column.type) and column.type.scale == 0
        if is_whole or self._is_string(column):
            compute = self._arrow.compute
            texts = compute.fill_null(compute.cast(column, self._arrow.string()), "")
            return cast("Texts", texts.to_numpy())
        numbers, positions = np.unique(self.numbers(name), return_inverse=True)
        return np.array([number_name(value) for value in numbers], dtype=object)[positions]

    def place(self, row: int) -> str:
        """Where a user finds the ``row``-th row: its line in a CSV file, its number in Parquet,
        each counted from 1."""
        if self.is_parquet:
            return f"row {row + 1}"
        from ddptrain.data.csv_file import line_of

        return f"line {line_of(self.file, self.delimiter, row + 1)}"

    def _read_parquet(self) -> dict[str, Any]:
        try:
            table = self._arrow.parquet.ParquetFile(self.file).read(use_threads=False)
        except (self._arrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise Refused(f"{self.path}: no Parquet that can be read: {reason}") from None
        self._check_names(table.column_names)
        # What pandas writes for an index is no column of the user's.
        return {
            name: column
            for name, column in zip(table.column_names, table.columns, strict=True)
            if not name.startswith("__index_level_")
        }

    def _read_csv(self) -> dict[str, Any]:
        from ddptrain.data.csv_file import read_columns, read_header

        names = read_header(self.file, self.delimiter)
        if not names:
            return {}
        self._check_names(names)
        return dict(zip(names, read_columns(self.file, self.delimiter, len(names)), strict=True))

    def _check_names(self, names: Sequence[str]) -> None:
        """Refuse columns without a name of their own."""
        if "" in names:
            raise Refused(
                f"{self.path}: column {names.index('') + 1} has no name in the header; give it "
                "one, or leave it out of the file (pandas: to_csv(…, index=False))"
            )
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise Refused(f"{self.path}: {count} columns are called {name!r}; rename them")

    def _cleaned(self, column: Any, missing_values: Sequence[str]) -> Any:
        """The column with texts of one type, trimmed, and null for what is missing."""
        arrow, compute, types = self._arrow, self._arrow.compute, self._arrow.types
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if types.is_large_string(column.type) or types.is_string_view(column.type):
            column = column.cast(arrow.string())
        if not types.is_string(column.type):
            return column
        trimmed = compute.utf8_trim_whitespace(column)
        marks = arrow.array(["", *missing_values], arrow.string())
        return compute.if_else(compute.is_in(trimmed, marks), None, trimmed)

    def _typed(self, name: str) -> Any:
        """A column of text or numbers. Raises ``Refused`` at any other."""
        column, types = self.columns[name], self._arrow.types
        known = (
            *(types.is_string, types.is_null, types.is_integer, types.is_floating),
            *(types.is_decimal, types.is_boolean),
        )
        if not any(is_type(column.type) for is_type in known):
            raise Refused(
                f"{self.path}: column {name!r} is of type {column.type}, neither numbers nor "
                f"text; leave it out (exclude: [{name}]), or write it as one of them"
            )
        return column

    def _is_string(self, column: Any) -> bool:
        return bool(self._arrow.types.is_string(column.type))

    def _parsed(self, name: str) -> Floats | None:
        """A column as float64, or None if not every value is a finite number, or missing."""
        if name not in self._numbers:
            column = self._typed(name)
            try:
                as_float = self._arrow.compute.cast(column, self._arrow.float64(), safe=False)
                values = as_float.to_numpy()
            except self._arrow.ArrowInvalid:
                values = None
            else:
                # The text "nan" is no number; a NaN of Parquet is a value that is missing.
                said_nan = self._is_string(column) and np.isnan(values).sum() > column.null_count
                values = None if said_nan or np.isinf(values).any() else values
            self._numbers[name] = values
        return self._numbers[name]

    def _not_a_number(self, name: str, row: int, value: str, remedy: str) -> Refused:
        of_tables = (
            f"correct it, or say that it is a missing value (missing_values: [{value}]), or that "
            f"the column is of categories (categorical: [{name}])"
        )
        return Refused(
            f"{self.path}: {self.place(row)}: {value!r} in column {name!r}, which is of numbers; "
            f"{remedy or of_tables}"
        )


def check_lists(lists: Mapping[str, object]) -> None:
    """Refuse what is no list of texts; one text would be taken letter by letter."""
    for key, names in lists.items():
        is_list = isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)
        if not is_list:
            raise Refused(f"{key}: expected a list of texts, such as [one, two], got {names!r}")


def number_name(value: float) -> str:
    """A number as the name of a category: "3" rather than "3.0"; "" if it is missing."""
    if np.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise Refused(
            f"tables are read with pyarrow, and there is no {error.name}; install it: "
            "pip install 'ddptrain[tables]'"
        ) from None
    return pyarrow
