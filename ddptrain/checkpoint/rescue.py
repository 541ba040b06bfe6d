"""Saves a state at once, in memory, on behalf of a rank that is about to leave."""

from __future__ import annotations

import contextlib
from typing import Any

from ddptrain.checkpoint.memory import RESERVED, SLOTS, Memory, Slot
from ddptrain.checkpoint.store import Store
from ddptrain.errors import CheckpointError
from ddptrain.state import State


def save_somewhere(
    memory: Memory, slot: Slot | None, state: State, manifest: dict[str, Any]
) -> tuple[Store, int]:
    """Where ``state`` or a later one is whole, by whatever process; saved if it is nowhere yet.

    In ``slot``, or wherever there is room. Raises ``OSError`` if nowhere. Older snapshots have to
    make room for it, but for the newest, which is whole for sure. A disk is looked at last, for it
    may be what hangs.
    """
    memory.reserve = RESERVED
    for tier, store in enumerate(memory.stores):
        if (step := _newest_whole(store, state.step)) is not None:
            return store, step
        if tier >= memory.tier and _save(memory, tier, slot, state, manifest) is None:
            return store, state.step
    memory.reserve = 0.0
    if (problem := _save(memory, memory.tier, None, state, manifest)) is not None:
        raise problem
    return memory.store, state.step


def _save(
    memory: Memory, tier: int, slot: Slot | None, state: State, manifest: dict[str, Any]
) -> OSError | None:
    """Save ``state`` in one of the roots; return why not, if it is full or cannot be read."""
    problem: OSError | None = None
    own = [slot] if slot is not None and slot.tier == tier else []
    for each in (*own, memory.slot(tier, SLOTS)):
        try:
            memory.take(each, state)
            memory.seal(each, memory.describe(each, manifest))
        except OSError as error:
            problem = error
            memory.drop(each)
            memory.clear(tier)
        else:
            return None
    return problem


def _newest_whole(store: Store, step: int) -> int | None:
    """The newest step from ``step`` on that there is a whole snapshot of."""
    for other in reversed(store.steps()):
        if other < step:
            break
        with contextlib.suppress(CheckpointError):
            store.verify(other)
            return other
    return None
