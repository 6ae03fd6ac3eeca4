"""How features divide into heads, and the outputs of a joint projection into queries, keys, values.

# NOTE [Dividing by labels]
TransformerLens' adapters divide weights, not activations. So one is given a projection whose
weights are the numbers of its outputs, and the numbers that come back as the weights of the queries
are theirs. What comes back is held against what was given, since an adapter that reads other
weights than these would give any features for the heads.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn


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
        """Split features into heads: a view, but of features that lie without a rule."""
        if self.index is None:
            return _split(activation, -1, self.d_head)
        features = len(self.index)
        start, stride = self._layout
        if stride in {0, self.d_head}:  # side by side, or but one
            return _split(activation.narrow(-1, start, features), -1, self.d_head)
        if activation.shape[-1] * self.d_head == stride * features and start < stride:
            return _split(activation, -1, stride).narrow(-1, start, self.d_head)
        index = self.index.to(activation.device)
        return _split(activation.index_select(-1, index), -1, self.d_head)

    @functools.cached_property
    def _layout(self) -> tuple[int, int]:
        """Where the first head starts, and how far on the next; -1 where there is no rule to it."""
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


def divided(component: Any, attention: nn.Module, d_head: int) -> list[Heads]:
    """Tell how the outputs of a joint projection are queries, keys and values; see the note above.

    Args:
        component: The adapter's part for the attention.
        attention: The attention, as Hugging Face has it.
        d_head: The size of a head.

    Raises:
        ValueError: What the adapter gives is no division of the outputs. It raises other errors
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
        labelled = copy.copy(attention)
        labelled._modules = {**attention._modules, name: _bare(weight.clone(), numbers)}
        parts = [part.weight[:, 0].detach() for part in component.split_qkv_matrix(labelled)]
    _check(parts, numbers, d_head)
    return [Heads(d_head, part.long()) for part in parts]


def _unwrapped(projection: nn.Module) -> nn.Module:
    """Return the projection that layers of PEFT's hold, which says how its weights lie."""
    while isinstance(inner := getattr(projection, "base_layer", None), nn.Module):
        projection = inner
    return projection


def _bare(weight: Float[Tensor, "..."], bias: Float[Tensor, " outputs"]) -> nn.Module:
    """Make a module with these alone: the real one may compute its weights, or wrap others."""
    module = nn.Module()
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    return module


def _of_falcon(attention: Any, numbers: Float[Tensor, " outputs"]) -> list[Float[Tensor, " _"]]:
    """Divide as Falcon's newer decoders do themselves: each group has its queries, key and value.

    TransformerLens' adapter takes all queries to come first. The method of the model repeats a key
    for all queries of its group.
    """
    parts = attention._split_heads(numbers[None, None])
    return [torch.tensor([*dict.fromkeys(part.flatten().tolist())]) for part in parts]


def _check(
    parts: list[Float[Tensor, " _"]], numbers: Float[Tensor, " outputs"], d_head: int
) -> None:
    given = torch.cat(parts).tolist()
    are_outputs = len({*given} & {*numbers.tolist()}) == len(given)
    if not are_outputs or any(len(part) % d_head for part in parts):
        raise ValueError("what it gives is no division of the outputs into heads")
