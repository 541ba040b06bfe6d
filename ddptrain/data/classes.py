"""What every labelled data set has to keep to: two classes at least, and those of training only."""

from __future__ import annotations

from collections.abc import Sequence

from ddptrain.errors import Refused

SHOWN = 8


def check_classes(where: str, split: str, present: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a split that has one class only. Raises ``Refused``.

    ``present`` are the classes of ``split``, ``known`` those of the training split.
    """
    if len(known) < 2:
        raise Refused(
            f"{where}: the training split has one class only, {known[0]!r}; there is nothing to "
            "tell apart"
        )
    if len(set(present)) < 2:
        raise Refused(
            f"{where}: split {split} has one class only, {present[0]!r}, so its metrics would say "
            f"nothing; choose other fractions, or set data.{split}=null"
        )


def not_in_training(where: str, name: str) -> Refused:
    """What to say of a class that the training split lacks; ``where`` is one sample of it."""
    return Refused(
        f"{where} is of class {name!r}, of which the training split has none: choose other "
        "fractions, move a sample of it to training, or take it out"
    )


def check_outputs(
    where: str, names: Sequence[str], classes: int | None, outputs: int | None
) -> None:
    """Refuse a task or a model that is made for another number of classes. Raises ``Refused``.

    ``classes`` is what the task expects, ``outputs`` what the model has; None is not checked. One
    output does for two classes.
    """
    count = len(names)
    shown = ", ".join(names[:SHOWN]) + (", …" if count > SHOWN else "")
    if classes is not None and classes != count:
        raise Refused(
            f"{where}: there are {count} classes ({shown}), but task.classes={classes}; "
            f"set task.classes={count}"
        )
    if outputs is not None and outputs != count and not (outputs == 1 and count == 2):
        raise Refused(
            f"{where}: there are {count} classes ({shown}), but the model has "
            f"{outputs} output{'s' if outputs != 1 else ''}; give it {count}"
        )
