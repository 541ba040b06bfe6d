"""A series as windows and what came after them, split in the order of time, without look-ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset

from ddptrain.data.dates import Dates, end_of, shown
from ddptrain.data.encoding import Standardised, deviation_of
from ddptrain.data.splits import SPLITS, check_split, ordered_ends
from ddptrain.data.tabular import Floats
from ddptrain.errors import Refused


@dataclass(frozen=True)
class Columns:
    """The rows of a series in the order of time: their dates, and values by column.

    The first column is the one to be forecast. ``place`` says where a user finds a row, ``where``
    where all of them.
    """

    where: str
    dates: Dates
    values: dict[str, Floats]
    place: Callable[[int], str]


@dataclass(frozen=True)
class Split:
    """Where training, validation and test end, as numbers of rows, and how far a sample reaches.

    ``until`` is the last date that training and validation know, which divide the rows up to it as
    ``fractions`` say; None divides all rows. The test is the next ``test_rows``, None all.
    """

    window: int
    horizon: int
    fractions: Sequence[float]
    until: str | int | None
    test_rows: int | None

    def ends(self, dates: Dates) -> dict[str, int]:
        """The row behind the last one of each split. Raises ``Refused``."""
        for key in ("window", "horizon", "test_rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise Refused(f"{key}: expected a number above 0, got {value}")
        rows = len(dates)
        training, known = ordered_ends(rows, self.fractions)
        if self.until is not None:
            share = training / known if known else 0.0
            # Up to the first date after it: a clock that is put back shows some again.
            later = np.flatnonzero(dates >= end_of("until", str(self.until)))
            known = int(later[0]) if later.size else rows
            training = round(known * share)
        test = rows if self.test_rows is None else min(rows, known + self.test_rows)
        return dict(zip(SPLITS, (training, known, test), strict=True))

    def origins(self, split: str, ends: dict[str, int]) -> range:
        """The rows after which a value is forecast: all that it takes, and it, are before the end.

        The first of validation and of test is the last row of the split before: what is known when
        the time of theirs begins.
        """
        position = SPLITS.index(split)
        begin = ends[SPLITS[position - 1]] - 1 if position else 0
        return range(max(begin, self.window), max(ends[split] - self.horizon, 0))


class WalkForward(TensorDataset):
    """Samples (past, change) in the order of time: float32, shapes (window × columns,) and ().

    The past are the last ``window`` changes from row to row of each column, step by step, by mean
    and deviation of the training rows. The change is that of the first column from the last known
    row, the origin, to ``horizon`` rows later, so the naive forecast is 0; with ``scale_target``
    it is divided by its deviation over the training rows. Columns in ``log`` are taken as
    logarithms, of which a change is a rate of growth.

    The splits follow each other in time. What a later row holds changes no sample of an earlier
    origin, and nothing of validation or test changes a scale. Raises ``Refused``.
    """

    def __init__(
        self,
        columns: Columns,
        split: str,
        parts: Split,
        log: Sequence[str],
        scale_target: bool,
        inputs: int | None,
        outputs: int | None,
        loss: str | None,
    ) -> None:
        check_split(split)
        ends = parts.ends(columns.dates)
        for each in dict.fromkeys(("train", split)):
            _check_length(columns, each, parts, ends)
        _check_sizes(columns, parts.window, inputs, outputs, loss)
        levels = {name: _level(columns, name, name in log) for name in columns.values}
        steps = [_steps(name, level, ends["train"]) for name, level in levels.items()]
        past = np.stack(steps, axis=1)  # the change to row i + 1 is in line i
        name = next(iter(columns.values))
        self.series = levels[name]
        self.horizon = parts.horizon
        self.origins = parts.origins(split, ends)
        self.known = ends["val" if split == "test" else "train"]
        self.scale = 1.0
        if scale_target:
            changes = self._changes(parts.origins("train", ends))
            self.scale = deviation_of(changes, self.series[: ends["train"]])
        windows = np.stack(
            [past[origin - parts.window : origin].ravel() for origin in self.origins]
        )
        back = range(parts.window - 1, -1, -1)
        self.feature_names = [f"{column} −{step}" for step in back for column in columns.values]
        targets = self._changes(self.origins) / self.scale
        super().__init__(torch.from_numpy(windows), torch.from_numpy(targets).float())

    def _changes(self, origins: range) -> Floats:
        first = np.arange(origins.start, origins.stop)
        return np.asarray(self.series[first + self.horizon] - self.series[first])


def _check_length(columns: Columns, split: str, parts: Split, ends: dict[str, int]) -> None:
    if parts.origins(split, ends):
        return
    rows = len(columns.dates)
    needed = parts.window + 1 + parts.horizon if split == "train" else parts.horizon
    begin = 0 if split == "train" else ends[SPLITS[SPLITS.index(split) - 1]]
    last = f"{rows} rows, to {shown(columns.dates[-1])}" if rows else "no rows"
    raise Refused(
        f"{columns.where}: of {last}, {split} has {max(ends[split] - begin, 0)}, too few for a "
        f"sample: window={parts.window} and horizon={parts.horizon} take {needed}; make them "
        "smaller, choose other fractions or another date for until"
        + ("" if split == "train" else f", or set data.{split}=null")
    )


def _check_sizes(
    columns: Columns, window: int, inputs: int | None, outputs: int | None, loss: str | None
) -> None:
    count = window * len(columns.values)
    if inputs is not None and inputs != count:
        raise Refused(
            f"{columns.where}: {window} steps of {', '.join(columns.values)} are {count} inputs, "
            f"but model.inputs={inputs}; set model.inputs={count}"
        )
    expected = 2 if loss == "gaussian" else 1
    if outputs is not None and outputs != expected:
        raise Refused(
            f"{columns.where}: a forecast takes {expected} of a model's outputs, and the model has "
            f"{outputs}; set model.outputs={expected}"
        )


def _level(columns: Columns, name: str, is_log: bool) -> Floats:
    values = columns.values[name]
    if not is_log:
        return values
    for row in np.flatnonzero(values <= 0):
        raise Refused(
            f"{columns.where}: {columns.place(int(row))}: {values[row]:g} in column {name!r} has "
            "no logarithm; take it out of log"
        )
    return np.log(values)


def _steps(name: str, level: Floats, training: int) -> npt.NDArray[np.float32]:
    """The changes from row to row, float32, by mean and deviation of the training rows."""
    changes = np.diff(level)
    seen = Standardised.of(name, changes[: training - 1], level[:training])
    return seen.encode(changes)[:, 0]
