"""Pictures of activations, with matplotlib: `pip install 'actctx[plot]'`.

Each function takes what was captured, and draws on axes that are given or made. The figure is the
caller's, to be changed, saved and closed.
"""

import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from actctx._activations import Activations
from actctx._errors import AxisError, OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Picture
    from matplotlib.figure import Figure


def plot_norms(
    acts: Activations, name: str = "hook_resid_post", *, ax: "Picture | None" = None
) -> "Picture":
    """Draw how large activations are, layer by layer.

    Where positions were kept, a heat map of the norm along the last axis, averaged over the
    batch; else a line of the median norm of the rows, between its quartiles.

    Args:
        acts: What was captured, in several layers, with the features along the last axis.
        name: The name within a layer, or a pattern of whole names; see `Activations.stack`.
        ax: Where to draw; a new figure by default.

    Raises:
        NotCapturedError: No captured site has this name in any layer.

    Example:
        >>> with capture(model, "blocks.*.hook_resid_post") as acts:
        ...     logits = model(tokens)
        >>> plot_norms(acts).get_xlabel()
        'position'

    """
    keys = acts._layers(name)
    axes = acts.axes(keys[0])
    norms = [_joined(acts, key).float().norm(dim=-1).cpu() for key in keys]
    picture = _picture(ax)
    if axes[:2] == ("batch", "pos") and len(axes) == 3:  # noqa: PLR2004  and the features
        grid = torch.stack([norm.mean(0) for norm in norms])
        shown = picture.imshow(grid.numpy(), origin="lower", aspect="auto", interpolation="none")
        picture.figure.colorbar(shown, ax=picture, label="mean norm")
        picture.set(xlabel="position", ylabel="layer")
        _count_in_whole_numbers(picture)
        _number(picture.yaxis, keys)
    else:
        ends = torch.tensor([0.25, 0.5, 0.75])
        low, middle, high = torch.stack(
            [norm.flatten().quantile(ends) for norm in norms], 1
        ).numpy()
        layers = range(len(keys))
        picture.fill_between(layers, low, high, alpha=0.25, linewidth=0)
        picture.plot(layers, middle, marker="o")
        picture.set(xlabel="layer", ylabel="norm, median and quartiles")
        _number(picture.xaxis, keys)
    picture.set_title(name)
    return picture


