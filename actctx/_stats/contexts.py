"""The tokens around a row, and how they are shown."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from actctx._errors import OptionError
from actctx._stats.coloured import ColouredTokens
from actctx._stats.rows import Origins
from actctx._stats.statistic import Observation

Decode = Any
"""A tokenizer, or a function that makes text of a token id."""


def contexts_of(observation: Observation, origins: Origins, around: int) -> Int[Tensor, "... near"]:
    """Find the token ids around some rows; -1 where there are none, or they are padding."""
    device = origins.sequence.device
    beside = torch.arange(-around, around + 1, device=device)
    if observation.tokens is None:
        return torch.full((*origins.sequence.shape, len(beside)), -1, device=device).int()
    tokens = observation.tokens.to(device)
    count, length = tokens.shape
    row = (origins.sequence - observation.first_sequence).unsqueeze(-1)
    place = (origins.position - observation.first_position).unsqueeze(-1) + beside
    is_there = (row >= 0) & (row < count) & (place >= 0) & (place < length)
    is_there &= (origins.sequence >= 0).unsqueeze(-1) & (origins.position >= 0).unsqueeze(-1)
    row, place = row.clamp(0, count - 1).expand(place.shape), place.clamp(0, length - 1)
    if observation.real is not None:
        is_there &= observation.real.to(device)[row, place]
    return torch.where(is_there, tokens[row, place], -1).int()


def read_decode(decode: Decode | None) -> Callable[[Sequence[int]], list[str]]:
    """Read what makes text of token ids, one for each.

    Raises:
        OptionError: It is neither a tokenizer nor a function.

    """
    if decode is None:
        return lambda tokens: [f" {token}" for token in tokens]
    if hasattr(decode, "decode"):
        return lambda tokens: _decoded(decode, tokens)
    if callable(decode):
        return lambda tokens: [str(decode(token)) for token in tokens]
    raise OptionError(
        f"decode={decode!r} makes no text of token ids; give a tokenizer, or a function of an id"
    )


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Decode tokens together, since many tokenizers put spaces only between them."""
    texts, before = [], ""
    for place, token in enumerate(tokens):
        text = str(tokenizer.decode([*tokens[: place + 1]]))
        is_longer = text.startswith(before)
        texts.append(text[len(before) :] if is_longer else str(tokenizer.decode([token])))
        before = text
    return texts


class Contexts:
    """The contexts of some features, which a notebook shows; made by `TopK.show`."""

    def __init__(
        self,
        features: Sequence[int],
        values: Sequence[Sequence[float]],
        tokens: Sequence[Sequence[Sequence[int]]],
        decode: Callable[[Sequence[int]], list[str]],
        *,
        middle: int,
    ) -> None:
        self.features = tuple(features)
        self._lines = [
            [
                (value, _coloured(around, value, decode, middle))
                for value, around in zip(*each, strict=True)
            ]
            for each in zip(values, tokens, strict=True)
        ]

    def __repr__(self) -> str:
        lines = []
        for feature, found in zip(self.features, self._lines, strict=True):
            lines.append(f"feature {feature}")
            lines += [f"  {value:9.4g}  {''.join(each.tokens)!r}" for value, each in found]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        style = 'style="text-align:left;padding:0 0.6em"'
        parts = []
        for feature, found in zip(self.features, self._lines, strict=True):
            rows = "".join(
                f"<tr><td {style}>{value:.4g}</td><td {style}>{each._repr_html_()}</td></tr>"
                for value, each in found
            )
            parts.append(f"<div>{escape(f'feature {feature}')}</div><table>{rows}</table>")
        return f'<div style="font-size:0.85em">{"".join(parts)}</div>'


def _coloured(
    around: Sequence[int],
    value: float,
    decode: Callable[[Sequence[int]], list[str]],
    middle: int,
) -> ColouredTokens:
    there = [(place, token) for place, token in enumerate(around) if token >= 0]
    texts = decode([token for _, token in there])
    return ColouredTokens(texts, [value if place == middle else 0.0 for place, _ in there])
