"""Read inputs: batches of token ids from whatever holds texts or tokens.

Batches that come as such, tensors `batch pos` or dicts of them, are run as they are. Single
sequences are put together, either packed or sorted by length.
"""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from actctx._capture.given_masks import MASKS
from actctx._errors import DataError, OptionError
from actctx._extract.batching import Batch, beginning, in_equal_lengths
from actctx._extract.containers import check_container
from actctx._extract.items import (
    Item,
    Items,
    is_batch,
    is_mask_of_tokens,
    is_number,
    tokens_in,
)
from actctx._extract.packing import Packing
from actctx._extract.sorting import Sorting
from actctx._extract.source import Source, fingerprint_of, is_stateful, place
from actctx._store.marks import START, Mark
from actctx._text import is_utf8

_WINDOW = 64
"""The batches whose sequences are sorted by length together."""

_OF_ANOTHER_PLACE = (
    *(DataError, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, RuntimeError),
)
"""What inputs raise that were put at a place of another one; no errors of the system."""

_AT_ONCE = 256
"""The texts that a tokenizer is given at once."""


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads an input: how it is opened, and how batches are made of what it holds.

    Attributes:
        tokenize: Turns texts into token ids.
        batch_size: The sequences in a batch that is put together here, at most.
        context: The tokens of a sequence, at most; None where there is no limit.
        limit: The tokens that the model says it reads at once; None where it does not.
        cuts: Whether the context was asked for.
        pack: Whether sequences are joined, and cut into as many tokens as the context has.
        separator: The token between texts that are joined.
        carry: The names of what comes along with each sequence.
        takes: The names of what the model's forward can be given beside the tokens.
        takes_mask: The name that it is given the attention mask under; None where it takes none.
        tells_all: Whether it is given a mask even where nothing is padding, since some models take
            one token id for padding where they are given none.
        equal_lengths: Whether only sequences of one length run together, so without padding.
        mask: The name of what tells, in each dict, which tokens leave rows; `"attention"` where
            all do that are no padding, None where padding of a batch does, too.
        vocabulary: The number of token ids that the model knows; None where that is not known.
        tokenizer: The name of the tokenizer, for the metadata.
        padding: The token id that fills up shorter sequences.
        always: What each forward is given, by name, where the input does not give it.
        ordered_as: The batch size that makes the order of single sequences, which is that of the
            data set that is resumed; None where it is the batch size itself.
        identify: Returns what tells the tokenizer apart from others; None where that is not known.

    """

    tokenize: Callable[[list[str]], list[Any]] | None
    batch_size: int
    context: int | None
    cuts: bool
    pack: bool
    separator: int | None
    carry: tuple[str, ...]
    takes: frozenset[str]
    takes_mask: str | None
    mask: str | None
    vocabulary: int | None
    tokenizer: str = ""
    padding: int = 0
    always: Mapping[str, Any] = field(default_factory=dict)
    ordered_as: int | None = None
    tells_all: bool = False
    equal_lengths: bool = False
    limit: int | None = None
    identify: Callable[[], str | None] = lambda: None
    _warned: set[str] = field(default_factory=set, init=False)
    _made: set[str] = field(default_factory=set, init=False)
    """How batches are made here of what was read: `cut`, `packed` or `sorted`."""

    def batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        """Read an input, batch by batch.

        Raises:
            DataError: It is empty, or holds something other than inputs.

        """
        return self.batches_of(self.source(data))

    def ways(self, data: Iterable[Any], marks: Sequence[Mark]) -> Iterator[tuple[Source, Mark]]:
        """Yield the ways to resume an input, each with the mark that it begins at.

        A way is asked for where the one before came to other rows than those on disk; the last one
        reads all of the input. See the note of `Source`.
        """
        last = next((mark for mark in reversed(marks) if mark.state is not None), START)
        is_stateful_too = last is not START and is_stateful(data)
        if is_stateful_too and not (last.tokenizer and self._is_another(last.tokenizer)):
            placed = place(data, last)
            if placed is not None:
                own, put_back = placed
                with contextlib.suppress(*_OF_ANOTHER_PLACE):
                    yield self.source(own, last), last
                put_back()
        last = marks[-1] if marks else START
        is_same = last is not START and last.dataset == fingerprint_of(data) is not None
        if is_same and (last.tokenizer == "" or last.tokenizer == self._identity()):
            dataset: Any = data
            rest = dataset.select(range(last.items, len(dataset)))
            yield self.source(rest, last, of=data), last
        source = self.source(data)
        yield source, source.skip(marks)

    def _is_another(self, tokenizer: str) -> bool:
        return self._identity() not in {None, tokenizer}

    def source(self, data: Iterable[Any], at: Mark = START, *, of: Any = None) -> Source:
        """Open an input.

        Args:
            data: The input, from the mark on.
            at: The mark.
            of: What the input is a part of; itself by default.

        Raises:
            DataError: It is empty, or holds something other than inputs.

        """
        of = data if of is None else of
        check_container(data)
        if _is_one(data):
            starts = range(0, len(data), self.batch_size)
            data = [data[start : start + self.batch_size] for start in starts]
            self._made.add("cut")
        items = iter(data)
        head = [*itertools.islice(items, 1)]
        if not head and at is START:
            raise DataError("data is empty, so there is nothing to run; give some input")
        if head and is_number(head[0]):
            raise DataError(
                "data holds single numbers, like one sequence of token ids; give a list of "
                "sequences, such as [data]"
            )
        kind = at.kind
        if head:
            kind = "packed" if self.pack else "sequences"
            kind = "batches" if is_batch(tokens_in(head[0])) else kind
        read = self._items.batch if kind == "batches" else self._items.sequence
        return Source(items, head, read, kind=kind, at=at, of=of, tokenizer=self._identity)

    def batches_of(self, source: Source, at: Mark = START) -> Iterator[Batch]:
        """Make batches of what comes from a source, which is at a mark."""
        if source.kind == "batches":
            read = self._as_they_are(source)
        elif source.kind == "packed":
            self._made.add("packed")
            read = self._packed(source, at)
        else:
            self._made.add("sorted")
            read = self._sorted(source)
        yield from map(self._telling, read)

    def _telling(self, batch: Batch) -> Batch:
        """Give the forward an attention mask, also if nothing is padding."""
        name = self.takes_mask
        if name is None or name in batch.given or not self.tells_all:
            return batch
        unpadded = batch.unpadded
        told = torch.ones_like(batch.tokens) if unpadded is None else unpadded.long()
        return replace(batch, given={**batch.given, name: told})

    def runs_otherwise(self, batch_size: int) -> bool:
        """Return whether another batch size makes other forwards of what was read last."""
        if "sorted" in self._made:  # the batches of an order run in parts, never joined
            most = self.ordered_as or self.batch_size
            return min(batch_size, most) != min(self.batch_size, most)
        return bool(self._made) and batch_size != self.batch_size

    def is_at_hand(self, data: Iterable[Any]) -> bool:
        """Return whether an input is a batch or a list of batches, which can be read twice."""
        if _is_one(data):
            return True
        return isinstance(data, list | tuple) and bool(data) and is_batch(tokens_in(data[0]))

    def bound(self, data: Iterable[Any], most: int) -> int:
        """Lower a number of tokens to those that a list of single sequences can have."""
        if not isinstance(data, list | tuple):
            return most
        total = 0
        for item in data:
            length = self._longest(item)
            if length is None or total + length >= most:
                return most
            total += length
        return total

    def _longest(self, item: Any) -> int | None:
        """Return the most tokens that a single sequence can have; None if unknown."""
        tokens = tokens_in(item)
        if isinstance(tokens, str):
            return None if self.pack else self.context
        if is_number(tokens) or not isinstance(tokens, Sized):
            return None
        return len(tokens) if self.pack or self.context is None else min(len(tokens), self.context)

    @functools.cached_property
    def _identity(self) -> Callable[[], str | None]:
        return functools.cache(self.identify)

    @functools.cached_property
    def _items(self) -> Items:
        return Items(self.carry, self.takes, self.mask, self.vocabulary)

    def _as_they_are(self, source: Source) -> Iterator[Batch]:
        if self.pack or self.cuts:
            option = "pack=True joins" if self.pack else "context= cuts"
            raise OptionError(
                f"{option} sequences, but data holds batches; give texts or sequences of token ids "
                "instead"
            )
        for mark, item in _marked(source):
            tokens, count = item.tokens, mark.sequences
            numbers = torch.arange(count, count + len(tokens))
            given = self._renamed(item.given)
            batch = Batch(
                tokens, item.real, numbers, given, item.carried, item.kept, attended=item.attended
            )
            if self.equal_lengths:
                parts = [*in_equal_lengths(batch)]
                empty = len(tokens) - sum(len(part.tokens) for part in parts)
                yield from beginning(mark, parts, empty=empty)
                continue
            if batch.unpadded is not None and not self.is_told(batch):
                _check_unmasked(batch.unpadded, count, self._warned)
            yield replace(batch, mark=mark)

    def is_told(self, batch: Batch) -> bool:
        """Return whether the model's forward is told of padding, under any name."""
        shape = tuple(batch.tokens.shape)
        masks = (is_mask_of_tokens(name, mask, shape) for name, mask in batch.given.items())
        return self.takes_mask is not None or any(masks)

    def _renamed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attention mask under the name that the model has for it."""
        return {
            self.takes_mask or name if name in MASKS else name: value
            for name, value in given.items()
        }

    def _sequences(self, source: Source, most: int) -> Iterator[Item]:
        """Read single sequences, so many at most."""
        while chunk := [*itertools.islice(source, min(_AT_ONCE, most))]:
            for item in self._tokenized(chunk):
                sequence = item.of_single_tokens()
                if not self.pack:  # a window of them is held
                    sequence = sequence.first(self.context)
                names = tuple(sorted(sequence.given))
                source.given = names if source.given is None else source.given
                if names != source.given:
                    _refuse_some(sequence.number, {*names}, {*source.given})
                yield sequence
            most -= len(chunk)
            if not most:
                return

    def _tokenized(self, items: list[Item]) -> Iterator[Item]:
        texts = [item.text for item in items if item.text is not None]
        if texts and self.tokenize is None:
            raise OptionError("data holds texts, and the model has no tokenizer; give tokenizer=")
        numbers = [item.number for item in items if item.text is not None]
        try:
            found = self.tokenize(texts) if texts and self.tokenize else []
        except Exception:
            _check_texts(items)
            raise
        ids = dict(zip(numbers, found, strict=True))
        for item in items:
            if item.number in ids:
                tokens = self._items.ids(ids[item.number], rank=1, number=item.number)
                item = replace(item, tokens=tokens, text=None)  # noqa: PLW2901
            yield item

    def _sorted(self, source: Source) -> Iterator[Batch]:
        sorting = Sorting(
            batch_size=self.batch_size,
            ordered_as=self.ordered_as or self.batch_size,
            padding=self.padding,
            takes_mask=self.takes_mask,
            equal_lengths=self.equal_lengths,
        )
        yield from sorting.batches(self._chunks(source, _WINDOW * sorting.ordered_as))

    def _packed(self, source: Source, at: Mark) -> Iterator[Batch]:
        if self.carry:
            raise OptionError(
                "carry= needs whole sequences, but pack=True joins them; leave one of them out"
            )
        if self.mask != "attention":
            raise OptionError(
                "mask= needs whole sequences, but pack=True joins them; leave one of them out"
            )
        if self.context is None:
            raise OptionError("pack=True needs context=, since the model does not state a limit")
        packing = Packing(self.batch_size, self.context, self.separator)
        yield from packing.batches(self._chunks(source, _AT_ONCE), at)

    def _chunks(self, source: Source, most: int) -> Iterator[tuple[Mark, list[Item]]]:
        mark = source.mark()
        while chunk := [*self._sequences(source, most)]:
            yield mark, chunk
            mark = source.mark()


def _marked(source: Source) -> Iterator[tuple[Mark, Item]]:
    """Go through items, each with the mark before it."""
    mark = source.mark()
    for item in source:
        yield mark, item
        mark = source.mark()


def _refuse_some(number: int, here: set[str], first: set[str]) -> None:
    name = min(here ^ first)
    has, lacks = (number, 0) if name in here else (0, number)
    raise DataError(
        f"sequence {has} of the input has {name!r}, which the model's forward takes, but sequence "
        f"{lacks} does not; give it to all or none"
    )


def _check_texts(items: Iterable[Item]) -> None:
    """Refuse a text that a tokenizer cannot be given."""
    for item in items:
        if item.text is not None and not is_utf8(item.text):
            raise DataError(
                f"sequence {item.number} of the input has characters that UTF-8 cannot encode, "
                "which the tokenizer does not accept; replace them, as "
                "text.encode(errors='replace').decode() does"
            ) from None


def _is_one(data: Iterable[Any]) -> TypeGuard[Tensor | np.ndarray]:
    """Return whether an input is one tensor, or array, of token ids."""
    return isinstance(data, Tensor | np.ndarray) and data.ndim == 2  # noqa: PLR2004  batch and pos


def _check_unmasked(real: Bool[Tensor, "batch pos"], number: int, warned: set[str]) -> None:
    """Check padding that a forward cannot be told of; causal models ignore it after the tokens.

    Args:
        real: Where tokens are not padding.
        number: The number of the first sequence in the input.
        warned: What was warned of before, which is warned of once.
    """
    if bool(real.all()):
        return
    remedy = "give equal_lengths=True, which runs sequences without padding, or single sequences"
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise DataError(
            f"from sequence {number} on, the input has padding before tokens, but the model's "
            f"forward takes no attention mask, so tokens would attend to it; {remedy}"
        )
    if "unmasked" in warned:
        return
    warned.add("unmasked")
    warnings.warn(
        "the model's forward takes no attention mask, so tokens attend to the padding after them "
        f"if it is not causal; {remedy}",
        stacklevel=2,
    )
