"""Determine the axes of an activation: its name proposes them, and the model decides.

# NOTE [Names propose, the model decides]
In this order: The user's `Site(axes=...)` is used as it is. Otherwise the name of a hook point
proposes axes, with the position where TransformerLens declares it. They are checked against the
numbers of sequences and positions of the forward, and used if these leave no other axes. If sizes
coincide or disagree, or the name proposes nothing, the model is run with other sizes, and the axes
that grow are identified (see `growth`). If the axes are still unclear and something depends on
them, the site is refused.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from actctx._capture.growth import Grew, Known, growth_at, says_what_it_reads
from actctx._capture.watched import Seen, WatchedSite, fixed_sizes, named_after
from actctx._model.axes import Axes, are_the_only, fired_axes, position_dims
from actctx._results.label import Named


class Numbers(NamedTuple):
    """The numbers of sequences and positions that a forward was given.

    Attributes:
        batch: The number of sequences; None if unknown.
        positions: The numbers of positions: of the tokens, and of a decoder's tokens.

    """

    batch: int | None = None
    positions: frozenset[int] = frozenset()


def numbers_of(forwards: Iterable[Mapping[str, Any]]) -> Numbers:
    """Read the numbers of sequences and positions from the arguments of forwards.

    Args:
        forwards: The arguments by name, those of the innermost forward first.

    """
    for given in forwards:
        found = [(name, each) for name, each in flat_inputs(given) if holds_tokens(name, each)]
        # Other arguments have two axes too, such as the sizes of images. A bridge uses different
        # names for its tokens and those of its decoder.
        named = [each for name, each in found if name.endswith(_TOKENS)]
        is_named = any(name.endswith(_TOKENS) and "decoder" not in name for name, _ in found)
        tokens = named if is_named else [each for _, each in found]
        if tokens:
            labels = given.get("labels")  # from which the decoder makes its own tokens
            also = [labels] if isinstance(labels, Tensor) and labels.dim() == _WITH_TOKENS else []
            return Numbers(len(tokens[0]), frozenset(each.shape[1] for each in tokens + also))
    return Numbers()


_OF_EXPERT = ("token", "d_mlp")
_TOKENS = ("input_ids", "inputs_embeds")
_OTHER = ("mask", "position", "type", "label", "past")
_WITH_TOKENS = 2


def flat_inputs(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flatten arguments, including those inside a batch or `*args` of a wrapper."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from flat_inputs(value)
        elif isinstance(value, tuple | list):
            for each in value:
                yield from flat_inputs({name: each})
        else:
            yield str(name), value


def holds_tokens(name: str, value: Any) -> bool:
    """Return whether an argument of a forward is its tokens, or their embeddings."""
    if not isinstance(value, Tensor) or value.dim() < _WITH_TOKENS:
        return False
    if name.endswith("inputs_embeds"):
        return True
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return is_integer and value.dim() == _WITH_TOKENS and not any(word in name for word in _OTHER)


def plainly_told(site: WatchedSite, shape: tuple[int, ...], numbers: Numbers) -> Axes | None:
    """Return the axes that names and sizes determine; None if a run of the model is needed."""
    if site.named_axes is not None:
        return site.named_axes
    proposed = fired_axes(site.place.name, site.place.axes, len(shape))
    if proposed is None or not are_the_only(proposed, shape, numbers.batch, numbers.positions):
        return None
    return proposed


def proposed_axes(site: WatchedSite, shape: tuple[int, ...], numbers: Numbers) -> Axes | None:
    """Return the axes that the name of a site proposes; None if the sizes contradict them."""
    proposed = fired_axes(site.place.name, site.place.axes, len(shape))
    if proposed is None or numbers.batch is None or not numbers.positions:
        return proposed
    sizes = {"batch": {1, numbers.batch}, "pos": numbers.positions, "query": numbers.positions}
    fits = all(size in sizes.get(axis, {size}) for axis, size in zip(proposed, shape, strict=True))
    return proposed if fits else None


@dataclass(frozen=True, eq=False)
class Teller:
    """Finds the axes of a site by running the model, to which it holds a weak reference.

    Attributes:
        model: The model.
        module: The hook point or module of the site.
        io: Whether the activation is an input or an output of it.
        read: Finds the activation in that.
        proposed: The axes that the name proposes.
        known: The results of earlier runs.

    """

    model: "weakref.ref[nn.Module]"
    module: "weakref.ref[nn.Module]"
    io: str
    read: Callable[[Any], Tensor]
    proposed: Axes | None
    known: Known | None = None

    @classmethod
    def of(cls, model: nn.Module, site: WatchedSite, known: Known | None = None) -> "Teller":
        """Prepare to find the axes of a site."""
        place = site.place
        io = "out" if place.is_hook_point else site.io
        held = weakref.ref(model), weakref.ref(place.module)
        return cls(*held, io, site.reader, place.axes, known)

    def grew(self, numbers: Numbers | None = None) -> Grew | None:
        """Return what the axes grow with, if the model still exists.

        Args:
            numbers: The numbers of a forward. A module that does not say what it reads was run on
                token ids, so the run says nothing about forwards on other inputs.

        """
        model, module = self.model(), self.module()
        if model is None or module is None:
            return None
        reads_tokens = numbers is None or numbers.batch is not None
        if not reads_tokens and not says_what_it_reads(model):
            return None
        return growth_at(model, module, self.io, self.read, known=self.known)

    def axes(
        self, name: str, shape: tuple[int, ...] | None = None, numbers: Numbers | None = None
    ) -> Axes | None:
        """Return the axes of an activation of this shape, by default of that of the run.

        None if it has other sequences than the forward: a model may treat long texts differently
        from those of the run.
        """
        grew = self.grew(numbers)
        return None if grew is None else self.named(grew, name, shape, numbers)

    def named(
        self,
        grew: Grew,
        name: str,
        shape: tuple[int, ...] | None = None,
        numbers: Numbers | None = None,
    ) -> Axes | None:
        """Name the axes of an activation by what they grow with; see `axes`."""
        rank = len(grew.shape if shape is None else shape)
        if self.proposed == _OF_EXPERT and rank == len(_OF_EXPERT):
            return self.proposed  # its number of tokens depends on values, not on sizes
        axes = grew.axes(fired_axes(name, self.proposed, rank) or self.proposed, shape)
        batch = None if grew.is_of_part or numbers is None else numbers.batch
        return None if has_other_sequences(axes, shape, batch) else axes

    def later(
        self, site: WatchedSite, shape: tuple[int, ...], numbers: Numbers
    ) -> Callable[[], Named | None]:
        """Return a function that finds the axes of a site's values when it is called."""
        name, changes = site.place.name, site.changes  # not the site, whose module is the model's

        def tell() -> Named | None:
            axes = self.axes(name, shape, numbers)
            return None if axes is None else named_after(changes, axes, shape)

        return tell


