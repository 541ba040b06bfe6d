"""Histograms for loggers: how many numbers fall between one power of two and the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

MANTISSA, BIAS, OTHER = 23, 127, 255
"""Of a float32: the bits of its fraction, the exponent that stands for 1, that of inf and NaN."""
NEGATIVE = OTHER + 1
"""Where the bins of negative numbers begin."""
BINS = 2 * NEGATIVE


@dataclass(frozen=True)
class Histogram:
    """Counts by sign and exponent of a float32, shape (512,): as its first nine bits number them.

    So a bin is from one power of two to the next, of one sign; the first of each sign is zero, with
    what is below 2⁻¹²⁶, and the last is what is not finite. ``sum`` and ``squares`` are of the
    numbers and of their squares.
    """

    counts: list[int]
    sum: float
    squares: float

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def zeros(self) -> int:
        return self.counts[0] + self.counts[NEGATIVE]

    @property
    def not_finite(self) -> int:
        return self.counts[OTHER] + self.counts[NEGATIVE + OTHER]

    @property
    def rms(self) -> float:
        """The root of the mean square; 0 of no numbers."""
        return (self.squares / self.total) ** 0.5 if self.total else 0.0

    def buckets(self) -> tuple[list[float], list[int]]:
        """Upper limits, ascending, and counts of the finite ones; empty between them is one."""
        exponents = range(1, OTHER)
        limits = [-(2.0 ** (e - BIAS)) for e in reversed(exponents)]
        counts = [self.counts[NEGATIVE + e] for e in reversed(exponents)]
        limits += [2.0 ** (1 - BIAS), *(2.0 ** (e + 1 - BIAS) for e in exponents)]
        counts += [self.zeros, *(self.counts[e] for e in exponents)]
        # One that is empty is needed before one that is not: it says where that begins.
        following = [*counts[1:], 0]
        kept = [i for i, pair in enumerate(zip(counts, following, strict=True)) if any(pair)]
        return [limits[i] for i in kept], [counts[i] for i in kept]


@runtime_checkable
class ShowsHistograms(Protocol):
    """What a logger may also be; histograms are left out of any other."""

    def histogram(self, step: int, name: str, histogram: Histogram) -> None:
        """Record what passed through a layer in the step after which ``step`` are done."""