def plot_pattern(
    acts: Activations,
    name: str,
    *,
    sequence: int = 0,
    tokens: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
) -> "Figure":
    """Draw the attention of each head of one layer: queries downwards, keys to the right.

    Args:
        acts: What was captured, `batch head query key`, or a selection of heads.
        name: The site, such as `"blocks.3.attn.hook_pattern"`.
        sequence: Which one of the batch.
        tokens: What to write at the keys and queries, one for each.
        heads: The numbers of the heads, where a slice selected some.

    Raises:
        NotCapturedError: Nothing was captured under this name.
        AxisError: It is no attention pattern.
        OptionError: There are not as many tokens as keys, or numbers as heads, or there is no such
            sequence.

    """
    axes = acts.axes(name)
    if axes[-2:] != ("query", "key") or axes[0] != "batch":
        raise AxisError(
            f"{name!r} has the axes {' '.join(axes)!r}, but a picture of attention needs 'batch "
            "head query key'; capture attn.hook_pattern without a slice along these"
        )
    found = _joined(acts, name)
    if not -len(found) <= sequence < len(found):
        raise OptionError(
            f"sequence={sequence} is none of the {len(found)} of {name!r}; give one of them"
        )
    pattern = found[sequence].float().cpu().numpy()
    pattern = pattern if "head" in axes else pattern[None]
    _check_texts(tokens or ())
    numbers = range(len(pattern)) if heads is None else heads
    count, _, keys = pattern.shape
    for what, given, wanted in (("keys", tokens, keys), ("heads", numbers, count)):
        if given is not None and len(given) != wanted:
            raise OptionError(
                f"{name!r} has {wanted} {what}, but names for {len(given)} were given; give one "
                "for each"
            )
    figure = _figure(rows=-(-count // 4), columns=min(count, 4))
    for picture, head, number in zip(figure.axes, pattern, numbers, strict=False):
        picture.imshow(head, vmin=0, vmax=1, cmap="viridis", interpolation="none")
        picture.set_title(f"head {number}", fontsize="small")
        _name_positions(picture, tokens, len(head))
    for picture in figure.axes[count:]:
        picture.set_axis_off()
    figure.suptitle(name)
    return figure


def plot_similarity(
    acts: Activations, name: str = "hook_resid_post", *, ax: "Picture | None" = None
) -> "Picture":
    """Draw how alike the layers are: their linear CKA, of `layer_similarity`, in a square.

    Args:
        acts: What was captured, in several layers.
        name: The name within a layer, or a pattern of whole names; see `Activations.stack`.
        ax: Where to draw; a new figure by default.

    Raises:
        NotCapturedError: No captured site has this name in any layer.

    """
    square = layer_similarity(acts, name).numpy()
    picture = _picture(ax)
    shown = picture.imshow(square, vmin=0, vmax=1, origin="lower", interpolation="none")
    picture.figure.colorbar(shown, ax=picture, label="linear CKA")
    picture.set(xlabel="layer", ylabel="layer", title=name)
    _count_in_whole_numbers(picture)
    for axis in (picture.xaxis, picture.yaxis):
        _number(axis, acts._layers(name))
    return picture


def layer_similarity(
    acts: Activations, name: str = "hook_resid_post"
) -> Float[Tensor, "layer layer"]:
    """Compare the layers with each other, by linear centred kernel alignment (CKA).

    1 means that the rows of two layers are the same up to a rotation and a scale, whatever their
    features are; 0 that no feature of one can be told from the other. With rows X and Y, centred,
    it is `|Y'X|^2 / (|X'X| |Y'Y|)` in Frobenius norms (Kornblith et al. 2019, "Similarity of
    Neural Network Representations Revisited", equation 4). Rows are everything but the last axis.
    Beside what was captured, two layers in single precision are held at a time.

    Args:
        acts: What was captured, in several layers, with the features along the last axis.
        name: The name within a layer, or a pattern of whole names; see `Activations.stack`.

    Returns:
        The similarities, in single precision on the CPU, ones on the diagonal.

    Raises:
        NotCapturedError: No captured site has this name in any layer.

    """
    keys = acts._layers(name)
    square = torch.eye(len(keys))
    sizes = torch.empty(len(keys))
    for one, key in enumerate(keys):
        rows = _centred(_joined(acts, key))
        sizes[one] = (rows.T @ rows).norm()
        for two in range(one):
            alike = (_centred(_joined(acts, keys[two])).T @ rows).norm() ** 2
            square[one, two] = square[two, one] = alike / (sizes[one] * sizes[two])
    return square


def _check_texts(tokens: Sequence[str]) -> None:
    if not all(isinstance(token, str) for token in tokens):
        raise OptionError(
            "tokens are to be read, but some are no strings; give those of "
            "model.to_str_tokens(text), or of tokenizer.convert_ids_to_tokens(ids)"
        )


def _joined(acts: Activations, key: str) -> Shaped[Tensor, "..."]:
    found = acts[key]
    if not isinstance(found, Tensor):
        raise OptionError(
            f"{key!r} is a list of tensors, since it was captured with join=None; a picture needs "
            "one tensor, so capture with join='batch'"
        )
    return found.detach()


def _centred(activation: Shaped[Tensor, "*rows features"]) -> Float[Tensor, "row features"]:
    rows = activation.flatten(0, -2).float()
    return rows - rows.mean(0)


class ColouredTokens:
    """Tokens that show in a notebook what number each of them has; made by `colour_tokens`."""

    def __init__(self, tokens: Sequence[str], values: Sequence[float]) -> None:
        self.tokens = tuple(tokens)
        self.values = tuple(values)

    def __repr__(self) -> str:
        return " ".join(
            f"{token!r}({value:.2g})" for token, value in zip(self.tokens, self.values, strict=True)
        )

    def _repr_html_(self) -> str:
        finite = [abs(value) for value in self.values if math.isfinite(value)]
        most = max(finite, default=0) or 1
        spans = (
            f'<span title="{value:.4g}" style="white-space:pre-wrap;background:'
            f'rgba({"230,120,0" if value > 0 else "0,114,200"},{_share(value, most):.2f})">'
            f"{escape(token)}</span>"
            for token, value in zip(self.tokens, self.values, strict=True)
        )
        return f'<div style="line-height:1.8">{"".join(spans)}</div>'


def _share(value: float, most: float) -> float:
    return abs(value) / most if math.isfinite(value) else float(math.isinf(value))


def colour_tokens(tokens: Sequence[str], values: Float[Tensor, " pos"]) -> ColouredTokens:
    """Colour each token of a text by a number, such as a neuron's activation there.

    Positive values are orange, negative ones blue, the stronger the larger; in a notebook the
    pointer shows them. In plain text they stand in brackets.

    Args:
        tokens: The tokens as they are to be read, such as `model.to_str_tokens(text)`.
        values: A number for each.

    Raises:
        OptionError: There are not as many numbers as tokens.

    Example:
        >>> colour_tokens(["The", " cat"], torch.tensor([-0.5, 2.0]))
        'The'(-0.5) ' cat'(2)

    """
    _check_texts(tokens)
    values = torch.as_tensor(values)
    if values.shape != (len(tokens),):
        raise OptionError(
            f"there are {len(tokens)} tokens, but values of the shape {tuple(values.shape)}; give "
            "one number for each token"
        )
    return ColouredTokens(tokens, values.float().tolist())


def _picture(ax: "Picture | None") -> "Picture":
    return _figure(rows=1, columns=1).axes[0] if ax is None else ax


def _figure(*, rows: int, columns: int) -> "Figure":
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError as error:
        raise OptionError(
            f"pictures need {error.name}, which is not installed; install it with: pip install "
            "'actctx[plot]'"
        ) from None
    side = 5.0 if rows * columns == 1 else 3.0
    size = (side * columns, side * rows)
    figure: Figure = plt.figure(figsize=size, layout="constrained")
    figure.subplots(rows, columns)
    return figure


def _count_in_whole_numbers(picture: "Picture") -> None:
    from matplotlib.ticker import MaxNLocator

    picture.xaxis.set_major_locator(MaxNLocator(integer=True))
    picture.yaxis.set_major_locator(MaxNLocator(integer=True))


def _number(axis: Any, keys: Sequence[str]) -> None:
    """Write the numbers of the layers that were captured, which need not be all."""
    numbers = [next(iter(re.findall(r"\d+", key)), key) for key in keys]
    known = dict(enumerate(numbers))
    axis.get_major_locator().set_params(integer=True)
    axis.set_major_formatter(lambda at, _: known.get(at, ""))


def _name_positions(picture: "Picture", tokens: Sequence[str] | None, queries: int) -> None:
    if tokens is None:
        return
    shown = [token.strip() or "·" for token in tokens]
    picture.set_xticks(range(len(shown)), shown, rotation=90, fontsize="x-small")
    if queries == len(shown):  # those that were selected are others
        picture.set_yticks(range(len(shown)), shown, fontsize="x-small")
