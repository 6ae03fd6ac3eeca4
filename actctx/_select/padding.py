"""Select the rows of an activation that hold real tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from actctx._errors import AxisError, OptionError, SelectionError
from actctx._model.axes import Axes
from actctx._model.shape_run import is_fake
from actctx._select.own import TokenRows
from actctx._select.slices import Positions, Selector, Step, of_flat_rows


class RowSelector(NamedTuple):
    """Selects real tokens of each sequence.

    Attributes:
        site: The name of the site, for messages.
        dim: The axis of the positions, after the site's other axes were selected from.
        tokens: What to select along the real tokens of each sequence.
        batch: The axis of the sequences.

    """

    site: str
    dim: int
    tokens: Selector
    batch: int = 0

    @property
    def is_one_a_sequence(self) -> bool:
        """Whether an int selects one token of each sequence, so that rows are sequences."""
        return any(isinstance(step.pick, int) for step in self.tokens.steps)

    def axes_after(self, axes: Axes) -> Axes:
        """Name the axes of the kept rows."""
        rest = [axis for dim, axis in enumerate(axes) if dim not in {self.batch, self.dim}]
        return ("batch" if self.is_one_a_sequence else "token", *rest)

    def sizes_after(self, sizes: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the sizes of the axes of the kept rows, as far as they are known beforehand."""
        dims = {self.batch, self.dim}
        return (None, *(size for dim, size in enumerate(sizes) if dim not in dims))

    def keep(
        self, activation: Shaped[Tensor, "..."], rows: TokenRows
    ) -> Shaped[Tensor, "token ..."]:
        """Take rows of an activation as a copy; if all are taken, as a view if possible."""
        activation = activation.movedim((self.batch, self.dim), (0, 1))
        if rows.is_all:
            return activation.flatten(0, 1)
        sequence, position = rows.where.to(activation.device).unbind(1)
        if activation.is_contiguous():  # whole rows are copied at once, which is faster
            numbers = sequence * activation.shape[1] + position
            return activation.flatten(0, 1).index_select(0, numbers)
        return activation[sequence, position]


class Chosen:
    """The rows to keep of the forward that is about to run, chosen for all sites beforehand.

    It replaces a mask, which would have to be the same for all forwards.

    Attributes:
        shape: The sequences and positions of the forward.

    """

    def __init__(self) -> None:
        self._rows = TokenRows(torch.empty(0, 2, dtype=torch.long), 0)
        self.shape = (0, 0)

    def choose(self, where: Int64[Tensor, "token 2"], shape: tuple[int, int]) -> None:
        """Keep these rows, in the order of `find_rows`, of activations of this shape."""
        self.shape = shape
        places = where[:, 0] * shape[1] + where[:, 1]
        # As many rows may still be in another order, or contain duplicates.
        is_all = torch.equal(places, torch.arange(shape[0] * shape[1], device="cpu"))
        self._rows = TokenRows(where, shape[0], is_all=is_all)

    def rows(self, site: str, shape: tuple[int, int]) -> TokenRows:
        """Return the rows for an activation of this shape.

        Raises:
            SelectionError: The forward was given another number of tokens.

        """
        if shape != self.shape:
            raise SelectionError(
                f"{site!r} has {shape[0]} sequences of {shape[1]} positions, but the input has "
                f"{self.shape[0]} of {self.shape[1]}, so there is no row for each of its tokens; "
                "leave this site out"
            )
        return self._rows


def check_tokens(site: str, axes: Axes | None, *, chosen: bool = False) -> tuple[Axes, int, int]:
    """Make sure that a site has the axes that are needed to find the rows of tokens.

    Args:
        site: The name of the site, for messages.
        axes: The axes of its activations, or None where they are not known.
        chosen: Whether it is for `Chosen` rows, those of a data set, and not for a mask.

    Returns:
        The axes, and which of them are those of the sequences and of the positions.

    Raises:
        AxisError: The site has no positions, or its axes are not known.

    """
    pos = next((axis for axis in ("pos", "query") if axes and axis in axes), None)
    if axes is None or pos is None or "batch" not in axes:
        keeps = "a data set has one row per token" if chosen else "mask= keeps real tokens"
        otherwise = "leave it out" if chosen else "capture it without mask="
        if axes and axes[0] == "token":
            otherwise = f"{of_flat_rows(axes)}, else {otherwise}"
        if axes is None:
            raise AxisError(
                f"{keeps}, but {site!r} has no 'batch' and 'pos' axes to find them by: its axes "
                f"are not known; name them with Site(axes='batch pos ...'), or {otherwise}"
            )
        lacks = "batch" if "batch" not in axes else "pos"
        raise AxisError(
            f"{keeps}, but {site!r} has no axis {lacks!r}: its axes are {' '.join(axes)!r}; "
            f"{otherwise}"
        )
    return axes, axes.index("batch"), axes.index(pos)


