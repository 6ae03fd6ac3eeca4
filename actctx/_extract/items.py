"""Read the items of an input: token ids or a text, and what comes along with them.

What is read is copied, since batches wait to be run and callers may reuse their tensors meanwhile.
"""

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

from actctx._capture.given_masks import MASKS
from actctx._errors import DataError
from actctx._extract.containers import as_plain, why_no_values
from actctx._text import is_utf8, shortened

TOKENS = ("input_ids", "tokens", "text")
"""The keys under which a dict may hold its tokens or its text."""

_ELSEWHERE = (
    *("decoder", "cross", "head", "past"),
    *("pixel", "image", "video", "second_per", "audio", "feature", "input_features"),
)
"""Prefixes of the arguments of a forward that are not about the tokens of its input."""

_MOST = 2**63
_NO_IDS = torch.empty(0, dtype=torch.long, device="cpu")


@dataclass(frozen=True, eq=False)
class Item:
    """A batch, or a sequence, as it was read.

    Attributes:
        tokens: The token ids; none of a text until it is tokenized.
        number: The number of its first sequence in the input.
        real: Where tokens are not padding, as the item says.
        kept: Where they leave rows, as the item says.
        attended: Where they are not padding, in a batch whose padding leaves rows too.
        given: What else the forward is given, by name.
        carried: What comes along with each sequence of a batch, or with the sequence, by name.
        text: The text, until it is tokenized.
        is_text: Whether it was a text.
        cut: The number of tokens that were cut off its end.

    """

    tokens: Int64[Tensor, "*batch pos"]
    number: int
    real: Bool[Tensor, "..."] | None
    kept: Bool[Tensor, "..."] | None
    given: Mapping[str, Any]
    carried: Mapping[str, Any]
    text: str | None = None
    is_text: bool = False
    cut: int = 0
    attended: Bool[Tensor, "batch pos"] | None = None

    def of_single_tokens(self) -> "Item":
        """Return a sequence without its padding.

        Raises:
            DataError: A mask, or what the forward is given, has another number of them.

        """
        self.check_masks()
        shape = self.tokens.shape
        for name, value in self.given.items():
            if not isinstance(value, Tensor) or value.shape[:1] != shape:
                raise DataError(
                    f"sequence {self.number} of the input has {found(value)} under {name!r}, which "
                    f"the model's forward takes, but {shape[0]} tokens; give one entry for "
                    "each token, or batches, or leave it out"
                )
        if self.real is None:
            return self
        (places,) = self.real.nonzero(as_tuple=True)
        if len(places) and len(places) != int(places[-1] - places[0]) + 1:
            raise DataError(
                f"the attention mask of sequence {self.number} has a gap, and single sequences run "
                "without the tokens that it excludes; give it in a batch, which runs as it is"
            )
        return self._at(self.real)

    def check_masks(self) -> None:
        """Refuse masks that are not of the shape of the tokens."""
        shape = self.tokens.shape
        for name, mask in (("attention mask", self.real), ("mask of rows", self.kept)):
            if mask is not None and mask.shape != shape:
                raise DataError(
                    f"from sequence {self.number} on, the {name} has the shape "
                    f"{tuple(mask.shape)}, but the tokens have {tuple(shape)}; give one entry for "
                    "each token"
                )

    def first(self, most: int | None) -> "Item":
        """Return a sequence with its first tokens only."""
        if most is None or len(self.tokens) <= most:
            return self
        return replace(self._at(slice(most)), cut=len(self.tokens) - most)

    def _at(self, index: Any) -> "Item":
        return replace(
            self,
            tokens=self.tokens[index].clone(),
            real=None,
            kept=None if self.kept is None else self.kept[index].clone(),
            given={name: value[index].clone() for name, value in self.given.items()},
        )


