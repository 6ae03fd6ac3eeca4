"""The named axes of TransformerLens' hook points, and their sizes in a model's config.

The names follow TransformerLens' documentation of its hook points: `batch pos d_model` for the
residual stream, `batch pos head d_head` for queries and the attention's output per head,
`batch head query key` for attention patterns. A size-one axis is written `1`, as in jaxtyping.
"""

import functools
import re
from collections.abc import Container, Mapping
from typing import Any

from torch import nn

Axes = tuple[str, ...]

Growth = tuple[frozenset[str], ...]
"""What each axis of an activation grows with.

`"batch"` for sequences; `"rows"` for items that come several times per sequence, such as tokens or
heads; `"pos"` for positions; `"target"` for the positions of a decoder in an encoder-decoder.
"""

POSITIONS = frozenset({"pos", "query", "key"})
"""The names of axes that grow with the positions."""

# The end of a canonical or `HookedTransformer` hook name, and its axes: the first match wins.
_RULES: tuple[tuple[re.Pattern[str], Axes], ...] = tuple(
    (re.compile(rf"(?:^|\.)(?:{names})$"), tuple(axes.split()))
    for names, axes in (
        (r"hook_(?:cross_)?pattern|hook_attn_scores", "batch head query key"),
        (r"hook_q|hook_z|hook_rot_q|q\.hook_out|o\.hook_in", "batch pos head d_head"),
        (r"hook_q_normed|q_norm\.hook_(?:in|out|normalized)", "batch head pos d_head"),
        (r"q_norm\.hook_scale", "batch head pos 1"),
        (
            r"hook_k_normed|k_norm\.hook_(?:in|out|normalized)",
            "batch kv_head pos d_head",
        ),
        (r"k_norm\.hook_scale", "batch kv_head pos 1"),
        (r"hook_[kv]|hook_rot_k|[kv]\.hook_out", "batch pos kv_head d_head"),
        (r"hook_result|hook_q_input|hook_attn_in", "batch pos head d_model"),
        (r"hook_[kv]_input", "batch pos kv_head d_model"),
        (r"hook_(?:cos|sin)", "batch pos d_rotary"),
        (r"mlp\.ln\.hook_normalized|mlp\.hook_mid", "batch pos d_mlp"),
        (r"hook_scale", "batch pos 1"),
        (r"experts\.\d+\.hook_(?:gate|pre|post)", "token d_mlp"),
        (
            r"mlp\.hook_(?:pre|post|pre_linear)|mlp\.(?:in|gate)\.hook_out|mlp\.out\.hook_in",
            "batch pos d_mlp",
        ),
        (r"hook_tokens|(?:token_type_|pos_)?embed\.hook_in", "batch pos"),
        (r"hook_unembed|unembed\.hook_out", "batch pos d_vocab"),
        (
            r"hook_(?:embed|pos_embed|token_type_embed|full_embed|normalized|hidden_states)",
            "batch pos d_model",
        ),
        (
            r"hook_(?:resid_(?:pre|mid|mid2|mid_cross|post)|normalized_resid_post)",
            "batch pos d_model",
        ),
        (r"hook_(?:cross_)?attn_out|hook_mlp_in|hook_mlp_out", "batch pos d_model"),
        (
            r"(?:\w*embed|\w*ln\w*|mlm_head|rotary_emb|\w*attn|mlp|unembed)\.hook_(?:in|out)",
            "batch pos d_model",
        ),
        (
            r"(?:q|k|v|qkv|in|gate)\.hook_in|(?:o|out)\.hook_out|\w*blocks\.\d+\.hook_(?:in|out)",
            "batch pos d_model",
        ),
    )
)

AXIS_NAMES = frozenset(
    {"token", "layer", "expert", "choice", *(axis for _, axes in _RULES for axis in axes)}
)
"""Every name that an axis of a hook point, or of a stack of them, can have."""

