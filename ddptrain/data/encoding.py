"""Turns columns into features: numbers standardised, texts as categories, as training has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddptrain.data.tabular import Floats, Texts
from ddptrain.errors import Refused

MANY_CATEGORIES = 20
ROUNDING = 1e-12
"""Of a number, more than float64 loses in a few sums: it has 16 digits."""


@dataclass(frozen=True)
class Standardised:
    """A column of numbers, by the mean and the deviation of the training rows."""

    name: str
    mean: float
    deviation: float

    @classmethod
    def of(cls, name: str, seen: Floats, computed_from: Floats | None = None) -> Standardised:
        """Learn from the training rows. Raises ``Refused`` if none of them has a value.

        ``computed_from`` are the numbers whose rounding those of ``seen`` have, if not their own.
        """
        known = seen[~np.isnan(seen)]
        if not known.size:
            raise Refused(f"column {name!r} has no value in any row of training; exclude it")
        deviation = deviation_of(known, known if computed_from is None else computed_from)
        return cls(name, float(known.mean()), deviation)

    @property
    def names(self) -> list[str]:
        return [self.name]

    def encode(self, values: Floats) -> npt.NDArray[np.float32]:
        """Shape (rows,) to (rows, 1); a missing value becomes the mean, which is 0."""
        filled = np.where(np.isnan(values), self.mean, values)
        return ((filled - self.mean) / self.deviation).astype(np.float32)[:, None]


@dataclass(frozen=True)
class Categories:
    """A column of texts; ``known`` are those of the training rows, in the order of characters."""

    name: str
    known: tuple[str, ...]
    one_hot: bool

    @classmethod
    def of(cls, name: str, seen: Texts, one_hot: bool) -> Categories:
        """Learn from the training rows. Raises ``Refused`` if none of them has a value."""
        known = sorted(set(seen) - {""})
        if not known:
            raise Refused(f"column {name!r} has no value in any row of training; exclude it")
        return cls(name, tuple(known), one_hot)

    @property
    def names(self) -> list[str]:
        return [f"{self.name}={text}" for text in self.known] if self.one_hot else [self.name]

    def tells_rows_apart(self, rows: int) -> bool:
        """Whether most rows have a text of their own, as with a name or a number of the row."""
        return len(self.known) > max(MANY_CATEGORIES, rows / 2)

    def unknown(self, texts: Texts) -> list[str]:
        """The texts, each once, that no training row has."""
        return sorted(set(texts) - {"", *self.known})

    def encode(self, texts: Texts) -> npt.NDArray[np.float32]:
        """Shape (rows,) to (rows, len(known)), one of them 1; or, without ``one_hot``, to
        (rows, 1), numbers from 1.

        What is missing, or what training does not know, is 0 everywhere: no weight was trained
        for it.
        """
        numbers = number_texts(texts, self.known)
        if not self.one_hot:
            return (numbers + 1).astype(np.float32)[:, None]
        return np.equal.outer(numbers, np.arange(len(self.known))).astype(np.float32)


def deviation_of(values: Floats, computed_from: Floats) -> float:
    """The standard deviation; 1 if ``values`` are the same but for rounding, which is no scale.

    ``computed_from`` are the numbers that were rounded: of differences, what they are of.
    """
    deviation = float(values.std())
    return deviation if deviation > ROUNDING * np.abs(computed_from).max() else 1.0


def number_texts(texts: Texts, known: Sequence[str]) -> npt.NDArray[np.int64]:
    """The position of each text in ``known``, -1 for one that is not there."""
    positions = {text: position for position, text in enumerate(known)}
    return np.array([positions.get(text, -1) for text in texts], dtype=np.int64)
