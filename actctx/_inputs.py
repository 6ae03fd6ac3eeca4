"""What a model is run on: batches of token ids, out of whatever holds texts or tokens.

# NOTE [Batches of sequences]
Batches that come as such, tensors `batch pos` or dicts of them, are run as they are. Single
sequences are put together here. Packed, they are cut out of one stream, `context` tokens each.
Otherwise those of a window that follow each other are sorted by length, so that there is next to no
padding to be computed; windows are of a fixed number of sequences, so that the same input always
leaves the same rows in the same order, which is what resuming relies on.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor, nn

from actctx._errors import DataError, OptionError

_WINDOW = 64
"""The batches whose sequences are sorted by length together."""

_AT_ONCE = 256
"""The texts that a tokenizer is given at once."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one forward.

    Attributes:
        tokens: The token ids.
        real: Where they are no padding; None where none are.
        sequences: The number of each sequence in the input.
        given: What else the forward is given, by name.
        carried: What comes along with each sequence, such as its label, by name.
        kept: Where a token that is no padding leaves a row; None where all do.

    """

    tokens: Int64[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"] | None
    sequences: Int64[Tensor, " batch"]
    given: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, list[Any]] = field(default_factory=dict)
    kept: Bool[Tensor, "batch pos"] | None = None


@dataclass(frozen=True, eq=False)
class _Sequence:
    number: int
    tokens: Int64[Tensor, " pos"]
    kept: Bool[Tensor, " pos"] | None
    carried: Mapping[str, Any]


@dataclass(eq=False)
class Reading:
    """How an input is read.

    Attributes:
        tokenize: Turns texts into token ids.
        batch_size: The sequences in a batch that is put together here, at most.
        context: The tokens of a sequence, at most; None where the model has no limit.
        pack: Whether sequences are joined, and cut into as many tokens as the context has.
        separator: The token between sequences that are joined.
        carry: The names of what comes along with each sequence.
        parameters: The names of what the model's forward can be given.
        mask: The name of what tells, in each dict, which tokens leave rows; `"attention"` where
            all do that are no padding, None where padding of a batch does, too.
        tokenizer: The name of the tokenizer, for the metadata.
        padding: The token id that fills up shorter sequences.
        cut: The number of tokens that were cut off the ends of sequences so far.

    """

    tokenize: Callable[[list[str]], list[Any]] | None
    batch_size: int
    context: int | None
    pack: bool
    separator: int | None
    carry: tuple[str, ...]
    parameters: frozenset[str]
    mask: str | None
    tokenizer: str = ""
    padding: int = 0
    cut: int = 0

    def batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        """Read an input, batch by batch.

        Raises:
            DataError: It is empty, or holds what is no input.

        """
        if isinstance(data, Tensor) and data.dim() == 2:  # noqa: PLR2004  batch and pos
            data = torch.split(data, self.batch_size)
        if isinstance(data, str | bytes | Mapping):
            raise DataError(
                f"data is one {type(data).__name__}, not an iterable of inputs; give a list, such "
                "as [data]"
            )
        items = iter(data)
        first = next(items, None)
        if first is None:
            raise DataError("data has nothing in it, so there is nothing to run; give some input")
        items = itertools.chain([first], items)
        if _is_batch(_tokens_in(first)):
            yield from self._as_they_are(items)
        elif self.pack:
            yield from self._packed(self._sequences(items))
        else:
            yield from self._sorted(self._sequences(items))

    def is_at_hand(self, data: Iterable[Any]) -> bool:
        """Tell whether an input is a list of batches, or one, which can be gone through twice."""
        if isinstance(data, Tensor):
            return data.dim() == 2  # noqa: PLR2004  batch and pos
        return isinstance(data, list | tuple) and bool(data) and _is_batch(_tokens_in(data[0]))

    def _as_they_are(self, items: Iterable[Any]) -> Iterator[Batch]:
        if self.pack:
            raise OptionError(
                "pack=True joins sequences, but data holds batches; give texts or sequences of "
                "token ids instead"
            )
        count = 0
        for item in items:
            tokens = _as_ids(_tokens_in(item), 2, count)
            numbers = torch.arange(count, count + len(tokens))
            given, real = dict[str, Any](), None
            if isinstance(item, Mapping):
                taken = self.parameters - {"input_ids", "labels", *self.carry}
                given = {name: item[name] for name in item if name in taken}
                if self.mask is not None and item.get("attention_mask") is not None:
                    real = _as_mask(item, "attention_mask", tokens)
            carried = self._carried(item, len(tokens))
            yield Batch(tokens, real, numbers, given, carried, self._kept(item, tokens))
            count += len(tokens)

    def _carried(self, item: Any, batch: int) -> dict[str, list[Any]]:
        carried = {}
        for name in self.carry:
            values = item.get(name) if isinstance(item, Mapping) else None
            values = values.tolist() if isinstance(values, Tensor) else values
            if not isinstance(values, Sequence) or len(values) != batch:
                raise DataError(
                    f"carry names {name!r}, but a batch of {batch} sequences has "
                    f"{_found(values)} under that name; give one value for each sequence"
                )
            carried[name] = [*values]
        return carried

    def _kept(self, item: Any, tokens: Tensor) -> Shaped[Tensor, "..."] | None:
        if self.mask is None or self.mask == "attention":
            return None
        if not isinstance(item, Mapping) or item.get(self.mask) is None:
            raise DataError(
                f"mask names {self.mask!r}, but the input has nothing under that name; give dicts "
                "that have it, or 'attention' for all tokens that are no padding"
            )
        return _as_mask(item, self.mask, tokens)

    def _sequences(self, items: Iterable[Any]) -> Iterator[_Sequence]:
        number = 0
        for together in _chunks(items):
            for ids, item in zip(self._ids(together), together, strict=True):
                tokens = _as_ids(ids, 1, number)
                kept = self._kept(item, tokens)
                if isinstance(item, Mapping) and item.get("attention_mask") is not None:
                    real = _as_mask(item, "attention_mask", tokens)
                    tokens, kept = tokens[real], None if kept is None else kept[real]
                carried = {name: self._carried_of(item, name) for name in self.carry}
                yield _Sequence(number, tokens, kept, carried)
                number += 1

    def _carried_of(self, item: Any, name: str) -> Any:
        if not isinstance(item, Mapping) or name not in item:
            raise DataError(
                f"carry names {name!r}, but a sequence of the input has nothing under that name; "
                "give dicts that have it"
            )
        value = item[name]
        return value.item() if isinstance(value, Tensor) else value

    def _ids(self, items: Sequence[Any]) -> list[Any]:
        found = [*map(_tokens_in, items)]
        if isinstance(found[0], str):
            if self.tokenize is None:
                raise OptionError(
                    "data holds texts, and the model has no tokenizer; give tokenizer="
                )
            found = self.tokenize(found)
        return found

    def _sorted(self, sequences: Iterator[_Sequence]) -> Iterator[Batch]:
        while window := [*itertools.islice(sequences, _WINDOW * self.batch_size)]:
            kept = [self._cut(sequence) for sequence in window if len(sequence.tokens)]
            kept.sort(key=lambda sequence: len(sequence.tokens), reverse=True)
            for start in range(0, len(kept), self.batch_size):
                yield self._padded(kept[start : start + self.batch_size])

    def _cut(self, sequence: _Sequence) -> _Sequence:
        self.cut += max(0, len(sequence.tokens) - (self.context or len(sequence.tokens)))
        kept = None if sequence.kept is None else sequence.kept[: self.context].clone()
        return replace(sequence, tokens=sequence.tokens[: self.context].clone(), kept=kept)

    def _padded(self, sequences: list[_Sequence]) -> Batch:
        ids = [sequence.tokens for sequence in sequences]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(each) for each in ids])
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        numbers = torch.tensor([sequence.number for sequence in sequences])
        carried = {name: [each.carried[name] for each in sequences] for name in self.carry}
        masks = [each.kept for each in sequences if each.kept is not None]
        kept = nn.utils.rnn.pad_sequence(masks, batch_first=True) if masks else None
        if bool(real.all()):
            return Batch(tokens, None, numbers, carried=carried, kept=kept)
        takes_mask = "attention_mask" in self.parameters
        given = {"attention_mask": real.long()} if takes_mask else {}
        return Batch(tokens, real, numbers, given, carried, kept)

    def _packed(self, sequences: Iterator[_Sequence]) -> Iterator[Batch]:
        if self.carry:
            raise OptionError("carry= goes with whole sequences, which pack=True joins; give one")
        if self.mask != "attention":
            raise OptionError("mask= goes with whole sequences, which pack=True joins; give one")
        if self.context is None:
            raise OptionError("pack=True needs context=, since the model has no limit of its own")
        number, size = 0, self.batch_size * self.context
        waiting, count = list[Tensor](), 0
        for sequence in sequences:
            between = [self.separator] if self.separator is not None and sequence.number else []
            waiting += [torch.tensor(between, dtype=torch.long), sequence.tokens]
            count += len(between) + len(sequence.tokens)
            if count >= size:
                stream = torch.cat(waiting)
                for part in torch.split(stream[: count - count % size], size):
                    tokens = part.view(self.batch_size, self.context)
                    yield Batch(tokens, None, torch.arange(number, number + len(tokens)))
                    number += len(tokens)
                waiting = [stream[count - count % size :].clone()]
                count = len(waiting[0])
        rest = torch.cat(waiting)
        whole = len(rest) - len(rest) % self.context
        for tokens in (rest[:whole].view(-1, self.context), rest[None, whole:]):
            if tokens.numel():
                yield Batch(tokens, None, torch.arange(number, number + len(tokens)))
                number += len(tokens)


def reading_of(
    model: Any,
    *,
    tokenizer: Any,
    batch_size: int,
    context: int | None,
    pack: bool,
    carry: tuple[str, ...],
    mask: str | None,
) -> Reading:
    """Settle how an input is read for a model; see `actctx.extract.extract`.

    Raises:
        OptionError: An option is no positive number, or the context is too long for the model.

    """
    for name, given in (("batch_size", batch_size), ("context", context)):
        if given is not None and (type(given) is not int or given < 1):
            raise OptionError(f"{name}={given!r} is no number of its kind; give a positive int")
    if mask is not None and not isinstance(mask, str):
        raise OptionError(
            f"mask={mask!r} is no mask of a data set; give 'attention', the name of what holds one "
            "in each dict of data, or None"
        )
    limit = _context_of(model)
    if context is not None and limit is not None and context > limit:
        raise OptionError(f"context={context} is more than the {limit} tokens that the model reads")
    own = getattr(model, "tokenizer", None)
    using = own if tokenizer is None else tokenizer
    tokenize = None if using is None else functools.partial(_tokenize, using)
    if tokenizer is None and own is not None and hasattr(model, "to_tokens"):
        tokenize = functools.partial(_to_tokens, model)
    padding = getattr(using, "pad_token_id", None)
    return Reading(
        tokenize=tokenize,
        batch_size=batch_size,
        context=context or limit,
        pack=pack,
        separator=getattr(using, "eos_token_id", None),
        carry=carry,
        parameters=_parameters_of(model),
        mask=mask,
        tokenizer=getattr(using, "name_or_path", "") or type(using).__name__,
        padding=0 if padding is None else padding,
    )


def _parameters_of(model: Any) -> frozenset[str]:
    """Name what a forward can be given; one that takes anything, as a wrapper, takes a mask."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return frozenset(parameters) | ({"attention_mask"} if takes_any else set())


