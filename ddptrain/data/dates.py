"""The dates of a table's rows, which have to rise from row to row."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from ddptrain.data.tabular import TabularFile
from ddptrain.errors import Refused

Dates = npt.NDArray[np.datetime64]
"""To the second, shape (rows,)."""
ISO = re.compile(r"\d{4}(-\d{2}(-\d{2}([T ]\d{2}:\d{2}(:\d{2})?)?)?)?")


def read_dates(file: TabularFile, name: str) -> Dates:
    """A column of dates, in Parquet also as its own type. Raises ``Refused``, with file and row.

    A date that is there twice, or comes before that of the row above, is refused, too.
    """
    import pyarrow

    column = file.columns[name]
    if pyarrow.types.is_date(column.type) or pyarrow.types.is_timestamp(column.type):
        seconds = column.cast(pyarrow.timestamp("us")).to_numpy().astype("datetime64[s]")
        dates = np.asarray(seconds)
    else:
        texts = enumerate(file.texts(name))
        dates = np.array([_date(file, name, row, text) for row, text in texts], "datetime64[s]")
    for row in np.flatnonzero(np.isnat(dates)):
        raise Refused(
            f"{file.path}: {file.place(int(row))} has no date in column {name!r}; fill it in, or "
            "take the row out"
        )
    for row in np.flatnonzero(dates[1:] <= dates[:-1]):
        date, before = dates[row + 1], dates[row]
        what = "is there twice" if date == before else f"comes after {shown(before)}"
        remedy = "take one of the rows out" if date == before else "sort the rows by their date"
        raise Refused(
            f"{file.path}: {file.place(int(row) + 1)}: the date {shown(date)} in column {name!r} "
            f"{what}; {remedy}"
        )
    return dates


def end_of(key: str, text: str) -> np.datetime64:
    """The moment at which a second, a day, a month or a year is over. Raises ``Refused``."""
    date = _parsed(text)
    if date is None:
        raise Refused(f"{key}: expected a date such as 2009-07-01, 2009-07 or 2009, got {text!r}")
    end: np.datetime64 = (date + np.timedelta64(1)).astype("datetime64[s]")
    return end


def shown(date: np.datetime64) -> str:
    """A date without a time that is midnight."""
    return str(date).removesuffix("T00:00:00")


def _date(file: TabularFile, name: str, row: int, text: str) -> np.datetime64:
    if text == "":
        return np.datetime64("NaT", "s")
    date = _parsed(text)
    if date is None:
        raise Refused(
            f"{file.path}: {file.place(row)}: {text!r} in column {name!r} is no date; write it as "
            "2009-07-01, 2009-07-01T12:00, 2009-07 or 2009"
        )
    return date


def _parsed(text: str) -> np.datetime64 | None:
    """As precise as it is written; None if it is no date, as 2009-02-30."""
    if not ISO.fullmatch(text):
        return None
    try:
        return np.datetime64(text)
    except ValueError:
        return None
