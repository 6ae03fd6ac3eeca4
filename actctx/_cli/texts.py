"""Run texts through a model: token sequences, batches of equal length, and joined rows.

# NOTE [No padding in a forward]
Batches contain sequences of equal length, so that no forward sees padding. Each row is then what
the model computes for that text alone, whatever the architecture does with masks and positions, and
a negative position counts from the last token of the text. Only captured tensors are padded.

# NOTE [Counting caches]
The memory of `run_with_cache` is counted with hooks on a whole forward, which takes longer than one
that stops early. Texts of many lengths have many shapes, so only a few are counted: the bytes are
linear in the batch and quadratic in the positions (attention patterns), so six small shapes
determine the rest. This is only used if it predicts the largest shape to the byte.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from actctx._capture.cache_size import count_cache_bytes
from actctx._capture.capture import capture
from actctx._errors import JoinError, OptionError
from actctx._model.axes import Axes
from actctx._results.activations import Activations
from actctx._results.annotations import Sizes
from actctx._results.label import Label, Named
from actctx._select.own import Owned
from actctx._select.slices import Index


@dataclass(frozen=True, eq=False)
class Sequences:
    """Tokenized texts.

    Attributes:
        tokens: The token ids of each text.
        limit: The most tokens that the model can read at once.
        cut: For each text, how many tokens were cut off its end to fit.

    """

    tokens: list[Int[Tensor, " _"]]
    limit: int
    cut: list[int]


def tokenize(model: Any, texts: Sequence[str]) -> Sequences:
    """Convert texts to tokens as `model.to_tokens` does.

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
class TextBatch:
    """Sequences of equal length, and their rows in the result."""

    tokens: Int[Tensor, "batch pos"]
    rows: list[int]


def in_batches(sequences: Sequence[Int[Tensor, " _"]], size: int) -> list[TextBatch]:
    """Batch sequences of equal length, at most `size` of them; the longest come first."""
    by_length: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(row)
    return [
        TextBatch(
            torch.stack([sequences[row] for row in rows[start : start + size]]),
            rows[start : start + size],
        )
        for _, rows in sorted(by_length.items(), reverse=True)
        for start in range(0, len(rows), size)
    ]


@dataclass(eq=False)
class Result:
    """The result of all batches.

    Attributes:
        activations: The captured activations: a row for each sequence, in order.
        missing: The names that a pattern matched and that never fired.
        filled: Whether shorter sequences were filled with zeros so that rows join.

    """

    activations: Activations
    missing: tuple[str, ...] = ()
    filled: bool = False


@dataclass(eq=False)
class _Left:
    """The values of one site, batch by batch."""

    axes: Axes
    names: tuple[str, ...]
    sizes: Sizes
    parts: list[tuple[Shaped[Tensor, "..."], list[int]]] = field(default_factory=list)


def run(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[TextBatch],
    *,
    slice: dict[str, Index],  # noqa: A002  as in `capture`
    dtype: torch.dtype | None,
    watch: Callable[[Sequence[TextBatch]], Iterable[TextBatch]] = iter,
) -> Result:
    """Run batches through a model, stopping each forward early, and join the results.

    Args:
        model: A `TransformerBridge`.
        names: What to capture; see `capture`.
        batches: The result of `in_batches`.
        slice: What to select; see `capture`.
        dtype: The dtype of captured floating-point activations.
        watch: Passes the batches on as they run, and shows progress.

    Raises:
        JoinError: There are several batches, and a site does not have a row for each sequence.
        ActctxError: As `capture`.

    """
    capturing = capture(model, list(names), slice=slice, dtype=dtype, device="cpu", stop=True)
    result = Result(Activations(source=type(model).__name__))
    left: dict[str, _Left] = {}
    for batch in watch(batches):
        with capturing as acts:
            model(batch.tokens)
        for key in acts:
            if key not in left:
                column = acts.single(key)
                left[key] = _Left(acts.axes(key), column.label.names, column.fixed_sizes())
            left[key].parts.append((acts[key], batch.rows))
        result.missing = acts.missing
    _join_all(result, left, sum(len(batch.rows) for batch in batches))
    return result


def _join_all(result: Result, left: dict[str, _Left], rows: int) -> None:
    """Move the values into one buffer, site by site, so that only one site is in memory twice."""
    joined = {}
    for key in list(left):
        site = left.pop(key)
        result.activations.expect(Label(key, site.names, Named(site.axes, site.sizes)))
        joined[key] = [Owned(_joined(key, site, rows))]
        result.filled |= len({_without_batch(site, part) for part, _ in site.parts}) > 1
    result.activations.write(joined)


def _without_batch(site: _Left, part: Shaped[Tensor, "..."]) -> tuple[int, ...]:
    return tuple(size for size, axis in zip(part.shape, site.axes, strict=True) if axis != "batch")


def _joined(key: str, site: _Left, rows: int) -> Shaped[Tensor, "..."]:
    """Put rows in their places, filled with zeros at the end of the axes that differ."""
    if len(site.parts) == 1 and len(site.parts[0][1]) == rows:
        return site.parts[0][0]
    dim = site.axes.index("batch") if "batch" in site.axes else None
    complete = dim is not None and all(part.shape[dim] == len(own) for part, own in site.parts)
    if dim is None or not complete or sum(len(own) for _, own in site.parts) < rows:
        raise JoinError(
            f"{key!r} does not leave a row for each sequence (its axes are "
            f"{' '.join(site.axes)!r}), so several batches do not join; give one text, or texts "
            "of one length and a batch size that holds them all"
        )
    shape = [max(sizes) for sizes in zip(*(part.shape for part, _ in site.parts), strict=True)]
    shape[dim] = rows
    whole = site.parts[0][0].new_zeros(shape)
    for part, own in site.parts:
        window = [slice(size) for size in part.shape]
        window[dim] = slice(None)
        whole[tuple(window)].index_copy_(dim, torch.tensor(own), part)
    return whole


_FEW = 7
"""The most shapes that are counted: six small ones, and the largest."""


def count_caches(model: nn.Module, batches: Sequence[TextBatch]) -> int:
    """Count the memory of `run_with_cache` for all batches; see the note above.

    Returns:
        Bytes.

    """
    row = max((batch.tokens[0] for batch in batches), key=len)

    @functools.cache
    def count(batch: int, pos: int) -> int:
        tokens = row[:pos].repeat(batch, 1)
        return count_cache_bytes(model, functools.partial(model, tokens))

    shapes = Counter((len(batch.tokens), batch.tokens.shape[1]) for batch in batches)
    largest = max(shapes, key=math.prod)
    if len(shapes) > _FEW and _extrapolate(count, *largest) == count(*largest):
        return sum(times * _extrapolate(count, *shape) for shape, times in shapes.items())
    return sum(times * count(*shape) for shape, times in shapes.items())


def _extrapolate(count: Callable[[int, int], int], batch: int, pos: int) -> int:
    """Continue `count` from small shapes, by Newton's forward differences."""

    def along_pos(batch: int) -> int:
        two, three, four = (count(batch, small) for small in (2, 3, 4))
        steps = pos - 2
        return two + steps * (three - two) + steps * (steps - 1) // 2 * (four - 2 * three + two)

    one, two = along_pos(1), along_pos(2)
    return one + (batch - 1) * (two - one)
