"""Split features into heads, and the outputs of a joint projection into queries, keys and values.

# NOTE [Sizes of a layer]
Layers of one model may have heads of different sizes and numbers, and a model may contain several
towers. So heads are split by the attributes of the layer's attention module, checked against the
widths of its projections: queries are `heads * d_head` wide, or twice that if the adapter says that
each query has a gate; keys have the size of queries; values and mixed values are `heads * d_value`
wide. Sizes that do not add up are refused, not guessed.

# NOTE [Splitting by labels]
TransformerLens' adapters split weights, not activations. So an adapter is given a projection whose
weights are the indices of its outputs, and the indices that it returns as the weights of the
queries are those of the queries. The result is checked against the input, because an adapter that
reads other weights than these would return wrong features.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True, eq=False)
class Heads:
    """Splits features into heads, or picks those of a joint projection and splits them.

    Attributes:
        d_head: The size of a head.
        index: The features to pick of a joint projection.

    """

    d_head: int
    index: Int64[Tensor, " i"] | None = None

    def __call__(
        self, activation: Shaped[Tensor, "*batch features"]
    ) -> Shaped[Tensor, "*batch head d_head"]:
        """Split features into heads. The result is a view if the features are evenly spaced."""
        if self.index is None:
            return _split(activation, -1, self.d_head)
        features = len(self.index)
        start, stride = self._layout
        if stride in {0, self.d_head}:  # side by side, or a single head
            return _split(activation.narrow(-1, start, features), -1, self.d_head)
        if activation.shape[-1] * self.d_head == stride * features and start < stride:
            return _split(activation, -1, stride).narrow(-1, start, self.d_head)
        index = self.index.to(activation.device)
        return _split(activation.index_select(-1, index), -1, self.d_head)

    @functools.cached_property
    def _layout(self) -> tuple[int, int]:
        """Where the first head starts, and the step to the next one; -1 if the steps differ."""
        if self.index is None:
            return 0, self.d_head
        heads = self.index.view(-1, self.d_head)
        start, stride = int(heads[0, 0]), int(heads[-1, 0] - heads[0, 0]) // max(len(heads) - 1, 1)
        is_regular = torch.equal(self.index, _regular(start, stride, *heads.shape))
        return start, stride if is_regular else -1


def _split(activation: Tensor, *sizes: int) -> Tensor:
    return activation.reshape(*activation.shape[:-1], *sizes)


def _regular(start: int, stride: int, heads: int, d_head: int) -> Int64[Tensor, " i"]:
    rows = start + stride * torch.arange(heads)
    return (rows[:, None] + torch.arange(d_head)).flatten()


_DEPTHS = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""Names of the attribute with the size of a query in Hugging Face's attention modules."""

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Names of the attribute with the number of query heads."""


def heads_of(component: Any, attention: nn.Module, config: Any) -> dict[str, Heads | str]:
    """Return how to split the projections of an attention module into heads.

    Args:
        component: The adapter's part for the attention.
        attention: The attention, as Hugging Face has it.
        config: The adapter's config, with gates, and with sizes that the module does not have.

    Returns:
        For `"q"`, `"k"`, `"v"` and `"z"`, as far as the attention has them: how to split it, or why
        that is not known.

    """
    sides = {"q": ("q", "out"), "k": ("k", "out"), "v": ("v", "out"), "z": ("o", "in")}
    told = {key: _width_of(component, attention, *side) for key, side in sides.items()}
    widths = {key: width for key, width in told.items() if width is not None}
    return _divided_by(widths, attention, config)


def joint_heads_of(component: Any, attention: nn.Module, config: Any) -> dict[str, Heads | str]:
    """Return how to split a joint projection into queries, keys and values, and those into heads.

    Args:
        component: The adapter's part for the attention.
        attention: The attention, as Hugging Face has it.
        config: The adapter's config.

    Returns:
        As `heads_of`.

    Raises:
        ValueError: What the adapter gives does not divide the outputs. It raises other errors
            of its own.

    """
    # The labels need values, even if the caller's mode makes new tensors without.
    with torch.inference_mode(mode=False), _disable_current_modes(), torch.device("cpu"):
        parts = dict(zip("qkv", labelled(component, attention), strict=True))
    widths: dict[str, int | str] = {key: len(part) for key, part in parts.items()}
    width = _width_of(component, attention, "o", "in")
    if width is not None:
        widths["z"] = width
    return {
        key: replace(heads, index=parts[key])
        if isinstance(heads, Heads) and key in parts
        else heads
        for key, heads in _divided_by(widths, attention, config, is_joint=True).items()
    }


def _divided_by(
    widths: Mapping[str, int | str], attention: Any, config: Any, *, is_joint: bool = False
) -> dict[str, Heads | str]:
    """Split features of these widths by the sizes that the attention module states."""
    unknown = next((width for width in widths.values() if isinstance(width, str)), "")
    if unknown:
        return {
            key: str(width) if isinstance(width, str) else unknown for key, width in widths.items()
        }
    known = {key: int(width) for key, width in widths.items()}
    depth, count = _first_of(attention, _DEPTHS), _first_of(attention, _COUNTS)
    queries, mixed = known.get("q"), known.get("z")
    gated = bool(getattr(config, "gated_q_proj", False)) and not is_joint
    if count is None and depth is not None:
        # The queries' projection also holds the gate; the output's input does not.
        told = mixed if gated else queries
        count = None if told is None or told % depth else told // depth
        usual = getattr(config, "n_heads", None)
        if count is None and queries is None and usual is not None and usual * depth == mixed:
            count = usual
    if depth is None and count is not None and queries is not None and not gated:
        depth = None if queries % count else queries // count
    if depth is None and count is None:
        depth, count = getattr(config, "d_head", None), getattr(config, "n_heads", None)
    why = f"the {type(attention).__name__} says neither the number nor the size of its heads"
    if count is None:
        return dict.fromkeys(known, why)
    found: dict[str, Heads | str] = {}
    if queries is not None and depth is not None:
        found["q"] = _queries(queries, count, depth, gated=gated)
    elif queries is not None:
        found["q"] = why
    if queries is not None and isinstance(found["q"], str):
        return dict.fromkeys(known, found["q"])
    return {**found, **_keys_and_values(known, count, depth)}


def _queries(width: int, count: int, depth: int, *, gated: bool) -> Heads | str:
    if width == count * depth:
        return Heads(depth)
    if gated and width == 2 * count * depth:
        return Heads(depth, _regular(0, 2 * depth, count, depth))
    return f"{width} features are not {count} heads of {depth}"


def _keys_and_values(
    widths: Mapping[str, int], count: int, depth: int | None
) -> dict[str, Heads | str]:
    found: dict[str, Heads | str] = {}
    keys, values, mixed = (widths.get(key) for key in "kvz")
    d_value = None if mixed is None or mixed % count else mixed // count
    if keys is not None:
        whole = depth is not None and keys % depth == 0
        found["k"] = (
            Heads(depth) if whole and depth else f"{keys} features are not heads of {depth}"
        )
        if values is not None and depth and whole:
            groups = keys // depth
            d_value = d_value if values % groups else values // groups
    for key, width in (("v", values), ("z", mixed)):
        if width is None:
            continue
        whole = d_value is not None and width % d_value == 0
        if key == "z":
            whole = whole and width == count * (d_value or 0)
        found[key] = (
            Heads(d_value) if whole and d_value else f"{width} features are not whole heads"
        )
    return found


def _first_of(attention: Any, names: tuple[str, ...]) -> int | None:
    told = (getattr(attention, name, None) for name in names)
    return next((size for size in told if isinstance(size, int) and size > 0), None)


def _width_of(component: Any, attention: nn.Module, part: str, side: str) -> int | str | None:
    """Return how many features a projection takes or returns, or why that is not known."""
    name = getattr(component.submodules.get(part), "name", None)
    if name is None:
        return None
    try:
        projection: Any = _unwrapped(attention.get_submodule(name))
    except AttributeError:
        return None
    known = {
        "out": ("out_features", "outfeatures", "nf"),
        "in": ("in_features", "infeatures", "nx"),
    }
    sizes = known[side]
    width = _first_of(projection, sizes)
    return (
        f"the {type(projection).__name__} {name!r} does not say its width"
        if width is None
        else width
    )


def labelled(component: Any, attention: nn.Module) -> list[Int64[Tensor, " _"]]:
    """List which outputs of a joint projection are queries, keys and values; see the note above.

    Raises:
        ValueError: What the adapter gives does not divide the outputs. It raises other errors
            of its own.

    """
    name = component.submodules["qkv"].name
    projection: Any = _unwrapped(attention.get_submodule(name))
    is_conv1d = hasattr(projection, "nf")  # Hugging Face's, whose outputs come second
    outputs = projection.nf if is_conv1d else projection.out_features
    numbers = torch.arange(outputs, dtype=torch.float32)
    if getattr(attention, "new_decoder_architecture", False):
        parts = _of_falcon(attention, numbers)
    else:
        inputs = projection.nx if is_conv1d else projection.in_features
        weight = numbers.expand(inputs, -1) if is_conv1d else numbers[:, None].expand(-1, inputs)
        labels = copy.copy(attention)
        labels._modules = {**attention._modules, name: _bare(weight.clone(), numbers)}
        parts = [part.weight[:, 0].detach() for part in component.split_qkv_matrix(labels)]
    _check(parts, numbers)
    return [part.long() for part in parts]


def _unwrapped(projection: nn.Module) -> nn.Module:
    """Return the projection inside PEFT's layers, whose attributes describe its weights."""
    while isinstance(inner := getattr(projection, "base_layer", None), nn.Module):
        projection = inner
    return projection


def _bare(weight: Float[Tensor, "..."], bias: Float[Tensor, " outputs"]) -> nn.Module:
    """Make a module with only these: the real one may compute its weights, or wrap others."""
    module = nn.Module()
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    return module


def _of_falcon(attention: Any, numbers: Float[Tensor, " outputs"]) -> list[Float[Tensor, " _"]]:
    """Split as Falcon's newer decoders do: each group has its queries, key and value.

    TransformerLens' adapter assumes that all queries come first. The model's own method repeats a
    key for all queries of its group.
    """
    parts = attention._split_heads(numbers[None, None])
    return [torch.tensor([*dict.fromkeys(part.flatten().tolist())]) for part in parts]


def _check(parts: list[Float[Tensor, " _"]], numbers: Float[Tensor, " outputs"]) -> None:
    given = torch.cat(parts).tolist()
    if len({*given} & {*numbers.tolist()}) != len(given):
        raise ValueError("what it gives does not divide the outputs")
