"""Batches of sequences, with their padding moved after the tokens or left out.

# NOTE [Padding before tokens]
Many models number the positions of a batch from its left end, padding included, so that what they
leave of a token depends on the longest sequence beside it: GPT-2, BERT and many more, unless they
are given `position_ids`. Behind the tokens, padding changes no position. So a forward is given its
sequences with the padding moved there, and with it all that has an entry for each token; the rows,
their order, positions and digests are those of the batch as it came.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from actctx._capture.given_masks import MASKS
from actctx._errors import DataError, OptionError
from actctx._extract.items import is_elsewhere, is_number
from actctx._store.marks import Mark


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one forward.

    Attributes:
        tokens: The token ids.
        real: Where tokens are not padding; None if there is no padding.
        sequences: The number of each sequence in the input.
        given: What else the forward is given, by name.
        carried: What comes along with each sequence, such as its label, by name.
        kept: Which tokens besides padding leave a row; None if all do.
        cut: The number of tokens that were cut off the ends of its sequences.
        attended: Where tokens are not padding, if padding leaves rows; else None.
        mark: The place in the input where its first sequence begins, if it can be resumed there.
        empty: The sequences before it in the input that have no tokens.

    """

    tokens: Int64[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"] | None
    sequences: Int64[Tensor, " batch"]
    given: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, list[Any]] = field(default_factory=dict)
    kept: Bool[Tensor, "batch pos"] | None = None
    cut: int = 0
    attended: Bool[Tensor, "batch pos"] | None = None
    mark: Mark | None = None
    empty: int = 0

    @property
    def unpadded(self) -> Bool[Tensor, "batch pos"] | None:
        """Where tokens are not padding, whether padding leaves rows or not; None if all are."""
        return self.attended if self.real is None else self.real

    @functools.cached_property
    def digests(self) -> Int64[Tensor, " batch"]:
        """A digest of each sequence: what the model is given of it, and what is carried.

        Padding does not count, nor how many sequences run together. Where padding leaves rows, the
        mask counts as well, unless it masks nothing.
        """
        given = {
            name: value
            for name, value in self.given.items()
            if self.real is None or name not in MASKS
        }
        if self.kept is not None:
            given["mask of rows"] = self.kept  # which no argument is called
        found = [self._digest(at, given) for at in range(len(self.tokens))]
        return torch.tensor(found, dtype=torch.long)

    def _digest(self, at: int, given: Mapping[str, Any]) -> int:
        found = hashlib.blake2b(digest_size=8)
        for name, value in {"tokens": self.tokens, **given}.items():
            if isinstance(value, Tensor):
                own = value[at] if value.shape[:1] == self.tokens.shape[:1] else value
                if self.real is not None and own.shape[:1] == self.tokens.shape[1:]:
                    own = own[self.real[at]]
                if name in MASKS and bool((own == 1).all()):
                    continue
                exact = own.double() if own.is_floating_point() else own.long()
                found.update(name.encode() + exact.cpu().numpy().tobytes())
            elif is_number(value):
                found.update(f"{name}={value}".encode())
        found.update(repr([values[at] for values in self.carried.values()]).encode())
        return int.from_bytes(found.digest(), "little", signed=True)


def beginning(mark: Mark, batches: Iterable[Batch], *, empty: int) -> Iterator[Batch]:
    """Give the first of some batches what comes before it: a mark, and empty sequences."""
    first = True
    for batch in batches:
        yield replace(batch, mark=mark, empty=empty) if first else batch
        first = False
    if first and empty:
        none = torch.empty(0, dtype=torch.long)
        yield Batch(none.view(0, 0), None, none, mark=mark, empty=empty)


def with_padding_behind(
    batch: Batch, where: Int64[Tensor, "token 2"]
) -> tuple[Batch, Int64[Tensor, "token 2"]]:
    """Move the padding of a batch after its tokens.

    Args:
        batch: The batch.
        where: The sequences and places of some of its tokens.

    Returns:
        The batch as it is run, and the places there of the tokens.

    Raises:
        DataError: The forward is given what is not of one sequence each.

    """
    unpadded = batch.unpadded
    if unpadded is None or not is_padded_before(batch):
        return batch, where
    first, _ = spans(unpadded)
    count, width = unpadded.shape
    rows = torch.arange(count, device="cpu")
    places = (torch.arange(width, device="cpu") + first[:, None]) % width
    moved = replace(
        batch,
        tokens=batch.tokens.gather(1, places),
        given=given_at(batch, rows, places),
        real=None if batch.real is None else batch.real.gather(1, places),
        attended=None if batch.attended is None else batch.attended.gather(1, places),
    )
    sequence, place = where.unbind(1)
    return moved, torch.stack([sequence, (place - first[sequence]) % width], dim=1)


