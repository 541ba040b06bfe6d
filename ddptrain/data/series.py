"""A series of the user's, in a CSV or Parquet file with a date in each row, to be forecast."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ddptrain.data.dates import read_dates
from ddptrain.data.splits import FRACTIONS
from ddptrain.data.tabular import Floats, TabularFile, check_lists
from ddptrain.data.walk_forward import Columns, Split, WalkForward
from ddptrain.errors import Refused


class Series(WalkForward):
    """The column ``value`` of a file, from its own past and that of the columns in ``features``.

    Samples are those of ``WalkForward``; ``conf/data/series.yaml`` has a comment for each option.
    Raises ``Refused``, with file and row, on dates that do not rise, and on what is no number.
    """

    def __init__(
        self,
        split: str,
        path: str,
        date: str,
        value: str,
        window: int,
        horizon: int = 1,
        features: Sequence[str] = (),
        log: Sequence[str] = (),
        scale_target: bool = True,
        fractions: Sequence[float] = FRACTIONS,
        until: str | int | None = None,
        test_rows: int | None = None,
        delimiter: str | None = None,
        inputs: int | None = None,
        outputs: int | None = None,
        loss: str | None = None,
    ) -> None:
        check_lists({"features": features, "log": log})
        file = TabularFile(path, delimiter=delimiter)
        file.check_column(date, "date")
        file.check_column(value, "value")
        names = list(dict.fromkeys([value, *features]))
        for name in names:
            file.check_column(name, "features")
        check_log(log, names)
        values = {name: _numbers(file, name) for name in names}
        columns = Columns(path, read_dates(file, date), values, file.place)
        parts = Split(window, horizon, fractions, until, test_rows)
        super().__init__(columns, split, parts, log, scale_target, inputs, outputs, loss)


def check_log(log: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a column in ``log`` that is none of those read. Raises ``Refused``."""
    for name in log:
        if name not in names:
            raise Refused(f"log: {name!r} is none of the columns read, {', '.join(names)}")


def _numbers(file: TabularFile, name: str) -> Floats:
    values = file.numbers(name, "correct it, or leave the column out")
    for row in np.flatnonzero(np.isnan(values)):
        raise Refused(
            f"{file.path}: {file.place(int(row))} has no value in column {name!r}; fill it in with "
            "what was known then, or take the row out"
        )
    return values
