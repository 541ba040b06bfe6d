"""What a study compares: its runs by name, and what is shown of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Planned:
    """A run of a study: the name of its directory, what the report calls it, and its overrides."""

    name: str
    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs that are shown together; ``name`` is that of the picture.

    ``columns`` are names of ``ddptrain.studies.table.COLUMNS``, ``picture`` one of
    ``ddptrain.studies.pictures.PICTURES``.
    """

    name: str
    title: str
    text: str
    runs: tuple[Planned, ...]
    columns: tuple[str, ...]
    picture: str


@dataclass(frozen=True)
class Plan:
    """A whole study. ``common`` are overrides of all runs, ``execution`` those that change none."""

    name: str
    title: str
    text: str
    common: tuple[str, ...]
    execution: tuple[str, ...]
    comparisons: tuple[Comparison, ...]

    def runs(self) -> Iterator[Planned]:
        """All runs, in the order in which they are made."""
        for comparison in self.comparisons:
            yield from comparison.runs