def split_rows(
    selector: Selector, axes: Axes | None, *, chosen: bool = False
) -> tuple[Selector, RowSelector]:
    """Split a slice into the part for real tokens and the part for other axes.

    Args:
        selector: The slice of a site.
        axes: The axes of the site's activations, or None where they are not known.
        chosen: Whether it is for `Chosen` rows, those of a data set, and not for a mask.

    Raises:
        AxisError: The site has no positions, or its axes are not known.
        OptionError: The slice selects sequences, or positions with a mask of its own.

    """
    site = selector.site
    axes, batch, dim = check_tokens(site, axes, chosen=chosen)
    tokens = [step for step in selector.steps if step.dim % len(axes) == dim]
    rest = [step for step in selector.steps if step.dim % len(axes) != dim]
    if any(step.dim % len(axes) == batch for step in rest):
        keeper, left = ("a data set", "data") if chosen else ("mask=", "the mask")
        raise OptionError(
            f"the slice of {site!r} selects along 'batch', which {keeper} does not allow; leave "
            f"the sequences out of {left}"
        )
    if any(isinstance(step.pick, Positions) and step.pick.length is not None for step in tokens):
        instead = "and there is mask= as well; give one"
        if chosen:
            instead = "as long as one batch; give positions, or mask= the name of an entry of data"
        raise OptionError(f"the slice of {site!r} is a mask along {axes[dim]!r}, {instead}")
    gone = [step.dim % len(axes) for step in rest if isinstance(step.pick, int)]
    batch, dim = (each - sum(other < each for other in gone) for each in (batch, dim))
    along = Selector(site, tuple(Step(0, step.pick, "the real tokens") for step in tokens), None)
    return Selector(site, tuple(rest), axes), RowSelector(site, dim, along, batch)


def find_rows(
    selector: RowSelector,
    mask: Bool[Tensor, "batch pos"],
    shape: tuple[int, int],
    numbers: Sequence[int] | None = None,
) -> Int64[Tensor, "token 2"]:
    """Find the rows to keep: pairs of sequence and position, sequence by sequence.

    Positions in the result count from the start of the activation, including padding. The selection
    counts real tokens only, so -1 is the last of them.

    Args:
        selector: Which real tokens to keep.
        mask: Where the real tokens are.
        shape: The number of sequences and of positions of the activation.
        numbers: The numbers of the sequences in error messages; by default their indices.

    Raises:
        SelectionError: The mask is of another shape, or a sequence has no such token.

    """
    if tuple(mask.shape) != shape:
        if shape[0] == 1 < mask.shape[0]:
            raise SelectionError(
                f"{selector.site!r} fired once for all {mask.shape[0]} sequences, so mask= cannot "
                "separate their tokens; capture it without a mask"
            )
        raise SelectionError(
            f"{selector.site!r} has {shape[0]} sequences of {shape[1]} positions, but the mask "
            f"has the shape {tuple(mask.shape)}; give one entry for each position"
        )
    rows = []
    for sequence, real in enumerate(mask):
        try:
            tokens = real.nonzero().flatten()
            selector.tokens.check(tokens.shape)
            kept = selector.tokens.select(tokens).reshape(-1)
        except SelectionError as error:
            number = sequence if numbers is None else numbers[sequence]
            if not real.any():
                raise SelectionError(
                    f"sequence {number} has no real token, so there is none to select from "
                    f"{selector.site!r}; leave it out of the batch, or correct the mask"
                ) from None
            raise SelectionError(f"in sequence {number}, {error}") from None
        rows.append(torch.stack([torch.full_like(kept, sequence), kept], dim=1))
    return torch.cat(rows)


def as_mask(mask: Shaped[Tensor, "..."]) -> Bool[Tensor, "batch pos"]:
    """Read a mask, such as a tokenizer's `attention_mask`, on the CPU.

    In a plan it may have no values; then all tokens are taken to be real.

    Raises:
        OptionError: It is not two-dimensional, has no values, or has negative ones.

    """
    if mask.is_meta:
        raise OptionError(
            "the mask is on the meta device, so it does not say which tokens are real; capture "
            "without mask=, or give a mask on the CPU"
        )
    if mask.dim() != 2:  # noqa: PLR2004  batch and pos
        raise OptionError(
            f"the mask has the shape {tuple(mask.shape)}; give one of the shape batch pos, true "
            "where there are real tokens"
        )
    if is_fake(mask):
        return torch.ones(mask.shape, dtype=torch.bool, device="cpu")
    if mask.is_floating_point() and bool((mask < 0).any()):
        raise OptionError(
            "the mask has negative values, like a mask that is added to attention scores; give one "
            "that is true where there are real tokens, such as mask == 0"
        )
    return mask.detach().bool().cpu()


def real_of(mask: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Return which tokens are real according to the mask of a forward, on the mask's device.

    A floating-point mask without positive values is one that is added to attention scores: it is 0
    where tokens are real.
    """
    mask = mask.detach()
    if not mask.is_floating_point():
        return mask.bool()
    return torch.where((mask > 0).any(), mask > 0, mask >= 0)
