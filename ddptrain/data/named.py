"""The names that a data set may give to its classes, features and tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

WHITE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def names_of(dataset: Any, attribute: str) -> list[str] | None:
    """A list of names that a data set may have, also below a ``Subset`` of torch's.

    None if it has no such attribute, or one that is something else.
    """
    names = getattr(dataset, attribute, None)
    while names is None and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
        names = getattr(dataset, attribute, None)
    if not isinstance(names, list | tuple | np.ndarray):
        return None
    return [str(name) for name in names]


def byte_name(byte: int) -> str:
    """A byte as it is shown: its letter, a sign for white space, or its number."""
    letter = chr(byte)
    return shown(letter) if letter.isascii() else f"\\x{byte:02x}"


def shown(text: str) -> str:
    """A text with signs for white space, and numbers for what has no letter."""
    return "".join(
        WHITE.get(letter, letter if letter.isprintable() else f"\\x{ord(letter):02x}")
        for letter in text
    )