def side_of_run(model: nn.Module, site: WatchedSite) -> Literal["encoder", "decoder"] | None:
    """Find by a run whose tokens a site of an encoder-decoder model runs on.

    Returns:
        The side whose positions its own grow with; None if that is unclear, as for a module
        that both sides run.

    """
    teller = Teller.of(model, site)
    grew = teller.grew()
    if grew is None or grew.is_of_part:
        return None
    along = position_dims(teller.named(grew, site.place.name) or ())
    if len(along) != 1:
        return None
    return "decoder" if "target" in grew.growth[along[0]] else "encoder"


def must_tell_axes(seen: Seen, shape: torch.Size, numbers: Numbers) -> bool:
    """Return whether the known axes of a site may be wrong for this activation."""
    site = seen.site
    if len(shape) != seen.rank or not seen.column.firings:
        return True
    if not site.needs_axes or site.named_axes is not None:
        return False
    return has_other_sequences(site.known_axes, shape, numbers.batch)


def tell_axes(
    model: nn.Module, seen: Seen, shape: torch.Size, numbers: Numbers, known: Known
) -> None:
    """Find the axes of a site, for activations of this rank.

    Args:
        model: The model that runs.
        seen: The site, which is given the axes.
        shape: The shape of the activation.
        numbers: The numbers of the forward.
        known: The results of earlier runs.

    Raises:
        AxisError: Something depends on them, and they cannot be determined.
        SelectionError: A position is outside an axis.

    """
    site = seen.site
    site.check_axes(shape)
    axes, tell = plainly_told(site, shape, numbers), None
    if axes is None:
        teller = Teller.of(model, site, known)
        if site.needs_axes or seen.column.asks_axes:
            axes = teller.axes(site.place.name, shape, numbers)
            if axes is None and site.needs_axes and not site.may_lack_axes:
                raise site.refuse_axes(shape)
        else:
            tell = teller.later(site, shape, numbers)
    if site.needs_axes and axes is not None and axes != site.known_axes:
        seen.take(site.along(axes))
    seen.site.selector.check(shape)
    if not seen.column.firings:
        seen.column.label.tell = tell
        seen.name_axes(axes or proposed_axes(site, shape, numbers), shape)
    seen.rank = len(shape)


def has_other_positions(site: WatchedSite, shape: torch.Size, numbers: Numbers) -> bool:
    """Return whether a slice along `pos` counts other positions than the tokens of the forward."""
    axes = site.known_axes
    is_told = site.selects_by_name and site.named_axes is None
    if not is_told or not numbers.positions or axes is None or len(axes) != len(shape):
        return False
    selected = {step.dim % len(shape) for step in site.selector.steps}
    along = selected.intersection(position_dims(axes))
    return any(shape[dim] not in numbers.positions for dim in along)


def has_other_sequences(
    axes: Axes | None, shape: tuple[int, ...] | None, batch: int | None
) -> bool:
    """Return whether an activation has another number of sequences than the forward was given."""
    if axes is None or shape is None or batch is None or "batch" not in axes:
        return False
    return shape[axes.index("batch")] not in {1, batch}


def axes_before(
    model: nn.Module, site: WatchedSite, *, known: Known | None = None
) -> tuple[Axes, dict[str, int]] | None:
    """Find the axes of a site before any forward, and the sizes of those that do not grow."""
    teller = Teller.of(model, site, known)
    grew = teller.grew()
    axes = None if grew is None else teller.named(grew, site.place.name)
    if grew is None or axes is None:
        return None
    sizes = zip(axes, fixed_sizes(axes, grew.shape), strict=True)
    return axes, {axis: size for axis, size in sizes if size is not None}
