"""The dates of a table's rows, which have to rise from row to row."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from ddptrain.data.tabular import TabularFile
from ddptrain.errors import Refused

Dates = npt.NDArray[np.datetime64]
"""To the second, in the rows' own time zone if they have one, shape (rows,)."""
ISO = re.compile(r"\d{4}(-\d{2}(-\d{2}([T ]\d{2}:\d{2}(:\d{2})?)?)?)?")


def read_dates(file: TabularFile, name: str) -> Dates:
    """A column of dates, in Parquet also as its own type. Raises ``Refused``, with file and row.

    A moment that is there twice, or comes before that of the row above, is refused, too.
    """
    moments, dates = _moments_and_dates(file, name)
    for row in np.flatnonzero(np.isnat(dates)):
        raise Refused(
            f"{file.path}: {file.place(int(row))} has no date in column {name!r}; fill it in, or "
            "take the row out"
        )
    # Not by the dates: a zone whose clocks are put back has an hour twice.
    for row in np.flatnonzero(moments[1:] <= moments[:-1]):
        date, before = dates[row + 1], dates[row]
        is_same = moments[row + 1] == moments[row]
        what = "is there twice" if is_same else f"comes after {shown(before)}"
        remedy = "take one of the rows out" if is_same else "sort the rows by their date"
        raise Refused(
            f"{file.path}: {file.place(int(row) + 1)}: the date {shown(date)} in column {name!r} "
            f"{what}; {remedy}"
        )
    return dates.astype("datetime64[s]")


def end_of(key: str, text: str) -> np.datetime64:
    """The moment at which a second, a day, a month or a year is over. Raises ``Refused``."""
    date = _parsed(text)
    if date is None:
        raise Refused(f"{key}: expected a date such as 2009-07-01, 2009-07 or 2009, got {text!r}")
    end: np.datetime64 = (date + np.timedelta64(1)).astype("datetime64[s]")
    return end


def shown(date: np.datetime64) -> str:
    """A date without a time that is midnight, nor more digits of a second than it needs."""
    text = str(date)
    text = text.rstrip("0").removesuffix(".") if "." in text else text
    return text.removesuffix("T00:00:00")


def _moments_and_dates(file: TabularFile, name: str) -> tuple[Dates, Dates]:
    """When the rows were, as precise as they are: of all time zones alike, and in their own."""
    from pyarrow import ArrowInvalid, compute, types

    column = file.columns[name]
    if not types.is_date(column.type) and not types.is_timestamp(column.type):
        texts = enumerate(file.texts(name))
        dates = np.array([_date(file, name, row, text) for row, text in texts], "datetime64[s]")
        return dates, dates
    moments = np.asarray(column.to_numpy())
    if types.is_date(column.type) or column.type.tz is None:
        return moments, moments
    try:
        return moments, np.asarray(compute.local_timestamp(column).to_numpy())
    except ArrowInvalid as error:
        raise Refused(
            f"{file.path}: column {name!r} is of type {column.type}, whose time zone this machine "
            f"does not know ({error}); install tzdata, or write the dates without a zone"
        ) from None


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
