"""Reads a CSV file as columns of text, and finds the line on which a row of it begins."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv

from ddptrain.errors import Refused


def read_header(file: Path, delimiter: str) -> list[str]:
    """The names in the first line that is not empty; none if there is no such line."""
    return next(([name.strip() for name in record] for _, record in _records(file, delimiter)), [])


def read_columns(file: Path, delimiter: str, count: int) -> list[Any]:
    """The ``count`` columns as pyarrow's strings, without the header.

    What a number is, and what is missing, is for the caller to say. Raises ``Refused`` at a line
    with more or fewer cells, and at what is not UTF-8.
    """
    ragged: list[Any] = []

    def refuse(row: Any) -> str:
        ragged.append(row)
        return "error"

    types = {f"f{i}": pyarrow.string() for i in range(count)}
    try:
        table = pyarrow.csv.read_csv(
            file,
            pyarrow.csv.ReadOptions(use_threads=False, autogenerate_column_names=True),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse
            ),
            pyarrow.csv.ConvertOptions(column_types=types),
        )
    except pyarrow.ArrowInvalid as error:
        if ragged:
            row = ragged[0]
            raise Refused(
                f"{file}: line {line_of(file, delimiter, row.number - 1)} has "
                f"{row.actual_columns} cells, the header has "
                f"{row.expected_columns}; correct the line, or put quotes round a cell with "
                f"{delimiter!r} in it"
            ) from None
        if (line := _first_line_of_other_encoding(file)) is not None:
            raise Refused(f"{file}: line {line} is not UTF-8; save the file as UTF-8") from None
        raise Refused(f"{file}: no CSV that can be read: {error}") from None
    return [column[1:] for column in table.columns]


def line_of(file: Path, delimiter: str, record: int) -> int:
    """The line, counted from 1, on which a record begins; the header is record 0."""
    for number, (line, _) in enumerate(_records(file, delimiter)):
        if number == record:
            return line
    raise IndexError(f"{file} has no record {record}")


def _records(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, each with the line on which it begins."""
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
        reader = csv.reader(text, delimiter=delimiter)
        line = 1
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1


def _first_line_of_other_encoding(file: Path) -> int | None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None
