"""Which samples are for training, validation and test: parts of one fixed permutation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ddptrain.data.shuffle import Permutation
from ddptrain.errors import Refused
from ddptrain.keys import derive

SPLITS = ("train", "val", "test")
FRACTIONS = (0.70, 0.15, 0.15)
"""The parts of training, validation and test, where nothing else is said."""


def check_split(split: str) -> None:
    """Refuse what is no name of a split. Raises ``Refused``."""
    if split not in SPLITS:
        raise Refused(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def check_named(path: Mapping[str, str], split: str) -> None:
    """Refuse a ``path`` by split that has none for ``split``. Raises ``Refused``."""
    if split not in path:
        raise Refused(
            f"path: it names nothing for {split}, only for {', '.join(path)}; add it, or set "
            f"data.{split}=null"
        )


def split_indices(
    samples: int, split: str, fractions: Sequence[float] = FRACTIONS
) -> npt.NDArray[np.int64]:
    """The indices of ``split`` ("train", "val" or "test"), int64; the three are disjoint and
    complete.

    They are a part of a fixed permutation of all samples, in which the run's seed has no say.
    Raises ``Refused`` if ``fractions`` are not three parts that add up to one.
    """
    check_split(split)
    _check_fractions(fractions)
    position = SPLITS.index(split)
    low, high = (round(samples * math.fsum(fractions[:end])) for end in (position, position + 1))
    return Permutation(samples, derive(0, "split"))(np.arange(low, high))


def ordered_ends(samples: int, fractions: Sequence[float] = FRACTIONS) -> tuple[int, int]:
    """Where training and validation end if the splits follow each other, and the test is the rest.

    Raises ``Refused`` if ``fractions`` are not three parts that add up to one.
    """
    _check_fractions(fractions)
    training, known = (round(samples * math.fsum(fractions[:end])) for end in (1, 2))
    return training, known


def _check_fractions(fractions: Sequence[float]) -> None:
    are_numbers = isinstance(fractions, Sequence) and all(
        isinstance(part, int | float) and part >= 0 for part in fractions
    )
    if not are_numbers or len(fractions) != 3 or not math.isclose(math.fsum(fractions), 1):
        raise Refused(
            f"fractions: expected the parts of {', '.join(SPLITS)}, three numbers that add up to "
            f"1, such as [0.8, 0.1, 0.1], got {fractions!r}"
        )


def no_samples(where: str, split: str, fractions: Sequence[float], count: str) -> Refused:
    """What to say of a split that comes out empty."""
    return Refused(
        f"{where}: fractions={list(fractions)} of {count} leave none for {split}; choose others, "
        f"or set data.{split}=null"
    )
