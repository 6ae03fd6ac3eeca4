"""Settle how an input is read for a model: its tokenizer and the arguments of its forward."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sized
from importlib.metadata import version
from typing import Any

from torch import nn

from actctx._capture.given_masks import MASKS
from actctx._errors import OptionError
from actctx._extract.inputs import Reader
from actctx._extract.items import TOKENS
from actctx._model.config import (
    context_length,
    innermost,
    is_hooked,
    is_hugging_face,
    takes_anything,
    vocabulary_size,
    within,
)
from actctx._model.known_faults import mask_fault
from actctx._store.indexing import whole_number
from actctx._text import counted, is_utf8

_USUAL = frozenset(
    {
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "decoder_input_ids",
        "decoder_attention_mask",
    }
)
"""What is passed on to a forward that takes anything and does not say what, if the input has it."""

_NOT_GIVEN = {*TOKENS, "labels"}
"""The tokens, which are given first, and what only a loss needs."""

_NOT_IN_COLUMNS = "./`"

_OF_BOS = ("default_prepend_bos", "tokenizer_prepends_bos")
"""What decides, in the config of a model of TransformerLens, where `to_tokens` puts a BOS token."""


def reader_of(
    model: Any,
    *,
    tokenizer: Any,
    batch_size: int,
    context: int | None,
    pack: bool,
    carry: tuple[str, ...],
    mask: str | None,
    equal_lengths: bool = False,
) -> Reader:
    """Settle how an input is read for a model; see `actctx.extract.extract`.

    Raises:
        OptionError: An option is not a positive number, or the context is too long for the model,
            or the model yields other activations each time.

    """
    batch_size = whole_number("batch_size", batch_size, least=1)
    if context is not None:
        context = whole_number("context", context, least=1)
    if tokenizer is not None and not callable(tokenizer):
        raise OptionError(
            f"tokenizer={tokenizer!r} cannot be called; give one that takes texts, such as "
            "AutoTokenizer.from_pretrained(...)"
        )
    if mask is not None and not isinstance(mask, str):
        raise OptionError(
            f"mask={mask!r} is not a valid mask for a data set; give 'attention', the name of what "
            "holds one in each dict of data, or None"
        )
    for name in carry:
        if (
            not isinstance(name, str)
            or not name
            or not is_utf8(name)
            or set(name) & set(_NOT_IN_COLUMNS)
        ):
            raise OptionError(
                f"carry names {name!r}, which cannot be the name of a column; rename it to a "
                f"string without {' '.join(_NOT_IN_COLUMNS)}"
            )
    limit = context_length(model)
    if context is not None and limit is not None and context > limit:
        raise OptionError(
            f"context={context} is more than the {limit} tokens that the model reads; give {limit} "
            "or less"
        )
    _check_is_settled(model)
    using, tokenize, identify = _tokenizing(model, tokenizer)
    taken = taken_by(model)
    takes_mask = next((name for name in MASKS if name in taken), None)
    uncached = "use_cache" in taken and not is_hooked(model)
    takes = taken | {*MASKS} if takes_mask else taken | _passed_on_by(model)
    vocabulary = vocabulary_size(model)
    return Reader(
        tokenize=tokenize,
        batch_size=batch_size,
        context=context or limit,
        limit=limit,
        cuts=context is not None,
        pack=pack,
        separator=getattr(using, "eos_token_id", None),
        carry=carry,
        takes=takes,
        takes_mask=takes_mask,
        tells_all=is_hooked(model) or is_hugging_face(innermost(model)),
        equal_lengths=equal_lengths,
        mask=mask,
        vocabulary=vocabulary,
        tokenizer=getattr(using, "name_or_path", "") or type(using).__name__,
        padding=_padding_of(model, using, vocabulary),
        always={"use_cache": False} if uncached else {},
        identify=identify,
    )


def taken_by(model: Any) -> frozenset[str]:
    """Name what a forward says that it can be given beside the tokens, its first argument.

    Of a wrapper that passes on what it is given, the forward of the model within tells whether a
    mask is of any use.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    by_name = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    by_place = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    names = {each.name for each in (*by_place[1:], *by_name)} - _NOT_GIVEN
    inner = within(model) if takes_anything(model) else None
    if inner is not None:
        names = names - {*MASKS} | taken_by(inner)
    # A mask that makes a bridge wrong is not one that it takes: it runs sequences of one length.
    return frozenset(names - {*MASKS} if mask_fault(model) else names)


