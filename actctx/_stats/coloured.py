"""Tokens in the colours of their values, for a notebook."""

import math
from collections.abc import Sequence
from html import escape

_STRONGEST = 0.5  # so that black or light grey text is readable on it


class ColouredTokens:
    """Tokens coloured by their numbers in a notebook; created by `colour_tokens`."""

    def __init__(self, tokens: Sequence[str], values: Sequence[float]) -> None:
        self.tokens = tuple(tokens)
        self.values = tuple(values)

    def __repr__(self) -> str:
        return " ".join(
            f"{token!r}({value:.2g})" for token, value in zip(self.tokens, self.values, strict=True)
        )

    def _repr_html_(self) -> str:
        finite = [abs(value) for value in self.values if math.isfinite(value)]
        most = max(finite, default=0.0) or 1.0
        spans = (
            f'<span title="{value:.4g}" style="white-space:pre-wrap;background:'
            f'rgba({"230,120,0" if value > 0 else "0,114,200"},{_share(value, most):.2f})">'
            f"{escape(token)}</span>"
            for token, value in zip(self.tokens, self.values, strict=True)
        )
        return f'<div style="line-height:1.8">{"".join(spans)}</div>'


def _share(value: float, most: float) -> float:
    share = abs(value) / most if math.isfinite(value) else float(math.isinf(value))
    return _STRONGEST * share
