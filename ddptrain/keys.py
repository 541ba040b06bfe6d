"""Every random number of a run comes from a key: a pure function of the seed and of what it is for.

There is no generator state to save, because a generator is re-keyed before each use.
"""

from __future__ import annotations

from hashlib import blake2b


def derive(seed: int, purpose: str, *index: int) -> int:
    """Return a 64-bit key for ``purpose`` at ``index``, independent of every other key.

    Uses BLAKE2b as a pseudo-random function (RFC 7693), so keys of neighbouring steps share
    no structure, which counters added to a seed would.
    """
    message = f"{seed}/{purpose}/{'/'.join(map(str, index))}"
    return int.from_bytes(blake2b(message.encode(), digest_size=8).digest(), "little")
