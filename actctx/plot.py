"""Pictures of activations, with matplotlib, which the `plot` extra installs.

Each function takes captured activations or a data set, and draws on given or new axes. You can
change, save and close the figure.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from actctx._errors import OptionError
from actctx._plot.arguments import check_count, read_integers, read_tokens
from actctx._plot.norms import norms_at_positions, norms_of_rows
from actctx._plot.patterns import read_pattern
from actctx._plot.similarity import compare_layers
from actctx._plot.sources import layer_numbers, number_in, source_of
from actctx._results.activations import Activations
from actctx._select.values import check_readable
from actctx._stats.coloured import ColouredTokens
from actctx._stats.linear_cka import LinearCKA
from actctx.dataset import ActivationDataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Picture
    from matplotlib.figure import Figure

_NAMES, _LINE = 1.4, 0.19  # inches: room for names beside a picture, and for a row of it
_LARGEST = 24.0
ColouredTokens.__module__ = __name__  # where users find it


def plot_norms(
    acts: Activations | ActivationDataset,
    name: str = "hook_resid_post",
    *,
    positions: Sequence[int] | Int[Tensor, " pos"] | None = None,
    ax: "Picture | None" = None,
) -> "Picture":
    """Draw how large activations are, layer by layer.

    Numbers of any dtype have norms, complex ones that of their magnitudes.

    If positions are known, this is a heat map of the norm along the last axis, averaged over
    everything at a position. Positions are those of an axis `pos`, of the rows that a mask kept, or
    of a data set of tokens. Otherwise it is a line of the median norm of the rows, between its
    quartiles. For a data set, a few thousand rows are in memory at a time, besides the norm and the
    position of each row: up to 8 bytes per row and layer, and 16 per row.

    Args:
        acts: Captured or extracted activations of several layers, with the features along the last
            axis.
        name: The name within a layer, or a pattern of whole names; see `Activations.stack`.
        positions: The numbers of the positions along an axis `pos`, if a slice selected some.
        ax: Where to draw; a new figure by default.

    Returns:
        The axes that were drawn on.

    Raises:
        NotCapturedError: No captured site has this name in any layer.
        HookNameError: The name means several sites of a layer.
        JoinError: The layers do not have the same rows.
        AxisError: There are no features along a last axis.
        OptionError: There are not as many `positions` as were captured, an argument has the wrong
            type, torch cannot compute with the captured tensors (they are on the meta device, or
            quantized), or matplotlib is not installed.

    Example:
        >>> with capture(model, "blocks.*.hook_resid_post") as acts:
        ...     logits = model(tokens)
        >>> plot_norms(acts).get_xlabel()
        'position'

    """
    _pyplot()
    source = source_of(acts, name)
    keys = source.layers(name)
    if positions is not None:
        positions = read_integers("positions", positions)
    grid = norms_at_positions(source, keys)
    if positions is not None:
        if grid is None:
            raise OptionError(
                f"the positions of {keys[0]!r} are not known, so they cannot be shown in the "
                "picture; omit positions="
            )
        check_count(keys[0], "positions", positions, grid.shape[1])
    picture = _picture(ax)
    picture.set_title(name, parse_math=False)
    if grid is None:
        _draw_quartiles(picture, norms_of_rows(source, keys), layer_numbers(source, keys))
        return picture
    shown = picture.imshow(grid.numpy(), origin="lower", aspect="auto", interpolation="none")
    picture.figure.colorbar(shown, ax=picture, label="mean norm")
    picture.set(xlabel="position", ylabel="layer")
    _number(picture.xaxis, range(grid.shape[1]) if positions is None else positions)
    _number(picture.yaxis, layer_numbers(source, keys))
    return picture


def plot_pattern(
    acts: Activations | ActivationDataset,
    name: str,
    *,
    sequence: int = 0,
    tokens: Sequence[str] | None = None,
    heads: Sequence[int] | Int[Tensor, " head"] | None = None,
) -> tuple["Picture", ...]:
    """Draw the attention of each head of one layer: queries downwards, keys to the right.

    All heads share one colour scale, from 0 to 1. With `tokens`, the pictures grow with their
    number, up to 24 inches, so that about a hundred tokens can be read. If there are fewer queries
    than keys, queries are not labelled, since it is not known which of them were selected.

    Args:
        acts: A captured pattern, `batch head query key`, or a selection of heads; or a data set of
            patterns, which has a row for each query.
        name: The site, such as `"blocks.3.attn.hook_pattern"`.
        sequence: The index in the batch; for a data set, the number in the column `sequence`.
        tokens: Labels of the keys and queries, one for each.
        heads: The numbers of the heads, if a slice selected some.

    Returns:
        The axes of each head, all on one new figure.

    Raises:
        NotCapturedError: Nothing was captured under this name.
        AxisError: It is not an attention pattern.
        OptionError: There are not as many tokens as keys, or numbers as heads, or there is no such
            sequence; an argument has the wrong type; or matplotlib is not installed.

    Example:
        >>> with capture(model, "blocks.1.attn.hook_pattern") as acts:
        ...     logits = model(tokens)
        >>> [picture.get_title() for picture in plot_pattern(acts, "blocks.1.attn.hook_pattern")]
        ['head 0', 'head 1', 'head 2', 'head 3']

    """
    pattern = read_pattern(source_of(acts, name), name, sequence)
    count, _, keys = pattern.shape
    if tokens is not None:
        tokens = read_tokens(tokens)
        check_count(name, "keys", tokens, keys)
    numbers = [*range(count)] if heads is None else read_integers("heads", heads)
    alone = "give one for each, or capture only some, as with slice={'head': [0, 3]}"
    check_count(name, "heads", numbers, count, remedy=alone)
    columns = min(count, 4) if tokens is None else min(math.isqrt(count - 1) + 1, 3)
    side = None if tokens is None else min(_NAMES + _LINE * keys, _LARGEST)
    figure = _figure(rows=-(-count // columns), columns=columns, side=side)
    every = figure.axes
    pictures = every[:count]
    for picture, head, number in zip(pictures, pattern.numpy(), numbers, strict=True):
        shown = picture.imshow(head, vmin=0, vmax=1, cmap="viridis", interpolation="none")
        picture.set_title(f"head {number}", fontsize="medium")
        _name_positions(picture, tokens, *head.shape)
    for picture in every[count:]:
        picture.remove()
    figure.colorbar(shown, ax=pictures, label="attention", shrink=0.6)
    figure.suptitle(name, parse_math=False)
    return tuple(pictures)


def plot_similarity(
    acts: Activations | ActivationDataset | LinearCKA,
    name: str = "hook_resid_post",
    *,
    ax: "Picture | None" = None,
) -> "Picture":
    """Draw how similar the layers are: their linear CKA from `layer_similarity`, as a square.

    Args:
        acts: Captured or extracted activations of several layers; or a `LinearCKA`, whose sites are
            drawn as they are, with `name` as the title.
        name: The name within a layer, or a pattern of whole names; see `Activations.stack`.
        ax: Where to draw; a new figure by default.

    Returns:
        The axes that were drawn on.

    Raises:
        OptionError: The layers cannot be compared, or matplotlib is not installed. For other
            errors, see `layer_similarity`.

    Example:
        >>> with capture(model, "blocks.*.hook_resid_post") as acts:
        ...     logits = model(tokens)
        >>> plot_similarity(acts).get_ylabel()
        'layer'

    """
    _pyplot()
    if isinstance(acts, LinearCKA):
        square, numbers = acts.similarity.numpy(), [number_in(each) for each in acts.names]
    else:
        source = source_of(acts, name)
        square = compare_layers(source, name).numpy()
        numbers = layer_numbers(source, source.layers(name))
    picture = _picture(ax)
    shown = picture.imshow(square, vmin=0, vmax=1, origin="lower", interpolation="none")
    picture.figure.colorbar(shown, ax=picture, label="linear CKA")
    picture.set(xlabel="layer", ylabel="layer")
    picture.set_title(name, parse_math=False)
    for axis in (picture.xaxis, picture.yaxis):
        _number(axis, numbers)
    return picture


def layer_similarity(
    acts: Activations | ActivationDataset | LinearCKA, name: str = "hook_resid_post"
) -> Float[Tensor, "layer layer"]:
    """Compare the layers with each other, by linear centred kernel alignment (CKA).

    1 means that the rows of two layers are the same up to a rotation and a scale; 0 means that no
    feature of one can be linearly predicted from those of the other. With centred rows X and Y, it
    is `|Y'X|^2 / (|X'X| |Y'Y|)` in Frobenius norms (Kornblith et al. 2019, "Similarity of Neural
    Network Representations Revisited", equation 4). Rows are everything but the last axis.

    Sums are taken over a few thousand rows at a time. Memory holds these rows of all layers in
    single precision, and the products of the features of one layer with those of all. A data set is
    read once for each layer, and once for the means.

    Args:
        acts: Captured or extracted activations of several layers, with the features along the
            last axis; or a `LinearCKA`, which compares all its sites in one pass.
        name: The name within a layer, or a pattern of whole names; see `Activations.stack`.

    Returns:
        The similarities, in single precision on the CPU, ones on the diagonal.

    Raises:
        NotCapturedError: No captured site has this name in any layer.
        HookNameError: The name means several sites of a layer.
        JoinError: The layers do not have the same rows.
        AxisError: There are no features along a last axis.
        OptionError: All rows of a layer are the same, or some are not finite or not real, so the
            layer cannot be compared.

    Example:
        >>> with capture(model, "blocks.*.hook_resid_post") as acts:
        ...     logits = model(tokens)
        >>> bool((layer_similarity(acts).diagonal() == 1).all())
        True

    """
    if isinstance(acts, LinearCKA):
        return acts.similarity
    return compare_layers(source_of(acts, name), name)


def _draw_quartiles(
    picture: "Picture", norms: Float[Tensor, "layer row"], numbers: Sequence[str]
) -> None:
    with np.errstate(invalid="ignore"):  # nothing can be drawn between infinite norms
        low, middle, high = np.quantile(norms.numpy(), [0.25, 0.5, 0.75], axis=1)
    layers = range(len(numbers))
    picture.fill_between(layers, low, high, alpha=0.25, linewidth=0)
    picture.plot(layers, middle, marker="o")
    picture.set(xlabel="layer", ylabel="norm, median and quartiles")
    _number(picture.xaxis, numbers)


def colour_tokens(tokens: Sequence[str], values: Float[Tensor, " pos"]) -> ColouredTokens:
    """Colour each token of a text by a number, such as a neuron's activation there.

    Positive values are orange and negative ones blue, stronger for larger values. In a notebook,
    hover over a token to see its value. In plain text, values are in brackets.

    Args:
        tokens: The tokens as text, such as `model.to_str_tokens(text)`.
        values: A number for each token.

    Returns:
        The coloured tokens, which a notebook displays at the end of a cell.

    Raises:
        OptionError: There are not as many numbers as tokens, the tokens are not strings, or the
            values are not real numbers.

    Example:
        >>> colour_tokens(["The", " cat"], torch.tensor([-0.5, 2.0]))
        'The'(-0.5) ' cat'(2)

    """
    tokens = read_tokens(tokens)
    try:
        values = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError):
        raise OptionError("values must be numbers; give one for each token") from None
    check_readable("values", values, real=True)
    if values.shape != (len(tokens),):
        raise OptionError(
            f"there are {len(tokens)} tokens, but values of the shape {tuple(values.shape)}; give "
            "one number for each token"
        )
    return ColouredTokens(tokens, values.float().tolist())


def _picture(ax: "Picture | None") -> "Picture":
    return _figure(rows=1, columns=1).axes[0] if ax is None else ax


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise OptionError(
            f"pictures need {error.name}, which is not installed; install it with: pip install "
            "'actctx[plot]'"
        ) from None
    return plt


def _figure(*, rows: int, columns: int, side: float | None = None) -> "Figure":
    side = side or (5.0 if rows * columns == 1 else 3.0)
    size = (side * columns, side * rows)
    figure: Figure = _pyplot().figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns)
    return figure


def _number(axis: Any, numbers: Sequence[object]) -> None:
    """Label an axis with the numbers of the captured items, which may be a selection."""
    from matplotlib.ticker import MaxNLocator

    # An escaped dollar is a dollar; others would enclose a formula.
    known = dict(enumerate(str(number).replace("$", r"\$") for number in numbers))
    axis.set_major_locator(MaxNLocator(integer=True))
    axis.set_major_formatter(lambda at, _: known.get(at, ""))


def _name_positions(
    picture: "Picture", tokens: Sequence[str] | None, queries: int, keys: int
) -> None:
    if tokens is None:
        _number(picture.xaxis, range(keys))
        _number(picture.yaxis, range(queries))
    else:
        shown = [token.strip() or "·" for token in tokens]
        picture.set_xticks(range(keys), shown, rotation=90, parse_math=False)
        if queries == keys:
            picture.set_yticks(range(keys), shown, parse_math=False)
    if queries != keys:  # they may be a selection
        picture.set_yticks([])