@dataclass(frozen=True)
class Items:
    """How items are read.

    Attributes:
        carry: The names of what comes along with each sequence.
        takes: The names of what the model's forward can be given beside the tokens.
        mask: See `Reader`.
        vocabulary: The number of token ids that the model knows; None where that is not known.

    """

    carry: tuple[str, ...]
    takes: frozenset[str]
    mask: str | None
    vocabulary: int | None

    def batch(self, item: Any, number: int) -> Item:
        """Read a batch, whose first sequence has a number in the input.

        Raises:
            DataError: It is not a batch of token ids.

        """
        tokens = self.ids(tokens_in(item), rank=2, number=number)
        read = self._read(item, tokens, number)
        carried = {name: self._carried(item, name, number, len(tokens)) for name in self.carry}
        read = replace(read, carried=carried)
        read.check_masks()
        return read

    def sequence(self, item: Any, number: int) -> Item:
        """Read a single sequence.

        Raises:
            DataError: It is not a sequence of token ids, nor a text.

        """
        tokens = tokens_in(item)
        if not isinstance(tokens, str):
            tokens = self.ids(tokens, rank=1, number=number)
        read = self._read(item, tokens, number)
        for name in self.carry:
            if not isinstance(item, Mapping) or name not in item:
                there = shortened([*map(repr, item)]) if isinstance(item, Mapping) else found(item)
                raise DataError(
                    f"carry names {name!r}, but sequence {number} of the input has no entry of "
                    f"that name, only {there}; give dicts that have it"
                )
        carried = {name: _scalar(name, item[name], number) for name in self.carry}
        return replace(read, carried=carried)

    def ids(self, tokens: Any, *, rank: int, number: int) -> Shaped[Tensor, "..."]:
        """Read token ids, into a tensor of their own.

        Raises:
            DataError: They are not token ids, or not in the model's vocabulary.

        """
        tokens = as_plain(tokens)
        try:
            ids = torch.as_tensor(tokens)
        except Exception:  # noqa: BLE001  whatever somebody's object raises
            raise DataError(_no_ids(tokens, number)) from None
        # A bytes-like object is a text that was not decoded.
        is_text = isinstance(tokens, bytes | bytearray | memoryview)
        if is_text or (ids.numel() and (ids.dtype == torch.bool or not _is_integer(ids))):
            raise DataError(
                f"from sequence {number} on, the input holds {found(tokens if is_text else ids)}, "
                f"which are not token ids; give {'text' if is_text else 'integers'}"
            )
        if ids.dim() != rank:
            kind = "batches, of the shape batch pos" if rank > 1 else "single sequences"
            raise DataError(
                f"from sequence {number} on, the input holds token ids of the shape "
                f"{tuple(ids.shape)}; give only {kind}"
            )
        ids = _as_long(ids, number)
        if self.vocabulary is not None and ids.numel():
            ends = map(int, ids.aminmax())
            worst = next((end for end in ends if not 0 <= end < self.vocabulary), None)
            if worst is not None:
                raise DataError(
                    f"from sequence {number} on, the input holds the token id {worst}, but the "
                    f"model knows those from 0 to {self.vocabulary - 1}; give the ids of its own "
                    "tokenizer"
                )
        return ids

    def _read(self, item: Any, tokens: Tensor | str, number: int) -> Item:
        if not isinstance(item, Mapping):
            item = {}
        text, ids = (tokens, _NO_IDS) if isinstance(tokens, str) else (None, tokens)
        real = kept = attended = None
        is_batch = ids.dim() > 1
        named = next((name for name in MASKS if item.get(name) is not None), None)
        if named is not None and (self.mask is not None or not is_batch):
            real = _as_mask(item, named, is_binary=True)
        elif named is not None:
            attended = _attended(item[named], ids.shape)
        if self.mask is not None and self.mask != "attention":
            kept = _kept(item, self.mask)
        self._check_masks_are_named(item)
        given = {
            name: _as_given(value)
            for name, value in item.items()
            if name in self.takes
            and value is not None
            # a mask is made where sequences are put together
            and (is_batch or name not in MASKS)
        }
        if self.mask == "attention" and real is None and text is None:
            _check_padding_is_told(given, ids.shape)
        is_text = text is not None
        return Item(ids, number, real, kept, given, {}, text, is_text, attended=attended)

    def _check_masks_are_named(self, item: Mapping[str, Any]) -> None:
        """Refuse a mask that nothing reads, whose padding would leave rows."""
        if self.mask is None or any(name in item for name in MASKS):
            return
        read = {*self.takes, *self.carry, self.mask, "special_tokens_mask"}
        for name in item:
            if str(name).endswith(("mask", "masks")) and name not in read:
                raise DataError(
                    f"data holds {name!r}, which is not used, and no 'attention_mask'; name it "
                    f"'attention_mask' if it marks padding, give mask={name!r} if it marks the "
                    "tokens that become rows, or leave it out"
                )

    def _carried(self, item: Any, name: str, number: int, batch: int) -> list[Any]:
        values: Any = item.get(name) if isinstance(item, Mapping) else None
        values = values.tolist() if hasattr(values, "tolist") else values
        is_list = isinstance(values, Sequence) and not isinstance(values, str | bytes)
        if not is_list or len(values) != batch:
            raise DataError(
                f"carry names {name!r}, but a batch of {batch} sequences has "
                f"{found(values)} under that name; give one value for each sequence"
            )
        return [_scalar(name, value, number + at) for at, value in enumerate(values)]


