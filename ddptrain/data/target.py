"""The column of a table that is to be predicted, as a class or as a number."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ddptrain.data.classes import check_classes, check_outputs, not_in_training
from ddptrain.data.encoding import MANY_CATEGORIES, Standardised, number_texts
from ddptrain.data.rows import Parts
from ddptrain.data.tabular import NUMBER
from ddptrain.errors import Refused


def class_names_of(parts: Parts, target: str) -> list[str]:
    """The classes of the training rows, in order. Raises ``Refused`` at what is no class."""
    texts = parts.training.texts(target)
    known = sorted(set(texts))
    if not all(re.match(NUMBER, name) for name in known):
        return known
    is_fraction = any(not float(name).is_integer() for name in known)
    if is_fraction or len(known) > max(MANY_CATEGORIES, len(texts) / 2):
        raise Refused(
            f"{parts.training.file.path}: target {target!r} has {len(known)} different numbers, "
            f"such as {known[-1]}, which are no classes; set regression=true to predict a number"
        )
    return sorted(known, key=lambda name: (float(name), name))


def class_targets(
    parts: Parts,
    target: str,
    class_names: Sequence[str],
    outputs: int | None,
    classes: int | None,
) -> Tensor:
    """Labels, int64, shape (rows,). Raises ``Refused`` at a class that training does not have."""
    mine = parts.mine
    texts = mine.texts(target)
    labels = number_texts(texts, class_names)
    for position in np.flatnonzero(labels < 0):
        raise not_in_training(mine.place(int(position)), str(texts[position]))
    where = f"{mine.file.path}: target {target!r}"
    check_classes(where, mine.split, [class_names[i] for i in np.unique(labels)], class_names)
    check_outputs(where, class_names, classes, outputs)
    return torch.from_numpy(labels)


def check_regression(
    parts: Parts, target: str, outputs: int | None, classes: int | None, loss: str | None
) -> None:
    """Refuse a task or a model that is made for classes. Raises ``Refused``."""
    where = f"{parts.mine.file.path}: target {target!r}"
    if classes is not None:
        raise Refused(
            f"{where}: regression=true, but task.classes={classes}; choose a task of regression, "
            "or set regression=false"
        )
    expected = 2 if loss == "gaussian" else 1
    if outputs is not None and outputs != expected:
        of_it = "a mean and a variance" if loss == "gaussian" else "one number"
        raise Refused(
            f"{where}: it is {of_it}, but the model has {outputs} outputs; give it {expected}"
        )


def scale_of(parts: Parts, target: str) -> Standardised:
    """By what to standardise the target: mean and deviation of the training rows."""
    return Standardised.of(target, parts.training.numbers(target))


def number_targets(parts: Parts, target: str, scale: Standardised | None) -> Tensor:
    """Numbers, float32, shape (rows,)."""
    numbers = parts.mine.numbers(target)
    plain = numbers.astype(np.float32) if scale is None else scale.encode(numbers)[:, 0]
    return torch.from_numpy(plain)
