"""Where the values of a firing come from: sequences, positions and token ids of its forward.

# NOTE [What is known without a mask]
A row is from the sequence and the position at which it lies in the activation, if the activation
has as many of them as the forward was given. One with another number of positions counts other
things, such as frames or patches. Of these no position is told, and no token ids.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from actctx._capture.axis_layout import Numbers, flat_inputs, holds_tokens
from actctx._capture.forward import Frame
from actctx._capture.masks import Padding
from actctx._capture.watched import WatchedSite
from actctx._model.axes import position_dims
from actctx._model.sides import Side
from actctx._results.column import Origin
from actctx._select.own import TokenRows
from actctx._select.padding import real_of
from actctx._select.slices import Selector, Step
from actctx._stats.statistic import ROW_AXES

_OF_DECODER = ("decoder", "tgt", "trg")


class _Places(NamedTuple):
    """The sequences and positions of rows; None where they are not known."""

    sequence: Int64[Tensor, "..."] | None = None
    position: Int64[Tensor, "..."] | None = None


class _Lies(NamedTuple):
    """Which axes of an activation are those of the sequences and positions, and their sizes.

    An axis is None where there is none, or another number of them than the forward was given.
    """

    batch: int | None
    pos: int | None
    sequences: int
    positions: int


def origin_of(
    padding: Padding,
    site: WatchedSite,
    shape: torch.Size,
    frame: Frame | None,
    *,
    rows: TokenRows | None,
    numbers: Numbers,
) -> Origin:
    """Find where the values of a firing come from.

    Args:
        padding: What is known of the forwards' padding.
        site: The site that fired.
        shape: The shape of its activation, before anything was selected.
        frame: The forward; None where a part of the model was called by itself.
        rows: With a mask, the rows that were kept.
        numbers: The numbers of sequences and positions that the forward was given.

    """
    whole = site.known_axes or ("_",) * len(shape)
    axes = site.selected(whole, (None,) * len(whole))[0]
    if len(whole) != len(shape):
        return Origin(axes)
    side = None if frame is None else padding.side(site, frame)
    before, line = padding.continued(side, frame)
    lies = _lies(site, shape, numbers)
    tokens = None if frame is None else _tokens(padding.inputs(frame), side, lies)
    if rows is None:
        places = _without_mask(site, len(shape), lies, before, frame)
        real = None if frame is None else _real(padding, side, frame, lies)
    else:
        before, places = rows.before, _Places(*(rows.where + torch.tensor([0, rows.before])).T)
        real = padding.real(side, (lies.sequences, lies.positions), frame)
    count = sum(axis in ROW_AXES for axis in axes)
    if places.sequence is not None and places.sequence.dim() != count:
        places = _Places()  # map= has replaced the last of them
    sequences = lies.sequences if rows is None else rows.sequences
    return Origin(axes, *places, sequences, line, tokens, real, before or 0)


def _lies(site: WatchedSite, shape: torch.Size, numbers: Numbers) -> _Lies:
    axes = site.known_axes or ()
    batch = axes.index("batch") if "batch" in axes else None
    pos = next(iter(position_dims(axes)), None)
    if batch is not None and numbers.batch not in {None, shape[batch]}:
        batch = None
    if pos is not None and numbers.positions and shape[pos] not in numbers.positions:
        pos = None
    sequences = (numbers.batch or 0) if batch is None else shape[batch]
    return _Lies(batch, pos, sequences, 0 if pos is None else shape[pos])


def _without_mask(
    site: WatchedSite, rank: int, lies: _Lies, before: int | None, frame: Frame | None
) -> _Places:
    """Find the places of the rows that are left of an activation, once for sites that are alike."""
    dims = sorted(dim for dim in (lies.batch, lies.pos) if dim is not None)
    steps = tuple(
        Step(dims.index(step.dim % rank), step.pick, "")
        for step in site.selector.steps
        if step.dim % rank in dims
    )
    known = [] if frame is None else frame.masks.setdefault("places", [])
    for like, found in known:
        if like == (steps, lies, before):
            return found  # type: ignore[no-any-return]
    sizes = [lies.sequences if dim == lies.batch else lies.positions for dim in dims]
    numbers = torch.arange(math.prod(sizes), device="cpu").reshape(sizes)
    left = Selector(site.key, steps, None).select(numbers)
    each = {
        dim: left // math.prod(sizes[place + 1 :]) % sizes[place] for place, dim in enumerate(dims)
    }
    sequence = None if lies.batch is None else each[lies.batch]
    position = None if lies.pos is None or before is None else each[lies.pos] + before
    places = _Places(sequence, position)
    known.append(((steps, lies, before), places))
    return places


def _tokens(
    given: Iterable[Mapping[str, Any]], side: Side | None, lies: _Lies
) -> Int[Tensor, "batch pos"] | None:
    """Find the token ids of a forward, of the side that a site runs on."""
    if side in {"tower", "shared"}:
        return None
    for inputs in given:
        is_decoder = inputs.get("encoder_hidden_states") is not None
        of_decoder = side == "decoder" and not is_decoder
        found: dict[str, Tensor] = {
            name: each
            for name, each in flat_inputs(inputs)
            if holds_tokens(name, each)
            and not each.is_floating_point()
            and tuple(each.shape) == (lies.sequences, lies.positions)
            and any(word in name for word in _OF_DECODER) == of_decoder
        }
        named = [each for name, each in found.items() if name.endswith("input_ids")]
        chosen = named or [*found.values()]
        if len(chosen) == 1:
            return chosen[0]
    return None


def _real(
    padding: Padding, side: Side | None, frame: Frame, lies: _Lies
) -> Bool[Tensor, "batch pos"] | None:
    """Find which tokens are no padding, of a capture without a mask, if the forward says."""
    mask = None if side in {"tower", "shared"} else padding.mask(side, frame)
    if not isinstance(mask, Tensor) or mask.is_meta or mask.dim() != 2:  # noqa: PLR2004
        return None
    before, _ = padding.continued(side, frame)
    real, whole = real_of(mask), (before or 0) + lies.positions
    if len(real) != lies.sequences or real.shape[1] not in {lies.positions, whole}:
        return None
    return real[:, real.shape[1] - lies.positions :]