def tokens_in(item: Any) -> Any:
    """Find the token ids, or the text, of an item.

    Raises:
        DataError: There are none, or it is not known which they are.

    """
    if isinstance(item, Mapping):
        name = next((name for name in TOKENS if name in item), None)
        if name is None:
            names = f"dicts of {', '.join(map(repr, item))}, none" if item else "empty dicts, none"
            raise DataError(
                f"data holds {names} of which is input_ids, tokens or text; rename the entry with "
                "the tokens"
            )
        return item[name]
    # As a DataLoader hands over what a TensorDataset holds.
    if isinstance(item, list | tuple) and item and _has_axes(item[0]):
        if len(item) > 1:
            raise DataError(
                f"data holds a {type(item).__name__} of {len(item)} tensors without names; give "
                "dicts of input_ids and the others, such as attention_mask"
            )
        return item[0]
    return item


def is_batch(tokens: Any) -> bool:
    """Return whether token ids are those of several sequences."""
    if isinstance(tokens, str):
        return False
    if hasattr(tokens, "ndim"):  # a tensor, or an array
        return bool(tokens.ndim != 1)
    return isinstance(tokens, list | tuple) and bool(tokens) and not is_number(tokens[0])


def _has_axes(value: Any) -> bool:
    return bool(getattr(value, "ndim", 0))


def is_number(value: Any) -> bool:
    """Return whether a value is one number, of Python, NumPy or torch."""
    if isinstance(value, str | bytes):  # NumPy's have axes, of which there are none
        return False
    return isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0


def _is_integer(ids: Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex())


def _as_long(ids: Tensor, number: int) -> Int64[Tensor, "..."]:
    """Copy token ids, of which unsigned ones must not become negative."""
    own = ids.to("cpu", torch.long, copy=True)
    if ids.dtype == torch.uint64 and bool((own < 0).any()):
        raise DataError(
            f"from sequence {number} on, the input holds token ids of 2**63 or more; give the ids "
            "of the model's own tokenizer"
        )
    return own