# A mixture of experts routes tokens, not sequences: its router's hooks have one row per token.
_ROUTER = {
    "hook_in": ("token", "d_model"),
    "hook_out": ("token", "expert"),
    "hook_expert_weights": ("token", "expert"),
    "hook_expert_indices": ("token", "choice"),
}
ROUTER_AXES = frozenset(_ROUTER.values())
"""The axes of an activation with one row per token, in order."""

# T5's relative position bias.
_BIAS = {"hook_in": ("query", "key"), "hook_out": ("query", "key", "head")}


# The parts of hook names in the order in which they run: of a model, of a block, of its components.
_PARTS = (
    "hook_tokens embed hook_embed token_type_embed pos_embed hook_pos_embed hook_full_embed "
    "embed_ln rotary_emb encoder_blocks encoder_ln_final decoder_pos_embed decoder_blocks "
    "decoder_ln_final blocks "
    "hook_in hook_resid_pre hook_attn_in hook_q_input hook_k_input hook_v_input ln1 attn self_attn "
    "qkv q k v hook_q hook_k hook_v q_norm hook_q_normed k_norm hook_k_normed "
    "hook_cos hook_sin hook_rot_q hook_rot_k hook_attn_scores hook_pattern "
    "o hook_z hook_result hook_hidden_states "
    "ln1_post hook_attn_out hook_resid_mid ln2 cross_attn hook_cross_attn_out hook_resid_mid2 "
    "hook_resid_mid_cross ln3 "
    "hook_mlp_in mlp gate hook_gate hook_pre in hook_pre_linear hook_mid ln out hook_post "
    "hook_scale hook_normalized "
    "ln2_post hook_mlp_out hook_out hook_expert_weights hook_expert_indices "
    "hook_resid_post hook_normalized_resid_post "
    "mlm_head ln_final unembed hook_unembed"
)
_ORDER = {part: rank for rank, part in enumerate(_PARTS.split())}


def running_order(name: str) -> tuple[int, ...]:
    """Rank a hook point's name by when it runs in a pre-norm block.

    Unknown parts come last in their component.
    """
    return tuple(
        int(part) if part.isdecimal() else _ORDER.get(part, len(_ORDER)) for part in name.split(".")
    )


def hook_axes(name: str, siblings: Container[str], pos_dim: int | None = None) -> Axes | None:
    """Name the axes of a hook point.

    Args:
        name: The canonical name of the hook point, such as `blocks.0.attn.q.hook_out`.
        siblings: All hook names of the model. Some names mean different things in different
            architectures, and the other names decide which.
        pos_dim: The axis that holds the position, where the model declares it
            (`HookPoint.pos_dim` of TransformerLens 4.3).

    Returns:
        The axes of an activation with its batch axis, or None where they are not known.

    """
    parent, _, leaf = name.rpartition(".")
    mlp = parent.removesuffix(".gate")
    routes = {f"{parent}.hook_expert_weights", f"{mlp}.hook_router_scores"}
    if leaf.startswith("hook_expert_") or (mlp != parent and any(n in siblings for n in routes)):
        return _ROUTER.get(leaf)
    if parent in {"pos_embed", "decoder_pos_embed"} and "encoder_blocks.0.hook_in" in siblings:
        return _BIAS.get(leaf)
    axes = _usual_axes(name)
    if axes is None or pos_dim is None or "pos" not in axes:
        return axes
    dim = pos_dim % len(axes) if pos_dim < 0 else pos_dim
    return axes if axes.index("pos") == dim else _with_pos_at(dim, axes)


@functools.lru_cache(maxsize=2**14)
def _usual_axes(name: str) -> Axes | None:
    return next((axes for pattern, axes in _RULES if pattern.search(name)), None)


def _with_pos_at(dim: int, axes: Axes) -> Axes | None:
    """Move `pos` to where the model says that it is, as in a norm of the queries of each head."""
    rest = [axis for axis in axes if axis != "pos"]
    if not 0 <= dim <= len(rest):
        return None
    rest.insert(dim, "pos")
    return tuple(rest)


