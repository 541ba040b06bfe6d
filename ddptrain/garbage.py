"""Cyclic garbage is hardly looked for while a start imports: of what it imports all stays.

That is a million objects or more, all of which Python would look at again and again.
"""

import gc

STEADY = gc.get_threshold()
STARTING = (100_000, 50, 100)


def defer() -> None:
    """Look for garbage seldom; for a process that is a command, before it imports much."""
    gc.set_threshold(*STARTING)


def resume() -> None:
    """Look for it as often as ever, if that was deferred; when data begins to be loaded."""
    if gc.get_threshold() == STARTING:
        gc.set_threshold(*STEADY)
