"""The flags of TransformerLens' configs that switch hook points on and off."""

import re
import warnings
from collections.abc import Iterable

from torch import nn

from actctx._model.places import Place

# Hook points that TransformerLens skips unless a flag of its config is set.
_FLAGS = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
}
# The attribute by which a component of a bridge says whether it supports a flag.
_SUPPORT = {
    "use_attn_result": "supports_attn_result",
    "use_split_qkv_input": "supports_split_qkv_fork",
    "use_attn_in": "supports_split_qkv_fork",
}
_EXCLUDES = {"use_split_qkv_input": "use_attn_in", "use_attn_in": "use_split_qkv_input"}
# What to capture instead of a hook point that cannot be switched on, and how the two are related.
_INSTEAD = {
    "use_attn_result": ("attn.hook_z", "whose product with its part of W_O is each head's result"),
    "use_split_qkv_input": ("hook_resid_pre", "of which it would be a copy"),
    "use_attn_in": ("hook_resid_pre", "of which it would be a copy"),
    "use_hook_mlp_in": ("mlp.hook_in", "which is what the MLP is given"),
}


def is_switched_off(model: nn.Module, place: Place) -> bool:
    """Return whether a hook point cannot fire as the model is set up."""
    flag = _flag_of(place)
    return flag is not None and not getattr(getattr(model, "cfg", None), flag, True)


def why_it_never_fires(model: nn.Module, place: Place) -> str | None:
    """Explain why a hook point cannot fire as the model is set up, and how to change that."""
    flag = _flag_of(place)
    if flag is None or not is_switched_off(model, place):
        return None
    lacks = _why_it_stays_off(model, place, flag)
    if lacks:
        return f"{flag} is off, and {lacks}{_instead_of(place, flag)}"
    if not hasattr(model, f"set_{flag}"):
        return f"{flag} is off: set model.cfg.{flag} = True first"
    other = _EXCLUDES.get(flag, "")
    if _is_bridge(model) and getattr(model.cfg, other, False):
        return f"{flag} is off: call model.set_{other}(False), then model.set_{flag}(True) first"
    return f"{flag} is off: call model.set_{flag}(True) first"


def why_it_never_fired(model: nn.Module, place: Place) -> str | None:
    """Explain why a hook point has not fired, if a flag has to do with it."""
    flag = _flag_of(place)
    if flag is None or is_switched_off(model, place) or not hasattr(model, "cfg"):
        return why_it_never_fires(model, place)
    return (
        f"{flag} is on, but TransformerLens does not compute it for this architecture"
        f"{_instead_of(place, flag)}"
    )


def is_repeated(model: nn.Module, place: Place) -> bool:
    """Return whether a hook point fires several times a forward with the same values.

    `HookedTransformer` norms the inputs of queries, keys and values separately, although they are
    the same tensor unless `use_split_qkv_input` makes copies.
    """
    is_of_norm = place.is_hook_point and ".ln1.hook_" in place.name
    splits = getattr(getattr(model, "cfg", None), "use_split_qkv_input", True)
    return is_of_norm and not splits and not _is_bridge(model)


def flags_of(places: Iterable[Place]) -> set[str]:
    """Name the settings that may have to change so that some places fire."""
    has_flag = any(_flag_of(place) is not None for place in places)
    return {f"cfg.{flag}" for flag in _FLAGS.values()} if has_flag else set()


def _flag_of(place: Place) -> str | None:
    if not place.is_hook_point:
        return None
    return next((flag for ending, flag in _FLAGS.items() if place.name.endswith(ending)), None)


def _is_bridge(model: nn.Module) -> bool:
    return hasattr(model, "original_model")


def _why_it_stays_off(model: nn.Module, place: Place, flag: str) -> str:
    """Explain why a model cannot switch a flag on, or why that would not change anything."""
    if not _is_bridge(model):
        return _why_hooked_cannot(model, flag)
    if flag in _SUPPORT and _is_refused(model, flag):
        return "this architecture's bridge cannot switch it on"
    name = _block_of(place)
    if not name.startswith("blocks."):
        return "a bridge switches it on only in its 'blocks'"
    if flag in _SUPPORT:
        attention = _submodule(model, f"{name}.attn")
        return "" if getattr(attention, _SUPPORT[flag], True) else "this layer cannot switch it on"
    block = _submodule(model, name)
    is_there = "ln2" in getattr(block, "submodules", {"ln2": None})
    is_there |= getattr(block, "mlp_reads_resid_directly", False)
    return "" if is_there else "its blocks have no norm of their own before the MLP"


def _why_hooked_cannot(model: nn.Module, flag: str) -> str:
    """Explain why a model of TransformerLens 2 or 3 cannot switch a flag on."""
    if flag == "use_attn_in" and getattr(model.cfg, "n_key_value_heads", None):
        return "TransformerLens has it only for models without grouped queries"
    if flag in _EXCLUDES and hasattr(model, "encoder") and hasattr(model, "decoder"):
        return "TransformerLens' encoder-decoders do not run with it"
    if flag == "use_hook_mlp_in" and getattr(model.cfg, "attn_only", False):
        return "this model has no MLP"
    return ""


def _is_refused(model: nn.Module, flag: str) -> bool:
    """Return whether a bridge raises when a flag is switched on, or in the next forward."""
    if flag != "use_attn_result" and getattr(model.cfg, "gated_q_proj", False):
        return True
    validate = getattr(model, "_validate_attention_fork_supported", None)
    if validate is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that cannot, although others can
        try:
            validate(flag)
        except NotImplementedError:
            return True
    return False


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _block_of(place: Place) -> str:
    found = re.match(r"(.*?\.\d+)\.", place.name)
    return "" if found is None else found[1]


def _instead_of(place: Place, flag: str) -> str:
    name, told = _INSTEAD[flag]
    other = f"{_block_of(place)}.{name}"
    return f"; capture {other!r}, {told}" if other in place.siblings else ""
