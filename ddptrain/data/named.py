"""The names that a data set may give to its classes, features and tokens."""

from __future__ import annotations

from typing import Any


def names_of(dataset: Any, attribute: str) -> list[str] | None:
    """A list of names that a data set may have, also below a ``Subset`` of torch's."""
    while not hasattr(dataset, attribute) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names = getattr(dataset, attribute, None)
    return None if names is None else [str(name) for name in names]
