"""The column of a data set that is to be predicted, as classes or as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from ddptrain.data.classes import check_classes, check_outputs, not_in_training
from ddptrain.data.encoding import MANY_CATEGORIES
from ddptrain.data.local_files import Part
from ddptrain.errors import Refused


def read_labels(
    training: Part, mine: Part, label: str, outputs: int | None
) -> tuple[Tensor, list[str]]:
    """Classes, int64, and their names, or numbers, float32, and none; shape (rows,).

    Classes are those of a ``ClassLabel``, or of the training rows, in order. Whole numbers are
    classes unless the model has one of ``outputs``. Raises ``Refused``.
    """
    kind = mine.data.features[label]
    dtype = str(getattr(kind, "dtype", ""))
    where = f"{mine.where}: label {label!r}"
    names = list(kind.names) if hasattr(kind, "int2str") else None
    is_whole = names is None and dtype.startswith(("int", "uint", "bool"))
    if dtype.startswith("float") or (is_whole and outputs == 1):
        if outputs not in (None, 1):
            raise Refused(
                f"{where}: they are numbers, but the model has {outputs} outputs; set "
                "model.config.num_labels=1, or write classes as text or whole numbers"
            )
        return torch.tensor(mine.values(label), dtype=torch.float32), []
    if names is None and not is_whole and dtype not in ("string", "large_string"):
        raise Refused(f"{where}: neither classes nor numbers, but {kind}")
    if outputs == 1:
        raise Refused(f"{where}: they are classes, but the model has one output, for a number")
    values = mine.values(label)
    labels = values
    if names is None:
        known = sorted(set(training.values(label)))
        if is_whole and len(known) > max(MANY_CATEGORIES, len(training.rows) / 2):
            raise Refused(
                f"{where}: {len(known)} different numbers are no classes; set "
                "model.config.num_labels=1 to predict a number"
            )
        names = [str(name) for name in known]
        positions = {name: position for position, name in enumerate(known)}
        labels = [positions.get(value, -1) for value in values]
    for position, number in enumerate(labels):
        if number < 0:
            raise not_in_training(mine.place(position), str(values[position]))
    check_classes(where, mine.split, [names[number] for number in sorted(set(labels))], names)
    check_outputs(where, names, None, outputs)
    return torch.tensor(labels), names
