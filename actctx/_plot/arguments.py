"""Check the other arguments of a picture: tokens, and numbers of heads and positions."""

import operator
from collections.abc import Sized
from typing import Any

from actctx._errors import OptionError
from actctx._store.indexing import is_int


def read_tokens(tokens: Any) -> list[str]:
    """Read the tokens that a picture shows.

    Raises:
        OptionError: They are not strings.

    """
    found = None if isinstance(tokens, str) else _listed(tokens)
    if found is None or not all(isinstance(token, str) for token in found):
        raise OptionError(
            "tokens must be strings; give those of model.to_str_tokens(text), or of "
            "tokenizer.convert_ids_to_tokens(ids)"
        )
    return found


def read_integers(option: str, numbers: Any) -> list[int]:
    """Read the numbers of heads or positions, which may be in a tensor.

    Raises:
        OptionError: They are not integers.

    """
    found = _listed(numbers)
    if found is None or not all(map(is_int, found)):
        raise OptionError(f"{option}={numbers!r} must be integers, as in {option}=[0, 3]")
    return [*map(operator.index, found)]


def _listed(given: Any) -> list[Any] | None:
    try:
        return [*given]
    except TypeError:
        return None


def check_count(
    name: str, axis: str, words: Sized, wanted: int, *, remedy: str = "give one for each"
) -> None:
    """Refuse labels along an axis if there is not one for each position.

    Raises:
        OptionError: There are fewer or more.

    """
    given = len(words)
    if given != wanted:
        raise OptionError(
            f"{name!r} has {wanted} {axis}, but {given} {'was' if given == 1 else 'were'} given; "
            + remedy
        )
