"""All kinds of faults that come at random moments of one run, by name."""

from __future__ import annotations

from collections.abc import Sequence

from chaos.damage import DAMAGE
from chaos.faults import KILLS, LOADING, STOPS
from chaos.hangs import ALL as HANGS
from chaos.operator import Fault

KINDS: list[Fault] = [*KILLS, *STOPS, *DAMAGE, *LOADING, *HANGS]


def named(*parts: str) -> list[Fault]:
    """The kinds whose name contains one of ``parts``; all without any. Raises ``ValueError``."""
    found = [k for k in KINDS if not parts or any(part in k.name for part in parts)]
    if not found:
        names = "; ".join(kind.name for kind in KINDS)
        raise ValueError(f"no kind of fault is named like {', '.join(parts)}; there are: {names}")
    return found


def needs_workers(kinds: Sequence[Fault]) -> bool:
    return any(kind in LOADING for kind in kinds)