def _passed_on_by(model: Any) -> frozenset[str]:
    """Name what a forward might take that does not say what it takes."""
    inner = innermost(model)
    if is_hugging_face(inner) or not takes_anything(inner):
        return frozenset()
    return _USUAL


def _padding_of(model: Any, tokenizer: Any, vocabulary: int | None) -> int:
    """Choose the token id that fills up sequences; a mask tells that it is padding."""
    config = getattr(innermost(model), "config", None)
    for padding in (getattr(each, "pad_token_id", None) for each in (tokenizer, config)):
        if isinstance(padding, int) and 0 <= padding < (vocabulary or padding + 1):
            return padding
    return 0


def _check_is_settled(model: nn.Module) -> None:
    """Refuse a model that leaves other activations each time, or learns from what it is given."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        dropping = [
            value
            for attribute, value in vars(module).items()
            if ("drop" in attribute or isinstance(module, nn.modules.dropout._DropoutNd))
            and isinstance(value, float)
            and value > 0
        ]
        if dropping or isinstance(module, nn.modules.batchnorm._BatchNorm):
            what = f"drops at random (p={dropping[0]})" if dropping else "learns its statistics"
            raise OptionError(
                f"the model is in training mode, in which {name or 'it'!r} {what}, so each run "
                "yields other activations; call model.eval() first"
            )


def _tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Turn texts into tokens."""
    found = tokenizer(texts, **({"verbose": False} if _takes(tokenizer, "verbose") else {}))
    ids = found.get("input_ids") if isinstance(found, Mapping) else None
    if not isinstance(ids, Sized) or not isinstance(ids, Iterable):
        raise OptionError(
            f"the tokenizer returned a {type(found).__name__} without 'input_ids'; give one that "
            "returns a dict of them, such as AutoTokenizer.from_pretrained(...)"
        )
    if len(ids) != len(texts):
        raise OptionError(
            f"the tokenizer returned {counted(len(ids), 'sequence')} for "
            f"{counted(len(texts), 'text')}; give one that returns one for each"
        )
    return [*ids]


def _tokenizing(
    model: Any, tokenizer: Any
) -> tuple[Any, Callable[[list[str]], list[Any]] | None, Callable[[], str | None]]:
    """Return the tokenizer, what turns texts into tokens, and what tells it apart."""
    own = getattr(model, "tokenizer", None)
    using = own if tokenizer is None else tokenizer
    tokenize = None if using is None else functools.partial(_tokenize, using)
    bos = None
    if tokenizer is None and own is not None and hasattr(model, "to_tokens"):
        tokenize = functools.partial(_to_tokens, model)
        bos = [getattr(model.cfg, name, None) for name in _OF_BOS]
    return using, tokenize, functools.partial(_identity_of, using, bos)


def _identity_of(tokenizer: Any, bos: list[Any] | None) -> str | None:
    """Digest all that decides which tokens a tokenizer makes of a text; None if that is not known.

    Only the fast tokenizers of transformers say so.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str") or not type(tokenizer).__module__.startswith("transformers."):
        return None
    told = json.loads(backend.to_str())
    for changed in ("truncation", "padding"):  # which each call sets anew
        told.pop(changed, None)
    settings = [
        type(tokenizer).__name__,
        tokenizer.special_tokens_map,
        getattr(tokenizer, "split_special_tokens", None),
        bos,
        [version(package) for package in ("transformers", "tokenizers")],
    ]
    shown = json.dumps([told, settings], sort_keys=True, default=str)
    return hashlib.blake2b(shown.encode(), digest_size=16).hexdigest()


def _takes(function: Any, name: str) -> bool:
    """Return whether a function takes an argument by name, as far as it says what it takes."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _to_tokens(model: Any, texts: list[str]) -> list[Any]:
    """Turn texts into tokens as TransformerLens does, with a BOS token where the model has one."""
    return [model.to_tokens(text, truncate=False)[0].cpu() for text in texts]
