"""Texts through a model: token sequences, batches of one length, and their rows put together.

# NOTE [No padding in a forward]
Batches hold sequences of one length, so that no forward sees padding. Each row is then what the
model computes for that text alone, whatever the architecture does with masks and positions, and a
negative position counts from the last token of the text. Only what was captured is filled up.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from actctx._activations import Activations
from actctx._axes import Axes
from actctx._capture import capture
from actctx._errors import JoinError, OptionError
from actctx._hooks import Hook
from actctx._names import find_places
from actctx._select import Index, Owned


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines."""
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Texts as a model reads them.

    Attributes:
        tokens: The token ids of each text.
        limit: The tokens that the model can read at once.
        cut: For each text, how many tokens were cut off its end to fit.

    """

    tokens: list[Int[Tensor, " pos"]]
    limit: int
    cut: list[int]


def tokenize(model: Any, texts: Sequence[str]) -> Sequences:
    """Turn texts into tokens, as the model does with a string: `model.to_tokens`.

    Raises:
        OptionError: A text has no tokens.

    """
    tokens, cut = [], []
    for text in texts:
        whole = model.to_tokens(text, truncate=False)[0]
        kept = whole if len(whole) <= model.cfg.n_ctx else model.to_tokens(text)[0]
        if not len(kept):
            raise OptionError(f"the text {text!r} has no tokens; leave it out")
        tokens.append(kept)
        cut.append(len(whole) - len(kept))
    return Sequences(tokens, model.cfg.n_ctx, cut)


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one length, and the rows of the result that are theirs."""

    tokens: Int[Tensor, "batch pos"]
    rows: list[int]


def in_batches(sequences: Sequence[Int[Tensor, " pos"]], size: int) -> list[Batch]:
    """Put sequences of one length together, `size` of them at most; the longest come first."""
    by_length: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(row)
    return [
        Batch(torch.stack([sequences[row] for row in rows[start : start + size]]), rows[start : start + size])
        for _, rows in sorted(by_length.items(), reverse=True)
        for start in range(0, len(rows), size)
    ]


@dataclass(eq=False)
class Result:
    """What is left of the batches.

    Attributes:
        activations: What was captured: a row for each sequence, in their order.
        cache_bytes: The bytes that `run_with_cache` would have held for the same batches.
        missing: The names that a pattern matched and that never fired.
        filled: Whether shorter sequences were filled up with zeros, so that rows join.

    """

    activations: Activations
    cache_bytes: int = 0
    missing: tuple[str, ...] = ()
    filled: bool = False


@dataclass(eq=False)
class _Left:
    """What one site left, batch by batch."""

    axes: Axes
    parts: list[tuple[Shaped[Tensor, "..."], list[int]]] = field(default_factory=list)


def run(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    slice: dict[str, Index],  # noqa: A002  as in `capture`
    dtype: torch.dtype | None,
    watch: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
) -> Result:
    """Run batches through a model, each forward stopped early, and join what they leave.

    Args:
        model: A `TransformerBridge`.
        names: What to capture; see `capture`.
        batches: What `in_batches` made of the sequences.
        slice: What to select; see `capture`.
        dtype: The dtype of captured floating-point activations.
        watch: Passes the batches on as they are run, and shows how far they are.

    Raises:
        JoinError: There are several batches, and a site does not leave a row for each sequence.
        ActctxError: As `capture`.

    """
    capturing = capture(model, list(names), slice=slice, dtype=dtype, device="cpu", stop=True)
    result = Result(Activations(source=type(model).__name__))
    left: dict[str, _Left] = {}
    counted: dict[torch.Size, int] = {}
    for batch in watch(batches):
        with capturing as acts:
            model(batch.tokens)
        for key in acts:
            left.setdefault(key, _Left(acts.axes(key))).parts.append((acts[key], batch.rows))
        result.missing = acts.missing
        shape = batch.tokens.shape
        if shape not in counted:
            counted[shape] = count_cache_bytes(model, partial(model, batch.tokens))
        result.cache_bytes += counted[shape]
    _join_all(result, left, sum(len(batch.rows) for batch in batches))
    return result
