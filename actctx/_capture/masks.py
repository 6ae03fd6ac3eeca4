"""Determine which rows of a site are tokens and which are padding, from the masks of forwards.

# NOTE [Aligning a mask with a site]
A forward's mask covers the cached tokens and then the new ones; a site has only the latter. The
cache is asked for its length before the forward; see `generation`. Nothing else is subtracted: a
site that is shorter than the mask for another reason counts other things than the mask does, such
as frames instead of samples. If the model itself converts samples to frames, that is used. If a
forward computed only the logits of the last positions, those are taken. Everything else is refused.

# NOTE [Forwards without a mask]
Hugging Face's `generate()` omits a mask without zeros. The mask is read where `generate()` keeps
it, since some models are not passed a mask that has zeros.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from actctx._capture.axis_layout import side_of_run
from actctx._capture.forward import Frame, running_frame
from actctx._capture.generation import Lines, Start, positions_of
from actctx._capture.given_masks import MASKS, diagonal, left_masks, mask_of_generate
from actctx._capture.hooks import Hook
from actctx._capture.padding_warnings import PaddingWarnings
from actctx._capture.sound_frames import counted_frames, of_frames
from actctx._capture.watched import Options, WatchedSite
from actctx._errors import OptionError, SelectionError
from actctx._model.absolute_positions import (
    counts_padding,
    has_bare_table,
    is_padded_left,
    tables_of,
    widths_of,
)
from actctx._model.axes import position_dims
from actctx._model.known_faults import decoder_fault, mask_fault, right_padding_fault
from actctx._model.rotary import depends_on_positions
from actctx._model.shape_run import is_fake
from actctx._model.sides import Side, Sides, core_of, encoder_of, reads_tokens
from actctx._model.structure import Inputs, listed_inputs
from actctx._select.own import TokenRows
from actctx._select.padding import Chosen, as_mask, find_rows, real_of
from actctx._select.slices import Positions, Selector, Step
from actctx._select.transforms import is_transformed

_POSITIONS = ("position_ids", "decoder_position_ids")
_TARGETS = ("decoder_", "tgt", "trg")
_PADS = ("_pad_to_window_size", "_pad_to_block_size", "_pad_to_mult_of_chunk_length")


class _Given(NamedTuple):
    """The mask of a site: its rows, and the position of the first of them."""

    real: Bool[Tensor, "batch pos"]
    first: int


class Padding:
    """What a capture knows about the padding of the forwards that it watches.

    Args:
        model: The model that is captured from.
        options: The options for all sites.
        sites: The captured sites.

    Attributes:
        is_guessed: Whether a mask had no values, in a plan, and all tokens were taken to be real.

    """

    def __init__(self, model: nn.Module, options: Options, sites: Iterable[WatchedSite]) -> None:
        self._model = model
        self._asked = options.mask
        self._joins_positions = options.join == "pos"
        self._lines = Lines(model)
        self._fault = mask_fault(model)
        self._sides: Sides | None = None
        self._run_sides: dict[str, Side | None] = {}
        self._widths: set[int] = set()
        self._fills = False
        self._previous: Start | None = None
        self._left_alone: list[Bool[Tensor, "batch pos"]] = []
        self.is_guessed = False
        self._warnings = PaddingWarnings(model)
        self._unturned: set[str] = set()
        # On a GPU a forward does not wait: whether a slice selected padding is reported later.
        self._later: Tensor | None = None
        self._tells_slices = self._asked is None and any(map(_selects_positions, sites))
        reduces = any(site.reduce is not None for site in sites)
        asks = not (self._asked is None or isinstance(self._asked, Chosen))
        self._tracks = self._joins_positions or asks or reduces

    def hooks(self) -> Iterator[Hook]:
        """Make the hooks that only record masks."""
        reads = self._asked == "attention" if isinstance(self._asked, str) else self._tells_slices
        inner = core_of(self._model)
        if inner is not self._model:
            # A bridge makes its own tokens and mask for texts, and returns no cache.
            yield Hook(inner, "original_model", _weakly(self._note_given), io="in")
            if reads or self._tracks:
                yield Hook(inner, "original_model", _weakly(self._note_returned), io="out")
        if isinstance(self._asked, str):
            self._widths = widths_of(self._model)
            self._fills = any(map(_fills_up, inner.modules()))
            for name, table in tables_of(self._model):
                yield Hook(table, name, _weakly(self._look_up), io="out")
            encoder = encoder_of(inner)
            if encoder is not None:
                yield Hook(encoder, "encoder", _weakly(self._note_encoder), io="in")
                yield Hook(encoder, "encoder", _weakly(self._forget_encoder), io="out")

    def begin(self, frame: Frame, *, is_first: bool) -> None:
        """Record what a forward continues, before it runs.

        Args:
            frame: The forward.
            is_first: Whether nothing has been captured before it.

        """
        frame.masks[self, "own"] = True
        if not self._tracks:
            return
        start = frame.masks[self, "start"] = self._lines.begin(frame.inputs)
        previous, self._previous = self._previous, start
        if self._asked is not None:
            if start.repeats:
                self._warnings.repeats()
        elif self._joins_positions and previous is not None and not is_first:
            self._warnings.joined(start, previous)

    def end(self, frame: Frame, output: Any) -> None:
        """Record the caches that a forward has returned."""
        if self._tracks:
            start = frame.masks[self, "start"]
            for returned in (output, frame.masks.get((self, "returned"))):
                self._lines.end(start, frame.inputs, returned)

    def finish(self) -> None:
        """Give the warning that had to wait until the forwards had run."""
        if self._later is not None and bool(self._later):
            self._warnings.selected()
        self._later = None

    def rows(self, site: WatchedSite, shape: tuple[int, int], frame: Frame | None) -> TokenRows:
        """Find the rows of real tokens, once for all sites with the same selection.

        Args:
            site: The site, which has rows.
            shape: The number of sequences and of positions of its activation.
            frame: The forward, or None if a part of the model was called directly.

        Raises:
            OptionError: The forward was not given a mask.
            SelectionError: The mask does not fit the site, or has no selected token.

        """
        selector = site.rows
        assert selector is not None  # noqa: S101  the caller has looked
        if isinstance(self._asked, Chosen):
            return self._asked.rows(selector.site, shape)
        if frame is not None:
            self._check_turned(site, frame)
        side = self.side(site, frame)
        found = [] if frame is None else frame.masks.setdefault((self, "rows"), [])
        for steps, known_side, known_shape, rows in found:
            if (known_side, known_shape) == (side, shape) and steps == selector.tokens.steps:
                return rows  # type: ignore[no-any-return]
        given = self._given(site, side, shape, frame)
        if frame is not None:
            frame.masks[self, "real", side, shape] = given.real
        start = Start(-1) if frame is None else frame.masks[self, "start"]
        line = None if frame is None else start.line
        kept = find_rows(selector, given.real, shape)
        rows = TokenRows(kept, shape[0], given.first, line=line)
        found.append((selector.tokens.steps, side, shape, rows))
        return rows

    def check_slice(self, site: WatchedSite, shape: torch.Size, frame: Frame | None) -> None:
        """Warn, once, if positions are selected that are padding by the forward's mask."""
        if not self._tells_slices or frame is None:
            return
        dims = _dims(site, len(shape))
        if dims is None or not _chooses(site.selector, dims[1], len(shape)):
            return
        steps = tuple(
            Step(dims.index(step.dim % len(shape)), step.pick, "")
            for step in site.selector.steps
            if step.dim % len(shape) in dims
        )
        side, size = self.side(site, frame), tuple(shape[dim] for dim in dims)
        checked = frame.masks.setdefault((self, "slices"), [])
        if (side, size, steps) in checked:
            return
        checked.append((side, size, steps))
        mask = self.mask(side, frame) if side in {None, "encoder", "decoder"} else None
        if not isinstance(mask, Tensor) or mask.is_meta or is_fake(mask) or is_transformed(mask):
            return
        real = real_of(mask)
        if side != "decoder" and not reads_tokens(core_of(self._model)):
            real = of_frames(real, size[1])
        if tuple(real.shape) != size:
            return  # after a cache, for example, the new tokens are not padding
        padded = ~Selector(site.key, steps, None).select(real).all()
        if mask.is_cpu:
            if bool(padded):
                self._tells_slices = False
                self._warnings.selected()
        else:
            later = padded if self._later is None else self._later
            self._later = later | padded.to(later.device)  # masks may be on several devices

    def warn_positions(self, site: WatchedSite) -> None:
        """Warn, once, that positions of a site are not the tokens that the forward was given."""
        if self.side(site, None) != "tower" and reads_tokens(core_of(self._model)):
            self._warnings.positions(site)

    # Which mask, and how it lies.

    def side(self, site: WatchedSite, frame: Frame | None) -> Side | None:
        """Return on which tokens a site runs, of a model that has an encoder and a decoder."""
        if self._sides is None:
            self._sides = Sides(self._model)
        side = self._sides.of(site.place, io=site.io, output=site.output)
        if self._sides.two and side != "tower":
            if site.key not in self._run_sides:  # called for every site in every forward
                self._run_sides[site.key] = side_of_run(self._model, site)
            return self._run_sides[site.key] or side
        if side is not None or self._sides.two or frame is None:
            return side
        if not any(name.startswith(_TARGETS) for given in self.inputs(frame) for name in given):
            return None
        if site.key not in self._run_sides:
            self._run_sides[site.key] = side_of_run(self._model, site)
        told = self._run_sides[site.key]
        if told is not None:
            return told
        # A custom model, for which only the names of parts decide.
        parts = site.place.name.split(".")
        named = [side for side in _SIDES if any(part.startswith(side) for part in parts)]
        return named[0] if len(named) == 1 else "shared"

    def inputs(self, frame: Frame) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """List the arguments of a forward, and those of the wrapped model."""
        return frame.inputs, frame.masks.get((self, "given"), {})

    def real(
        self, side: Side | None, shape: tuple[int, int], frame: Frame | None
    ) -> Bool[Tensor, "batch pos"] | None:
        """Return the mask that told the rows of a site with so many sequences and positions."""
        return None if frame is None else frame.masks.get((self, "real", side, shape))

    def continued(self, side: Side | None, frame: Frame | None) -> tuple[int | None, int | None]:
        """Return how many positions came before a forward on one side, and the line that it is of.

        Encoders have no cache.
        """
        if frame is None:
            return 0, None
        start: Start = frame.masks[self, "start"]
        return 0 if side == "encoder" else start.before, start.line

    def mask(self, side: Side | None, frame: Frame) -> Any:
        """Find the mask that a forward was given for a side."""
        given = self.inputs(frame)
        is_decoder = any(inputs.get("encoder_hidden_states") is not None for inputs in given)
        names: tuple[str, ...] = MASKS
        if side == "decoder" and not is_decoder:
            names = ("decoder_attention_mask",)
        elif side == "encoder" and is_decoder:
            names = ("encoder_attention_mask",)
        found = (inputs.get(name) for inputs in given for name in names)
        return next((each for each in found if isinstance(each, Tensor | dict)), None)

    def _given(
        self, site: WatchedSite, side: Side | None, shape: tuple[int, int], frame: Frame | None
    ) -> _Given:
        if isinstance(self._asked, Tensor):
            before = 0
            if frame is not None and side != "encoder":
                before = frame.masks[self, "start"].before or 0
            return _Given(as_mask(self._asked), before)
        if frame is None:
            raise OptionError(
                "mask='attention' uses the attention_mask of a forward of "
                f"{type(self._model).__name__}, but a part of it that holds {site.place.name!r} "
                "was called directly, as generate() calls an encoder; capture from that part, as "
                "in capture(model.encoder, ...), or pass the mask to capture"
            )
        if side == "tower":
            raise SelectionError(
                f"{site.shown} runs on images or sound, not on the tokens of the forward's "
                "attention_mask; capture it without mask=, or pass a mask of its own positions"
            )
        if side == "shared":
            return self._given_of_either(site, shape, frame)
        mask = self.mask(side, frame)
        if side == "decoder":
            self._warnings.give("fault", decoder_fault(core_of(self._model), frame.inputs))
        if mask is None:
            mask = mask_of_generate(
                side, self.continued(side, frame)[0], shape[0], self.inputs(frame)
            )
        if mask is None:
            name = "decoder_attention_mask" if side == "decoder" else "attention_mask"
            raise OptionError(
                f"mask='attention' uses the forward's {name}, but this forward of "
                f"{type(self._model).__name__} was given none; pass it to the model, or pass the "
                "mask to capture"
            )
        return self._aligned(mask, site, side, shape, frame)

    def _given_of_either(self, site: WatchedSite, shape: tuple[int, int], frame: Frame) -> _Given:
        """Find the mask of a site that both sides run, by the number of its positions."""
        fitting: list[_Given] = []
        sides: tuple[Side, ...] = ("encoder", "decoder")
        for side in sides:
            try:
                fitting.append(self._given(site, side, shape, frame))
            except (OptionError, SelectionError):
                continue
        if not fitting or any(not torch.equal(each.real, fitting[0].real) for each in fitting):
            raise SelectionError(
                f"{site.shown} is run by both the encoder and the decoder, and its {shape[1]} "
                "positions do not determine which one; give a decoder_attention_mask and "
                "sequences of another length, or capture from a module of one of them"
            )
        return fitting[0]

    def _aligned(
        self,
        mask: Any,
        site: WatchedSite,
        side: Side | None,
        shape: tuple[int, int],
        frame: Frame,
    ) -> _Given:
        """Align a forward's mask with a site; see the note above."""
        before, ran = self.continued(side, frame)[0], positions_of(frame.inputs)
        if isinstance(mask, dict):  # one for each kind of layer
            tensors = [each for each in mask.values() if isinstance(each, Tensor)]
            tensors.append(torch.ones(shape[0], (before or 0) + (ran or shape[1])))
            full = mask.get("full_attention")
            mask = full if isinstance(full, Tensor) else tensors[0]
        self.is_guessed |= is_fake(mask)
        is_square = mask.dim() == 4  # noqa: PLR2004  batch head query key
        given = as_mask(diagonal(mask, shape[0], before) if is_square else real_of(mask))
        width, pos = given.shape[1], shape[1]
        if not before:
            self._check_counted(given, frame)
        is_whole = side == "encoder" or ran in {None, pos}
        if width == pos and (is_whole or not before):  # TransformerLens 3 takes masks of new tokens
            return _Given(given, before or 0)
        if before is None and is_whole and width > pos:
            before = width - pos
        before = before or 0
        limit = frame.masks[self, "start"].limit or 0
        if is_whole and (width == before + pos or before + pos < width == limit):
            return _Given(given[:, before : before + pos], before)
        end = before + (ran or 0)
        if side != "encoder" and pos == _kept_logits(frame.inputs, ran) and width in {end, limit}:
            return _Given(given[:, end - pos : end], end - pos)
        if pos > width and not before and side != "decoder" and self._pads(site):
            return _Given(nn.functional.pad(given, (0, pos - width)), 0)
        frames = None
        if side != "decoder":
            frames = counted_frames(given, pos, core_of(self._model), site.place.module)
        if frames is None and given.shape[0] == shape[0]:
            holds = f"its cache holds {before} positions" if before else "no cache holds the rest"
            why = f", and {holds}" if width > pos else ""
            raise SelectionError(
                f"{site.shown} has {pos} positions, but the forward's mask has {width}{why}: they "
                "count different things; capture it without mask=, or pass a mask of its positions"
            )
        return _Given(given if frames is None else frames, 0)

    def _pads(self, site: WatchedSite) -> bool:
        """Return whether a part that contains a site pads sequences on the right itself."""
        return any(
            any(inner is site.place.module for inner in module.modules())
            for module in core_of(self._model).modules()
            if _fills_up(module)
        )

    # What is recorded while a forward runs.

    def _frame(self) -> Frame | None:
        frame = running_frame()
        while frame is not None and (self, "own") not in frame.masks:
            frame = frame.parent
        return frame

    def _note_given(self, given: Inputs) -> None:
        frame = self._frame()
        if frame is not None:
            frame.masks[self, "given"] = given.kwargs
        if self._fault is not None and isinstance(given.kwargs.get("attention_mask"), Tensor):
            self._warnings.give("fault", self._fault)

    def _note_returned(self, output: Any) -> None:
        frame = self._frame()
        if frame is not None and self._tracks:
            caches = output if isinstance(output, Mapping) else None
            frame.masks[self, "returned"] = caches

    def _look_up(self, value: Any) -> None:
        """Check the output of a table, if it may hold positions."""
        frame = self._frame()
        value = value[0] if isinstance(value, tuple) and value else value
        if self._warnings.has_given("left") or not isinstance(value, Tensor) or is_fake(value):
            return
        if frame is not None and frame.masks[self, "start"].is_cached:
            return
        for mask in self._left_alone if frame is None else self._padded_left(frame):
            seen = value[..., : mask.shape[1], :] if self._fills and value.dim() > 1 else value
            if counts_padding(seen, mask, self._widths):
                self._warnings.left()
                return

    def _padded_left(self, frame: Frame) -> list[Bool[Tensor, "batch pos"]]:
        """List the masks of a forward that have padding on the left."""
        if (self, "left") not in frame.masks:
            frame.masks[self, "left"] = left_masks(self.inputs(frame))
        left: list[Tensor] = frame.masks[self, "left"]
        return left

    def _note_encoder(self, given: Inputs) -> None:
        """Record the mask of an encoder that is called directly, as `generate()` does."""
        if self._frame() is None:
            self._left_alone = left_masks([listed_inputs(given, by_position=False)])

    def _forget_encoder(self, _output: Any) -> None:
        self._left_alone = []

    def _has_positions(self, frame: Frame) -> bool:
        given = self.inputs(frame)
        return any(inputs.get(name) is not None for inputs in given for name in _POSITIONS)

    def _check_counted(self, mask: Tensor, frame: Frame) -> None:
        """Warn of padding that is counted although no table shows it."""
        self._warnings.give("fault", right_padding_fault(core_of(self._model), mask))
        is_known = self._asked != "attention" or self._warnings.has_given("left")
        if is_known or not is_padded_left(mask) or self._has_positions(frame):
            return
        if has_bare_table(self._model):
            self._warnings.left()

    def _check_turned(self, site: WatchedSite, frame: Frame) -> None:
        """Warn of padding on the left if a site depends on what a rotary embedding turned."""
        is_known = self._asked != "attention" or self._warnings.has_given("left")
        if is_known or site.key in self._unturned or frame.masks[self, "start"].is_cached:
            return
        if self._padded_left(frame) and not self._has_positions(frame):
            if depends_on_positions(core_of(self._model), site.place):
                self._warnings.left()
            self._unturned.add(site.key)


