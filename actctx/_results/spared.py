"""What a buffer spared, compared with caching everything."""

from collections import Counter
from collections.abc import Callable

from actctx._results.table import format_bytes

Estimate = Callable[[int, int], int | None]
"""Tells how many bytes `run_with_cache` would hold after a forward of so many sequences and
positions, or None where that is not known."""


def unknown(_batch: int, _pos: int) -> None:
    """Stand in for an estimate where there is no model any more."""


def spared(estimate: Estimate, tokens: Counter[tuple[int, int]], nbytes: int) -> str:
    """Say what would be cached by the forwards that left so many bytes, to be put behind these."""
    held = [estimate(*forward) for forward in tokens.elements()]
    known = [each for each in held if each]
    # More may be captured than would be cached, since each site has a copy of its own.
    if not known or len(known) < len(held) or sum(known) < nbytes:
        return ""
    return f" of about {format_bytes(sum(known))} that run_with_cache would hold"
