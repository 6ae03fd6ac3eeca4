"""What a model says about itself: the wrapped model, its context length and its vocabulary."""

import inspect
from typing import Any

from torch import nn


def is_hugging_face(model: Any) -> bool:
    """Return whether a model is from transformers, whose forwards name all of their arguments."""
    return isinstance(getattr(getattr(model, "config", None), "model_type", None), str)


def is_hooked(model: Any) -> bool:
    """Return whether it is a TransformerLens model, or wraps one, which handles its own cache."""
    while model is not None:
        if hasattr(model, "hook_dict"):
            return True
        model = within(model)
    return False


def takes_anything(model: Any) -> bool:
    """Return whether a forward takes arguments by any name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


def innermost(model: Any) -> Any:
    """Find the model inside wrappers that pass on their arguments."""
    while (inner := within(model)) is not None:
        model = inner
    return model


def within(model: Any) -> nn.Module | None:
    """Find the model that a wrapper passes its arguments on to."""
    if hasattr(model, "get_base_model"):  # PEFT
        found: nn.Module = model.get_base_model()
        return found
    for name in ("original_model", "_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return inner
    return _only_child(model)


def _only_child(model: Any) -> nn.Module | None:
    """Find the only child of a module whose forward takes `*args, **kwargs`, and no names."""
    if not isinstance(model, nn.Module):
        return None
    kinds = [each.kind for each in inspect.signature(model.forward).parameters.values()]
    children = [*model.children()]
    takes_all = kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
    return children[0] if takes_all and len(children) == 1 else None


def context_length(model: Any) -> int | None:
    """Return the context length that a model states; None if it does not."""
    lens, hugging = getattr(model, "cfg", None), getattr(model, "config", None)
    sizes = [getattr(lens, "n_ctx", None), getattr(hugging, "max_position_embeddings", None)]
    if isinstance(model, nn.Module):
        sizes = [*_numbered_behind_padding(model)[:1], *sizes]
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _numbered_behind_padding(model: nn.Module) -> list[int]:
    """Return the positions of models like RoBERTa, which are numbered after the padding index."""
    return [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    ]


def vocabulary_size(model: Any) -> int | None:
    """Return the number of token ids of a model; None if unknown."""
    inner = innermost(model)
    # It may differ from the config's vocabulary: some models were given more tokens.
    try:
        size = inner.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        size = getattr(getattr(model, "cfg", None), "d_vocab", None)
    return size if isinstance(size, int) and size > 0 else None