def ungrouped(axes: Axes | None) -> Axes | None:
    """Name the axes if `ungroup_grouped_query_attention` repeats keys and values for each head."""
    return axes and tuple("head" if axis == "kv_head" else axis for axis in axes)


def fired_axes(name: str, axes: Axes | None, rank: int) -> Axes | None:
    """Propose the axes of an activation of this rank, given the `axes` of its hook point.

    OPT's MLP works on flattened sequences, so what is `batch pos ...` elsewhere has one row per
    token there. TransformerLens 3 norms the inputs of attention head by head if it splits them.

    Returns:
        The axes, or None if there is nothing to propose.

    """
    if axes is not None and len(axes) == rank:
        return axes
    if axes is not None and len(axes) == rank + 1 and axes[:2] == ("batch", "pos"):
        return ("token", *axes[2:])
    if axes is not None and len(axes) == rank - 1 and name.rpartition(".")[0].endswith("ln1"):
        return (*axes[:2], "head", *axes[2:])
    return None


def are_the_only(
    axes: Axes, shape: tuple[int, ...], batch: int | None, positions: Container[int]
) -> bool:
    """Return whether the sizes of a forward leave no other axes than the proposed ones.

    Args:
        axes: The axes that a name proposes.
        shape: The shape of the activation.
        batch: The number of sequences that the forward was given, if known.
        positions: The numbers of positions that it was given: one, or an encoder's and a decoder's.

    """
    named = [*zip(axes, shape, strict=True)]
    along = [
        dim for dim, (axis, size) in enumerate(named) if axis in POSITIONS or size in positions
    ]
    rows = [dim for dim, (axis, size) in enumerate(named) if axis == "batch" or size == batch]
    # A key is longer than the positions of the forward where there is a cache.
    are_along = all(
        named[dim][0] in POSITIONS and (named[dim][1] in positions or named[dim][0] == "key")
        for dim in along
    )
    are_rows = all(named[dim][0] in {"batch", "1"} and named[dim][1] == batch for dim in rows)
    return bool(along) and are_along and are_rows and "token" not in axes


def grown_axes(growth: Growth, proposed: Axes | None, shape: tuple[int, ...]) -> Axes | None:
    """Name the axes of an activation by what they grow with.

    Args:
        growth: What each axis grows with.
        proposed: The axes that the name proposes, however many; they name the axes that do not
            grow, in order.
        shape: The shape of the activation.

    Returns:
        The axes, `"_"` for unnamed ones; None if more of them grow than can be distinguished.

    """
    if len(growth) != len(shape):
        return None
    named: list[str | None] = [_grown_axis(each) for each in growth]
    along = [dim for dim, name in enumerate(named) if name == "pos"]
    if len(along) > 2 or named.count("batch") + named.count("token") > 1:  # noqa: PLR2004
        return None
    proposed = _fitting(proposed, named, shape)
    alike = proposed if proposed is not None and len(proposed) == len(growth) else None
    for dim, name in zip(along, _along(growth, along, alike), strict=True):
        named[dim] = name
    if alike is not None and "batch" in alike and "batch" not in named:
        named[alike.index("batch")] = "batch"  # broadcast over the sequences
    left = [dim for dim, name in enumerate(named) if name is None]
    rest = [axis for axis in proposed or () if axis not in {"batch", "token", *POSITIONS}]
    if len(rest) <= len(left):
        for dim, axis in zip(reversed(left), reversed(rest), strict=False):
            named[dim] = axis
    return tuple(name or "_" for name in named)


def position_dims(axes: Axes) -> list[int]:
    """List the axes that a slice along `pos` selects from; keys are not among them."""
    return [dim for dim, axis in enumerate(axes) if axis in {"pos", "query"}]