def is_padded_before(batch: Batch) -> bool:
    """Return whether a batch has padding before its tokens that is to be moved."""
    unpadded = batch.unpadded
    if unpadded is None or _has_positions_of_its_own(batch):
        return False
    return bool(spans(unpadded)[0].any())


def _has_positions_of_its_own(batch: Batch) -> bool:
    """Return whether positions are given that go with the batch as it is, such as `3 batch pos`."""
    positions = batch.given.get("position_ids")
    return isinstance(positions, Tensor) and not is_of_tokens("position_ids", positions, batch)


def in_equal_lengths(batch: Batch) -> Iterator[Batch]:
    """Divide a batch by the length of its sequences, and leave out the padding at their ends.

    Raises:
        OptionError: Padding leaves rows.
        DataError: The forward is given what is not of one sequence each.

    """
    unpadded = batch.unpadded
    if unpadded is None or bool(unpadded.all()):
        yield batch
        return
    if batch.real is None:
        raise OptionError(
            "equal_lengths=True runs without padding, but mask=None keeps its rows; leave one of "
            "them out"
        )
    first, lengths = spans(unpadded)
    for length in dict.fromkeys(lengths.tolist()):
        (rows,) = (lengths == length).nonzero(as_tuple=True)
        if length:
            yield _some(batch, rows, first[rows, None] + torch.arange(length, device="cpu"))


def spans(unpadded: Bool[Tensor, "batch pos"]) -> tuple[Int64[Tensor, " _"], Int64[Tensor, " _"]]:
    """Return the first token of each sequence, and the length up to its last one."""
    count, width = unpadded.shape
    if not width:
        none = torch.zeros(count, dtype=torch.long, device="cpu")
        return none, none
    first = unpadded.int().argmax(1)
    last = torch.arange(width, device="cpu").where(unpadded, -1).amax(1)
    return first, last + 1 - first


def _some(batch: Batch, rows: Int64[Tensor, " _"], places: Int64[Tensor, "_ _"]) -> Batch:
    """Take tokens of some sequences, as many of each."""
    real = None if batch.real is None else batch.real[rows[:, None], places]
    return Batch(
        tokens=batch.tokens[rows[:, None], places],
        real=None if real is None or bool(real.all()) else real,
        sequences=batch.sequences[rows],
        given=given_at(batch, rows, places),
        carried={name: [each[row] for row in rows] for name, each in batch.carried.items()},
        kept=None if batch.kept is None else batch.kept[rows[:, None], places],
    )


def given_at(
    batch: Batch, rows: Int64[Tensor, " _"], places: Int64[Tensor, "_ _"]
) -> dict[str, Any]:
    """Take what a forward is given of tokens of some sequences, or of all in another place.

    Raises:
        DataError: It is not known which of it belongs to which tokens.

    """
    is_all = torch.equal(rows, torch.arange(len(batch.tokens), device="cpu"))
    return {
        name: value
        if is_all and not _has_places(name, value, batch)
        else _at(name, value, batch, rows, places)
        for name, value in batch.given.items()
    }


def _has_places(name: str, value: Any, batch: Batch) -> bool:
    """Return whether what a forward is given may lie along the tokens."""
    if not isinstance(value, Tensor) or not value.dim() or is_elsewhere(name):
        return False
    count, width = batch.tokens.shape
    return width in (value.shape[1:] if len(value) == count else value.shape)


def _at(
    name: str, value: Any, batch: Batch, rows: Int64[Tensor, " _"], places: Int64[Tensor, "_ _"]
) -> Any:
    if not isinstance(value, list | Tensor) or (isinstance(value, Tensor) and not value.dim()):
        return value
    is_one_each = len(value) == len(batch.tokens)
    if isinstance(value, list) and is_one_each:
        return [value[row] for row in rows]
    if isinstance(value, Tensor) and is_of_tokens(name, value, batch):
        return value[rows[:, None], places]
    if isinstance(value, Tensor) and is_one_each and not _has_places(name, value, batch):
        return value[rows]
    shape = f" of the shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise DataError(
        f"from sequence {int(batch.sequences[0])} on, the input has padding, and {name!r}{shape}, "
        "and it is not known which of its entries belong to which token; give single sequences, "
        "or batches without padding before the tokens"
    )


def is_of_tokens(name: str, value: Tensor, batch: Batch) -> bool:
    """Return whether what a forward is given has an entry for each token."""
    is_one_each = value.shape[:2] == batch.tokens.shape and value.dim() <= 3  # noqa: PLR2004
    # not one for each pair of tokens, as in a mask of the attention
    is_of_pairs = value.dim() > 2 and value.shape[2] == batch.tokens.shape[1]  # noqa: PLR2004
    return is_one_each and not is_of_pairs and not is_elsewhere(name)
