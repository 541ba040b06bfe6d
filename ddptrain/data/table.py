"""A CSV or Parquet file of the user's as features and targets, ready for a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset

from ddptrain.data.encoding import Categories, Standardised
from ddptrain.data.rows import Parts, read_parts
from ddptrain.data.splits import FRACTIONS
from ddptrain.data.tabular import check_lists
from ddptrain.data.target import (
    check_regression,
    class_names_of,
    class_targets,
    number_targets,
    scale_of,
)
from ddptrain.errors import Refused

logger = logging.getLogger(__name__)
Encoder = Standardised | Categories

CHOICES = {"missing": ("refuse", "mean", "drop"), "encoding": ("one_hot", "number")}
SHOWN = 12


class Table(TensorDataset):
    """Rows of a table as (features, target): float32, shape (features,), and a class or a number.

    All that has to be learnt of the data (mean and deviation of a column of numbers, the
    categories of a column of texts, the classes) comes from the training rows, whatever ``split``
    is. A text that training does not know, and with ``missing="mean"`` one that is missing, is 0
    in all columns of its one-hot, and 0 as a number, where the known ones begin with 1.

    The target is a class, int64, 0 to C-1 in the order of ``class_names`` (numbers by size, texts
    by their characters); with ``regression`` it is a float32. ``conf/data/table.yaml`` has a
    comment for each option. Raises ``Refused``, with file, column and row, on what cannot be
    trained with, and on a model or a task that is made for other sizes.
    """

    def __init__(
        self,
        split: str,
        path: str | Mapping[str, str],
        target: str,
        features: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        categorical: Sequence[str] = (),
        encoding: str = "one_hot",
        missing: str = "refuse",
        missing_values: Sequence[str] = (),
        split_column: str | None = None,
        fractions: Sequence[float] = FRACTIONS,
        delimiter: str | None = None,
        regression: bool = False,
        standardise_target: bool = False,
        inputs: int | None = None,
        outputs: int | None = None,
        classes: int | None = None,
        loss: str | None = None,
    ) -> None:
        _check_choices(missing=missing, encoding=encoding)
        if standardise_target and not regression:
            raise Refused("standardise_target: a class is no number; set regression=true for one")
        lists = {"exclude": exclude, "categorical": categorical, "missing_values": missing_values}
        check_lists(lists if features is None else lists | {"features": features})
        parts = read_parts(path, split, split_column, fractions, missing_values, delimiter)
        parts.check_columns("target", [target])
        parts.check_columns("exclude", exclude)
        parts.check_columns("categorical", categorical)
        left_out = {target, split_column, *exclude}
        names = [n for n in features or parts.training.file.columns if n not in left_out]
        parts.check_columns("features", names)
        _read(parts, names, categorical, target, as_class=not regression)
        _see_to_missing(parts, names, target, missing)
        encoders = [_encoder(parts, name, encoding == "one_hot", features) for name in names]
        self.feature_names = [column for encoder in encoders for column in encoder.names]
        _check_inputs(parts, self.feature_names, target, inputs)
        self.class_names: list[str] = []
        self.scale: Standardised | None = None
        if regression:
            check_regression(parts, target, outputs, classes, loss)
            self.scale = scale_of(parts, target) if standardise_target else None
            targets = number_targets(parts, target, self.scale)
        else:
            self.class_names = class_names_of(parts, target)
            targets = class_targets(parts, target, self.class_names, outputs, classes)
        features_of_rows = np.concatenate([_encode(parts, e) for e in encoders], axis=1)
        super().__init__(torch.from_numpy(features_of_rows), targets)


def _check_choices(**chosen: str) -> None:
    for key, value in chosen.items():
        if value not in CHOICES[key]:
            raise Refused(f"{key}: expected one of {', '.join(CHOICES[key])}, got {value!r}")


def _read(
    parts: Parts, names: Sequence[str], categorical: Sequence[str], target: str, as_class: bool
) -> None:
    """Read the columns, each as what it is in the training file."""
    for name in names:
        parts.read(name, name in categorical or parts.training.file.is_text(name))
    parts.read(target, as_class)


def _see_to_missing(parts: Parts, names: Sequence[str], target: str, missing: str) -> None:
    if missing == "drop":
        parts.drop_incomplete([*names, target])
        return
    parts.refuse_missing([target], "or set missing=drop to leave these rows out")
    if missing == "refuse":
        parts.refuse_missing(
            names,
            "set missing=mean to take the mean of training, missing=drop to leave these rows out, "
            "or exclude the column",
        )


def _encoder(parts: Parts, name: str, one_hot: bool, features: Sequence[str] | None) -> Encoder:
    """Learn from the training rows how a column is encoded. Raises ``Refused``."""
    training = parts.training
    if training.columns[name].dtype != object:
        return Standardised.of(name, training.numbers(name))
    categories = Categories.of(name, training.texts(name), one_hot)
    rows = len(training.rows)
    if features is None and categories.tells_rows_apart(rows):
        raise Refused(
            f"{training.file.path}: column {name!r} has {len(categories.known)} different texts "
            f"in {rows} rows of training, so it tells rows apart rather than kinds of them; leave "
            f"it out (exclude: [{name}]), or name it under features if it is meant"
        )
    return categories


def _encode(parts: Parts, encoder: Encoder) -> npt.NDArray[np.float32]:
    mine = parts.mine
    if isinstance(encoder, Standardised):
        return encoder.encode(mine.numbers(encoder.name))
    texts = mine.texts(encoder.name)
    if unknown := encoder.unknown(texts):
        logger.warning(
            "data.%s: column %r has texts that no row of training has, and that count as none of "
            "the known: %s",
            *(mine.split, encoder.name, ", ".join(unknown[:SHOWN])),
        )
    return encoder.encode(texts)


def _check_inputs(
    parts: Parts, feature_names: Sequence[str], target: str, inputs: int | None
) -> None:
    path, count = parts.mine.file.path, len(feature_names)
    if not count:
        raise Refused(f"features: {path} has no column left besides the target {target!r}")
    if inputs is not None and inputs != count:
        shown = ", ".join(feature_names[:SHOWN]) + (", …" if count > SHOWN else "")
        raise Refused(
            f"{path}: there are {count} features ({shown}), but model.inputs={inputs}; "
            f"set model.inputs={count}"
        )