def _fitting(proposed: Axes | None, grown: list[str | None], shape: tuple[int, ...]) -> Axes | None:
    """Return the proposed axes, unless as many of them do not grow as the model says."""
    if proposed is None or sum(axis in POSITIONS for axis in proposed) != grown.count("pos"):
        return None
    if "token" in proposed:
        return proposed if "token" in grown else None
    if "batch" not in proposed or "batch" in grown:
        return proposed
    dim = proposed.index("batch")
    is_broadcast = len(proposed) == len(shape) and grown[dim] is None and shape[dim] == 1
    return proposed if is_broadcast and "token" not in grown else None


def _grown_axis(grows: frozenset[str]) -> str | None:
    """Name an axis by what it grows with; None for one that does not grow."""
    if not grows:
        return None
    if grows == {"batch"}:
        return "batch"
    if "batch" in grows or grows == {"rows"}:
        return "_"
    return "token" if "rows" in grows else "pos"


def _along(growth: Growth, along: list[int], proposed: Axes | None) -> list[str]:
    """Name the axes that grow with the positions: one, or a query and its keys."""
    names = [proposed[dim] for dim in along] if proposed is not None else []
    if len(along) == 1:
        return names if {*names} <= POSITIONS and names else ["pos"]
    if {*names} == {"query", "key"} or not along:
        return names
    crosses = growth[along[0]] != growth[along[1]] and "target" in growth[along[1]]
    return ["key", "query"] if crosses else ["query", "key"]


def axis_sizes(model: nn.Module) -> Mapping[str, int]:
    """Read the sizes that a model's config fixes, such as `{"d_model": 768, "head": 12}`.

    The config is TransformerLens' (`model.cfg`), or else Hugging Face's (`model.config`). For OPT
    and T5, a bridge's config always says that `d_mlp` is four times `d_model`, so this size is read
    from the Hugging Face config that the bridge wraps. Sizes that differ within the model are left
    out: that of a head with latent attention, and the number of layers if an encoder and a decoder
    differ.

    Returns:
        The known sizes in elements; empty for a model without such a config.

    """
    lens = getattr(model, "cfg", None)
    hugging = _text_config(hugging_face_config(model))
    found = {
        "d_model": _first(lens, "d_model") or _first(hugging, "hidden_size"),
        "d_head": _first(lens, "d_head") or _first(hugging, "head_dim"),
        "head": _first(lens, "n_heads") or _first(hugging, "num_attention_heads"),
        "d_mlp": _first(hugging, "ffn_dim", "d_ff")
        or _first(lens, "d_mlp")
        or _first(hugging, "intermediate_size"),
        "d_vocab": _first(lens, "d_vocab_out", "d_vocab") or _first(hugging, "vocab_size"),
        "layer": _first(lens, "n_layers") or _first(hugging, "num_hidden_layers"),
    }
    grouped = _first(lens, "n_key_value_heads") or _first(hugging, "num_key_value_heads")
    # Falcon's configs give the number, or say that all heads share one.
    if _value(hugging, "new_decoder_architecture"):
        grouped = _first(hugging, "num_kv_heads")
    elif _value(hugging, "multi_query"):
        grouped = 1
    found["kv_head"] = grouped or found["head"]
    if not found["d_head"] and found["d_model"] and found["head"]:
        found["d_head"] = found["d_model"] // found["head"]
    if _first(hugging, "v_head_dim", "kv_lora_rank"):
        found["d_head"] = None
    if _first(hugging, "num_decoder_layers") not in {None, found["layer"]}:
        found["layer"] = None
    return {axis: size for axis, size in found.items() if size}


def _text_config(config: Any) -> object:
    """Return the config of the language model, if one config contains those of several parts."""
    if _first(config, "hidden_size", "n_embd", "d_model") or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config()


def hugging_face_config(model: nn.Module) -> object:
    """Find Hugging Face's config of a model, or of the one that a bridge wraps; None for none."""
    return getattr(getattr(model, "original_model", model), "config", None)


def _first(config: object, *names: str) -> int | None:
    """Return the first size that a config has under one of these names."""
    sizes = (_value(config, name) for name in names)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _value(config: object, name: str) -> object:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001  a config whose layers differ may refuse to name one value
        return None
