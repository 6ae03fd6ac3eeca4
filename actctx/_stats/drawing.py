"""Small pictures of statistics in HTML, for notebooks, without colours of their own."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

_WIDTH, _HEIGHT = 480, 96
_MOST = 240  # points of a line, so that a notebook stays small


def pictured(title: str, picture: str) -> str:
    """Put a title above a picture."""
    return f'<div style="font-size:0.85em"><div>{escape(title)}</div>{picture}</div>'


def band(middle: Sequence[float], spread: Sequence[float]) -> str:
    """Draw a line with a band around it."""
    low = [each - width for each, width in zip(middle, spread, strict=True)]
    high = [each + width for each, width in zip(middle, spread, strict=True)]
    least, most = min(low), max(high)
    scale = most - least or 1.0

    def points(values: Sequence[float]) -> list[str]:
        step = _WIDTH / max(1, len(values) - 1)
        return [
            f"{place * step:.1f},{_HEIGHT * (most - value) / scale:.1f}"
            for place, value in enumerate(values)
        ]

    around = " ".join([*points(high), *reversed(points(low))])
    return _svg(
        f'<polygon points="{around}" fill="currentColor" opacity="0.25"/>'
        f'<polyline points="{" ".join(points(middle))}" fill="none" stroke="currentColor"/>',
        f"{most:.4g}",
        f"{least:.4g}",
    )


def bars(heights: Sequence[float], *, first: float, last: float) -> str:
    """Draw bars side by side, from the first to the last edge."""
    most = max(heights, default=0) or 1
    width = _WIDTH / max(1, len(heights))
    drawn = "".join(
        f'<rect x="{place * width:.1f}" y="{_HEIGHT * (1 - height / most):.1f}" '
        f'width="{width:.1f}" height="{_HEIGHT * height / most:.1f}" fill="currentColor"/>'
        for place, height in enumerate(heights)
        if height
    )
    below = f"<div>{first:.4g} to {last:.4g}</div>"
    return _svg(drawn, f"{most:,.0f}", "") + below


def thinned(count: int) -> list[slice]:
    """Divide places of a line into as many parts as are drawn."""
    parts = min(count, _MOST)
    edges = [count * each // parts for each in range(parts + 1)] if parts else []
    return [slice(*each) for each in pairwise(edges)]


def _svg(drawn: str, top: str, bottom: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH + 80} {_HEIGHT}" width="{_WIDTH + 80}" height="{_HEIGHT}" '
        f'preserveAspectRatio="none" role="img">{drawn}'
        f'<text x="{_WIDTH + 6}" y="12" font-size="11" fill="currentColor">{top}</text>'
        f'<text x="{_WIDTH + 6}" y="{_HEIGHT - 4}" font-size="11" fill="currentColor">{bottom}'
        "</text></svg>"
    )
