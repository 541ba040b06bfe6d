"""When cyclic garbage is looked for: hardly at all during a start, and never in what that leaves.

A start imports a million objects or more, of which none is garbage, and Python would look at all of
them again and again: a sixth of the time that imports take.
"""

import gc

STEADY = gc.get_threshold()
STARTING = (100_000, 50, 100)


def defer() -> None:
    """Look for garbage seldom; for a process that is a command, before it imports much."""
    gc.set_threshold(*STARTING)


def resume() -> None:
    """Look for it as often as ever, if that was deferred, but not in what there is by now."""
    if gc.get_threshold() == STARTING:
        gc.freeze()
        gc.set_threshold(*STEADY)
