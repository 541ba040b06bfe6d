"""Which checkpoints to keep: a pure function of what is on disk, so there is no list to lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint, and its score by the metric that ranks checkpoints, if it has one."""

    step: int
    score: float | None = None


@dataclass(frozen=True)
class Retention:
    """Keeps the newest ``keep_last``, the ``keep_best`` with the best score, and those for replays.

    That is, of each of the last ``keep_faults`` of the steps that are known as ``faults``, the
    newest that is not behind it: from there such a step can be taken again.
    """

    keep_last: int
    keep_best: int = 0
    larger_is_better: bool = True
    keep_faults: int = 0
    faults: Callable[[], Iterable[int]] = tuple

    def best(self, entries: Iterable[Entry]) -> list[Entry]:
        """The best entries, best first; of equals the earlier, which a resume cannot displace."""
        sign = -1 if self.larger_is_better else 1
        scored = [(sign * e.score, e.step, e) for e in entries if e.score is not None]
        # NaN compares as nothing: it would make the order depend on the order of arrival.
        ranked = sorted(item for item in scored if item[0] == item[0])
        return [entry for _, _, entry in ranked[: self.keep_best]]

    def keep(self, entries: Iterable[Entry]) -> set[int]:
        """The steps to keep of those that there are."""
        entries = list(entries)
        steps = sorted(e.step for e in entries)
        faults = sorted(self.faults())[-self.keep_faults :] if self.keep_faults else []
        before = (s for fault in faults for s in [s for s in steps if s <= fault][-1:])
        return {*steps[-self.keep_last :], *(e.step for e in self.best(entries)), *before}
