"""Warn of models that are known to compute something other than expected.

Most are bridges. A capture records what they compute, so it warns. Each fault of a bridge lists the
versions in which it was observed; later versions are assumed to be fixed.
"""

import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

_WRONG_UP_TO = (4, 3)  # TransformerLens
_LIBRARIES = (
    "actctx",
    "torch",
    "transformers",
    "transformer_lens",
    "contextlib",
    "jaxtyping",
    "beartype",
)
_CACHES = ("past_key_values", "cache")  # names of the argument, in old and new versions


def faults_of(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Explain what is wrong with a bridge for any input.

    Args:
        model: The model that is captured.
        names: The names of the captured places.

    """
    config = _bridged_config(model, "falcon", "switch_transformers")
    kind = getattr(config, "model_type", None)
    if kind == "falcon" and _mixes_heads(config):
        yield (
            f"{_lens()} splits the queries, keys and values of Falcon's new decoder wrongly if "
            "there are several key heads, so the bridge computes other values than the model, and "
            "captures are wrong; capture from the Hugging Face model itself"
        )
    patterns = [name for name in names if name.endswith("hook_pattern")]
    if kind == "switch_transformers" and patterns:
        yield (
            f"{patterns[0]!r} is the position bias instead of the attention pattern, since "
            f"{_lens()} takes the wrong output of Switch's attention; capture the pattern from the "
            "Hugging Face model, as the output 2 of its attention module"
        )


def mask_fault(model: nn.Module) -> str | None:
    """Explain what is wrong with a bridge whose forward is given a mask; None if nothing is."""
    if _bridged_config(model, "openai-gpt") is None:
        return None
    return (
        f"{_lens()} lets the tokens of OpenAI GPT attend to later ones if a forward is given an "
        "attention_mask, even one without padding, so captures are wrong; run sequences of one "
        "length without a mask, or capture from the Hugging Face model itself"
    )


def decoder_fault(core: nn.Module, given: Mapping[str, Any]) -> str | None:
    """Explain what is wrong with the decoder of a plain model; None if nothing is.

    Args:
        core: The model.
        given: What its forward is given.

    """
    config = getattr(core, "config", None)
    if getattr(config, "model_type", None) != "fsmt":
        return None
    tokens, asked = given.get("decoder_input_ids"), given.get("use_cache")
    is_single = isinstance(tokens, Tensor) and tokens.shape[-1] == 1
    makes_own = given.get("labels") is not None or tokens is None
    caches = not makes_own and (getattr(config, "use_cache", True) if asked is None else asked)
    if is_single or (not caches and given.get("input_ids") is not None):
        return None
    return (
        "the decoder of FSMT attends to all tokens, including padding and later ones, unless it is "
        "given input_ids and use_cache=False, so the activations differ from those of the "
        "sequences alone; pass both"
    )


def right_padding_fault(core: nn.Module, mask: Bool[Tensor, "batch pos"]) -> str | None:
    """Explain what is wrong with a plain model that is padded on the right; None if nothing is."""
    kind = getattr(getattr(core, "config", None), "model_type", None)
    if kind != "cpmant" or not mask.shape[1] or bool(mask[:, -1].all()):
        return None
    return (
        "CPM-Ant assumes padding on the left, whatever the attention_mask says, so the activations "
        "of sequences that are padded on the right differ from those of the sequences alone; pad "
        "on the left with id 0"
    )


def is_given_cache(given: Mapping[str, Any]) -> bool:
    """Return whether a forward is given a KV cache."""
    return any(given.get(name) is not None for name in _CACHES)


def lost_cache(model: nn.Module) -> str | None:
    """Say that a forward loses the KV cache that it is given; None if it does not.

    Transformers 5.24 renamed the argument that passes a cache to attention layers. Bridges that
    compute the attention themselves still look for the old name.
    """
    if not _loses_caches(model):
        return None
    return (
        f"{_lens()} loses the KV cache of this model with transformers {version('transformers')}: "
        "a forward that is given one sees only its own positions, and captures are wrong from the "
        "second forward on; install 'transformers<5.24', or generate without a cache, with "
        "use_past_kv_cache=False or use_cache=False"
    )


def _lens() -> str:
    return f"TransformerLens {version('transformer_lens')}"


def _is_old() -> bool:
    """Return whether the installed TransformerLens is known to be wrong."""
    parts = version("transformer_lens").split(".")[:2]
    return tuple(int(part) for part in parts if part.isdecimal()) <= _WRONG_UP_TO


def _bridged_config(model: nn.Module, *kinds: str) -> Any:
    """Find the config of a model of some kinds in a bridge that may be wrong, or None."""
    inner = getattr(model, "original_model", None)
    config = getattr(inner, "config", None) if isinstance(inner, nn.Module) else None
    # The version comes last, since looking it up takes as long as a block around a small forward.
    is_one = getattr(config, "model_type", None) in kinds and _is_old()
    return config if is_one else None


def _mixes_heads(config: Any) -> bool:
    heads = config.num_attention_heads if config.num_kv_heads is None else config.num_kv_heads
    return bool(config.new_decoder_architecture and not config.multi_query and heads != 1)


def _loses_caches(model: nn.Module) -> bool:
    return any(map(_looks_for_another, model.modules())) and _is_old()


def _looks_for_another(module: nn.Module) -> bool:
    """Return whether a part of a bridge computes attention with the old name of the cache."""
    kind = type(module)
    if not kind.__module__.startswith("transformer_lens.") or not _computes_itself(kind):
        return False
    inner = getattr(module, "original_component", None)
    return (
        isinstance(inner, nn.Module)
        and "cache" in inspect.signature(type(inner).forward).parameters
    )


def _computes_itself(kind: type[nn.Module]) -> bool:
    names = [base.__name__ for base in kind.__mro__]
    # The plain bridge calls the layer that it wraps with all arguments.
    return names[0] == "T5BlockBridge" or "AttentionBridge" in names[1:]


def warn(*faults: str | None) -> None:
    """Warn of a fault, if there is one, at the user's line that runs the model."""
    for fault in filter(None, faults):
        frame, depth = sys._getframe(), 1
        while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
            frame, depth = frame.f_back, depth + 1
        warnings.warn(fault, stacklevel=depth)


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES
