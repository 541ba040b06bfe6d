"""The metrics that a config chooses for a task: by a short name, or any others of torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from ddptrain.errors import Refused

if TYPE_CHECKING:
    from torchmetrics import Metric

Chosen: TypeAlias = "dict[str, Metric | None]"
"""By name, a metric to make others like; None for those that a task knows."""


def choose(entries: Iterable[str | Mapping[str, Metric]], known: Iterable[str]) -> Chosen:
    """Read a list of ``known`` names, and of mappings of other names to metrics.

    Raises ``Refused`` if a name is not known, is there twice, or stands for no metric.
    """
    chosen: Chosen = {}
    names = list(known)
    for entry in [entries] if isinstance(entries, str) else entries or ():
        if isinstance(entry, str):
            if entry not in names:
                raise Refused(f"metrics: there is no {entry!r}; there is {', '.join(names)}")
            found: Chosen = {entry: None}
        elif isinstance(entry, Mapping):
            found = {str(name): entry[name] for name in entry}
            _check_metrics(found)
        else:
            raise Refused(f"metrics: expected names, or name: {{_target_: …}}, got {entry!r}")
        if twice := found.keys() & (chosen.keys() | {"loss"}):
            raise Refused(f"metrics: {min(twice)} is there twice; give one of them another name")
        chosen |= found
    return chosen


def _check_metrics(found: Chosen) -> None:
    from torchmetrics import Metric

    for name, metric in found.items():
        if not isinstance(metric, Metric):
            raise Refused(
                f"metrics: {name} is {type(metric).__name__}, no torchmetrics.Metric; name one by "
                "its _target_"
            )


def make(chosen: Chosen, known: Callable[[str], Metric]) -> dict[str, Metric]:
    """Fresh metrics for one evaluation; ``known`` makes one by its short name."""
    return {
        name: known(name) if metric is None else metric.clone() for name, metric in chosen.items()
    }