def _context_of(model: Any) -> int | None:
    lens, hugging = getattr(model, "cfg", None), getattr(model, "config", None)
    sizes = (getattr(lens, "n_ctx", None), getattr(hugging, "max_position_embeddings", None))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _tokenize(tokenizer: Any, texts: list[str]) -> list[Any]:
    ids: list[Any] = tokenizer(texts, verbose=False)["input_ids"]
    return ids


def _to_tokens(model: Any, texts: list[str]) -> list[Any]:
    """Turn texts into tokens as TransformerLens does, with a BOS token where the model has one."""
    return [model.to_tokens(text, truncate=False)[0].cpu() for text in texts]


def _chunks(items: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    items = iter(items)
    while chunk := tuple(itertools.islice(items, _AT_ONCE)):
        yield chunk


def _tokens_in(item: Any) -> Any:
    """Find the token ids, or the text, in what an input holds."""
    if isinstance(item, Mapping):
        name = next((name for name in ("input_ids", "tokens", "text") if name in item), None)
        if name is None:
            raise DataError(
                f"data holds dicts of {', '.join(map(repr, item))}, none of which is input_ids, "
                "tokens or text; rename what holds the tokens"
            )
        return item[name]
    # As a DataLoader hands over what a TensorDataset holds.
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        if len(item) > 1:
            raise DataError(
                f"data holds a {type(item).__name__} of {len(item)} tensors, of which it is not "
                "known what they are; give dicts, such as {'input_ids': ..., 'attention_mask': ...}"
            )
        return item[0]
    return item


def _is_batch(tokens: Any) -> bool:
    if hasattr(tokens, "ndim"):  # a tensor, or an array
        return bool(tokens.ndim != 1)
    return isinstance(tokens, list | tuple) and bool(tokens) and not isinstance(tokens[0], int)


def _as_ids(tokens: Any, rank: int, number: int) -> Shaped[Tensor, "..."]:
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"from sequence {number} on, the input holds {_found(tokens)}, which is no tensor of "
            "token ids; give sequences of one length in a batch, or single sequences"
        ) from None
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise DataError(
            f"from sequence {number} on, the input holds {_found(ids)}, which are no token ids; "
            "give integers"
        )
    if ids.dim() != rank:
        kind = "batches, of the shape batch pos" if rank > 1 else "single sequences"
        raise DataError(
            f"from sequence {number} on, the input holds token ids of the shape "
            f"{tuple(ids.shape)}; give only {kind}"
        )
    # Batches wait to be run, and a caller may fill his tensor anew.
    return ids.to("cpu", torch.long, copy=True)


def _as_mask(item: Mapping[str, Any], name: str, tokens: Tensor) -> Shaped[Tensor, "..."]:
    mask = torch.as_tensor(item[name]).bool().cpu()
    if mask.shape != tokens.shape:
        raise DataError(
            f"{name!r} has the shape {tuple(mask.shape)}, but its tokens have "
            f"{tuple(tokens.shape)}; give one entry for each token"
        )
    return mask


def _found(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"
