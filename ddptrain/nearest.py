"""What a misspelt name was probably meant to be, for the end of a message."""

from __future__ import annotations

import difflib


def suggest(name: str, candidates: list[str], prefix: str = "") -> str:
    """Return "; did you mean …?" for the nearest candidate, or what there is to choose from."""
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; there is {', '.join(sorted(candidates))}" if candidates else ""
