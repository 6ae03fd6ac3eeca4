"""Find out whether a model counts padding on the left as positions.

# NOTE [How this is detected]
For models with rotary or relative positions it does not matter where a sequence begins. For models
that add a row of a table for each position it does, unless they number positions by the mask, as
OPT does, or by the ids, as RoBERTa does. No list can cover all models, so this is checked while the
model runs: tables that may hold positions are hooked. If the mask of a forward has zeros on the
left, and a table yields the same rows for sequences with different padding, then the table has
counted the padding.

# NOTE [What is not seen]
Tables that are not modules, such as CTRL's, are recognized by their name and width. An embedding
whose weight is read, and that is not called, is recognized by the source of the forward. Positions
that a forward computes itself are not seen.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from actctx._model.sides import core_of, in_towers

_KIND = re.compile("Pos(ition(al)?)?_?Emb")
_NAME = re.compile("pos|wpe")
_BARE = re.compile(
    "(^|_)(pe|wpe|penc|pos|position(s|al)?|sin(e|usoid)?_tab(le)?|sinusoid[a-z]*|timing)(_|$)"
    "|(^|_)pos(ition(al)?)?s?_?(emb|enc|tab)[a-z]*$"
    "|^P$"
)


def tables_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the modules that may be tables of positions, by name."""
    core = core_of(model)
    tokens, vocabulary = _tokens(core), getattr(getattr(core, "config", None), "vocab_size", None)
    for name, module in core.named_modules():
        called = f"{name} {type(module).__name__}"
        if "rotary" in called.lower() or module is tokens:
            continue
        is_named = _NAME.search(name) if isinstance(module, nn.Embedding) else _KIND.search(called)
        size = getattr(module, "num_embeddings", vocabulary)
        is_small = vocabulary is not None and size != vocabulary
        if is_named or (isinstance(module, nn.Embedding) and is_small):
            yield name, module


def has_bare_table(model: nn.Module) -> bool:
    """Return whether a model has a table of absolute positions that is not a module."""
    core, beside = core_of(model), in_towers(core_of(model))
    widths = widths_of(model) or {
        module.embedding_dim for module in core.modules() if isinstance(module, nn.Embedding)
    }
    if any(map(_reads_table, core.modules())):
        return True
    looked_at = {id(module) for _, module in tables_of(model)}  # what they yield is checked
    return any(
        _BARE.search(name)
        and "rel" not in name.lower()
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dim() in {2, 3}
        and tensor.shape[-1] in widths
        for module in core.modules()
        if id(module) not in beside | looked_at and not isinstance(module, nn.Embedding)
        if "Rel" not in type(module).__name__
        for name, tensor in {**vars(module), **module._parameters, **module._buffers}.items()
    )


def _reads_table(module: nn.Module) -> bool:
    """Return whether a module reads the weight of a table of positions instead of calling it."""
    return any(
        isinstance(child, nn.Embedding)
        and _NAME.search(name)
        and f"{name}.weight" in _source(type(module).forward)
        for name, child in module.named_children()
    )


@functools.lru_cache
def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def widths_of(model: nn.Module) -> set[int]:
    """Return the possible widths of position embeddings, an empty set if the model does not say."""
    core = core_of(model)
    configs = [getattr(core, name, None) for name in ("config", "cfg")]
    names = ("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "dim")
    sizes = {getattr(config, name, None) for config in configs for name in names}
    sizes.add(getattr(_tokens(core), "embedding_dim", None))
    return {size for size in sizes if isinstance(size, int)}


def is_padded_left(mask: Bool[Tensor, "batch pos"]) -> bool:
    """Return whether a sequence starts with padding that is followed by a real token."""
    return bool((~mask[:, 0] & mask.any(1)).any()) if mask.shape[1] else False


def counts_padding(
    looked_up: Shaped[Tensor, "..."], mask: Bool[Tensor, "batch pos"], widths: set[int]
) -> bool:
    """Return whether the output of a table shows that padding on the left was counted.

    Args:
        looked_up: The output of the table in a forward.
        mask: The mask of that forward, with padding on the left.
        widths: The possible widths of the table's rows, as far as they are known.

    """
    batch, pos = mask.shape
    shape = tuple(looked_up.shape)
    if len(shape) < 2 or shape[-2] != pos or (widths and shape[-1] not in widths):  # noqa: PLR2004
        return False
    table = looked_up.detach().reshape(-1, pos, shape[-1])
    begins = torch.where(mask.any(1), mask.int().argmax(1), -1)  # of what is real
    longest = int(begins.argmax())
    padding = int(begins[longest])
    if len(table) not in {1, batch} or not _is_numbered(table[longest % len(table), padding:]):
        return False
    if len(table) < batch:
        return True
    for row, begin in enumerate(begins.tolist()):
        both = mask[row] & mask[longest]
        if 0 <= begin < padding and both.any():
            both = both.to(table.device)
            return torch.equal(table[row][both], table[longest][both])
    # All sequences are padded alike: then the padding has one position, or its own positions.
    return padding > 1 and _is_numbered(table[longest, :padding])


def _is_numbered(rows: Shaped[Tensor, "pos width"]) -> bool:
    """Return whether neighbouring rows differ, as those of token types do not."""
    return len(rows) > 1 and bool((rows[1:] != rows[:-1]).any(1).all())


def _tokens(core: nn.Module) -> nn.Module | None:
    get = getattr(core, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