_SIDES: tuple[Side, ...] = ("encoder", "decoder")


def _fills_up(module: nn.Module) -> bool:
    """Return whether a module pads sequences to a multiple of a length, on the right."""
    return any(hasattr(type(module), name) for name in _PADS)


def _selects_positions(site: WatchedSite) -> bool:
    return site.rows is None and bool(site.selector.steps)


def _dims(site: WatchedSite, rank: int) -> tuple[int, int] | None:
    """Return the axes of sequences and positions of a site, if it has them."""
    axes = site.known_axes
    if axes is None:  # as modules of plain models nearly always have them
        return (0, 1) if rank > 2 else None  # noqa: PLR2004
    if len(axes) != rank or "batch" not in axes:
        return None
    pos = next(iter(position_dims(axes)), None)
    return None if pos is None else (axes.index("batch"), pos)


def _chooses(selector: Selector, dim: int, rank: int) -> bool:
    """Return whether single positions are selected; dropping the first ones does not count."""
    picks = [step.pick for step in selector.steps if step.dim % rank == dim]
    return any(
        pick.stop is not None or (pick.start or 0) < 0
        if isinstance(pick, slice)
        else not isinstance(pick, Positions) or pick.length is None
        for pick in picks
    )


def _kept_logits(inputs: Mapping[str, Any], count: int | None) -> int | None:
    """Return the number of last positions that a forward was asked to compute logits for."""
    kept = inputs.get("logits_to_keep", inputs.get("num_logits_to_keep"))
    return min(kept, count) if count and type(kept) is int and kept > 0 else None


def _weakly(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """Call a method as long as its owner exists, without keeping it alive."""
    reference = weakref.WeakMethod(method)

    def call(value: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(value)

    return call