def found(value: object) -> str:
    """Return what was found where something else should be."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _kept(item: Mapping[str, Any], name: str) -> Shaped[Tensor, "..."]:
    if item.get(name) is None:
        raise DataError(
            f"mask names {name!r}, but the input has no entry of that name; give dicts that have "
            "it, or 'attention' for all tokens that are not padding"
        )
    return _as_mask(item, name)


def _no_ids(tokens: Any, number: int) -> str:
    if tokens is None:
        return f"sequence {number} of the input has None for its tokens or its text; leave it out"
    is_list = isinstance(tokens, Iterable)
    if is_list and any(isinstance(each, str) for each in tokens):
        return (
            f"from sequence {number} on, the input holds a {type(tokens).__name__} of texts; give "
            "single texts, such as itertools.chain.from_iterable(data), which are batched here"
        )
    if hasattr(tokens, "to_pylist") or hasattr(tokens, "as_py"):
        way = "to_pylist" if hasattr(tokens, "to_pylist") else "as_py"
        return (
            f"from sequence {number} on, the input holds {found(tokens)} of Arrow; give Python "
            f"values, as its {way}() returns them"
        )
    lengths = _lengths_in(tokens) if is_list else []
    if len({*lengths}) > 1:
        return (
            f"from sequence {number} on, the input holds a batch of sequences of {min(lengths)} to "
            f"{max(lengths)} tokens; pad them to one length, with an attention_mask, as "
            "tokenizer(..., padding=True) does, or give single sequences, which are batched here"
        )
    return (
        f"from sequence {number} on, the input holds {found(tokens)}, which is not a tensor of "
        "token ids; give a tensor, or lists of ints"
    )


def _lengths_in(tokens: Iterable[Any]) -> list[int]:
    lists = (list, tuple, Tensor, np.ndarray)
    return [len(each) for each in tokens if isinstance(each, lists) and not is_number(each)]


def _as_mask(
    item: Mapping[str, Any], name: str, *, is_binary: bool = False
) -> Shaped[Tensor, "..."]:
    values = as_plain(item[name])
    try:
        mask = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"{name!r} holds {found(item[name])}, which is not a tensor; give one entry, 0 or 1, "
            "for each token"
        ) from None
    if is_binary and not bool(((mask == 0) | (mask == 1)).all()):
        raise DataError(
            f"{name!r} has values other than 0 and 1; give 1 for each token that is not padding"
        )
    return mask.to("cpu", torch.bool, copy=True)


def _attended(mask: Any, shape: tuple[int, ...]) -> Bool[Tensor, "batch pos"] | None:
    """Read which tokens are not padding from a mask that does not decide about rows."""
    given = _as_given(mask)
    if not isinstance(given, Tensor) or given.shape != shape:
        return None
    return given.bool().cpu() if bool(((given == 0) | (given == 1)).all()) else None


def _check_padding_is_told(given: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Refuse a mask of another name for the forward, where no attention mask tells of padding."""
    for name, mask in given.items():
        if is_mask_of_tokens(name, mask, shape) and bool((mask != mask.flatten()[0]).any()):
            raise DataError(
                f"data holds {name!r}, which the model's forward takes, but no 'attention_mask', "
                "so it is not known which tokens are padding; also give an 'attention_mask', or "
                f"mask={name!r} if it is not 0 for the tokens that become rows"
            )


def is_mask_of_tokens(name: str, mask: Any, shape: tuple[int, ...]) -> bool:
    """Return whether what a forward is given, beside the usual masks, can tell padding."""
    is_mask = name.endswith("mask") and name != "global_attention_mask"
    has_shape = isinstance(mask, Tensor) and mask.shape == shape and mask.numel() > 0
    return is_mask and has_shape and not is_elsewhere(name) and name not in MASKS


def is_elsewhere(name: str) -> bool:
    """Return whether an argument of a forward is about other things than its tokens."""
    return name.startswith(_ELSEWHERE)


def _as_given(value: Any) -> Any:
    """Copy what a forward is given, as a tensor where it can be one."""
    if isinstance(value, Tensor):
        return value.clone()
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def _scalar(name: str, value: Any, number: int) -> Any:
    """Return what is carried as a value of Python's."""
    if isinstance(value, Tensor) and (why := why_no_values(value)):
        raise DataError(f"carry names {name!r}, which is a tensor {why}; give a number or a string")
    if hasattr(value, "tolist") and not getattr(value, "ndim", 0):
        value = value.tolist()
    if type(value) is int and not -_MOST <= value < _MOST:
        wrong = f"{value}, which takes more than 64 bits; give it as a string"
    elif value is None:
        wrong = "None; give a value of the same type as the others, such as -1"
    elif isinstance(value, str) and not is_utf8(value):
        wrong = f"{value!r}, which has characters that UTF-8 cannot encode; replace them"
    elif not isinstance(value, int | float | str):
        wrong = f"{found(value)}; give one value for each sequence, a number or a string"
    else:
        return value
    raise DataError(f"carry names {name!r}, which in sequence {number} of the input is {wrong}")
