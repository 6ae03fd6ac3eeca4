"""The grammar of names: full names, suffixes and globs, with the same meaning everywhere.

| written | means |
| --- | --- |
| `blocks.3.hook_out` | this place, or every place whose last parts are these |
| `hook_z`, `attn.hook_z` | every place whose last parts are these |
| `*resid_post` | a glob without a dot: matches the last part of a name |
| `blocks.*.attn.hook_z` | a glob with dots: matches a whole name |
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping

from actctx._errors import HookNameError

_TOKENS = re.compile(r"\*+|\?|\[[^\]]*\]?|[^*?\[]+")
_NUMBERS = re.compile(r"\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*")
_LETTERS = re.compile(r"(?:(?:[a-z]-[a-z]|[A-Z]-[A-Z]|\d-\d(?!\d)|\d(?!\d)|[^\W\d]),?)+")
_HOW = (
    "write numbers, as in '[0-3]', '[8-11]' or '[0,3,11]', or characters, as in '[qkv]' or '[!qk]'"
)
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST = 10_000  # numbers in a bracket


def is_glob(name: str) -> bool:
    """Return whether a name is a pattern of names."""
    return any(character in name for character in "*?[")


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a dotted name; see `matcher`."""
    return matcher(pattern)(name)


@functools.lru_cache
def matcher(pattern: str) -> Callable[[str], bool]:
    """Compile a pattern into a predicate on names.

    `*`, `?` and brackets stay within one part of a name, `**` spans any number of parts. A bracket
    contains whole numbers, with ranges that include both ends (`[8-11]`, `[0,3,11]`, and `[!0]` for
    all others), or characters (`[qkv]`, `[!qk]`). A glob without a dot matches the last part of a
    name, at any depth, as in a `.gitignore`. Any other name matches the last parts of a name.

    Raises:
        HookNameError: A bracket contains something else.

    """
    if not is_glob(pattern):
        ending = f".{pattern}"
        return lambda name: name == pattern or name.endswith(ending)
    parts = pattern.split(".")
    if parts == ["**"]:
        return lambda _: True
    if len(parts) == 1:
        parts = ["**", *parts]
    # Most names already differ in their last part.
    ending = "" if is_glob(parts[-1]) else parts[-1]
    accepts = re.compile(_regex_of(parts, pattern)).fullmatch
    return lambda name: name.endswith(ending) and accepts(name) is not None


def meant(wanted: str, named: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Find the sites that a name matches.

    Args:
        wanted: The key or a name of a site; an alias that several sites have before their names; or
            a suffix or a glob.
        named: The names of each site, by its key.

    Returns:
        The name by which each matching site was found, by its key: `wanted` itself, unless it is an
        alias, a suffix or a glob.

    Raises:
        HookNameError: It is not a valid pattern.

    """
    if wanted in named:
        return {wanted: wanted}
    found = {key: wanted for key, names in named.items() if wanted in names}
    if found:
        return found
    before = f"{wanted}."
    found = {
        key: key
        for key, names in named.items()
        if key.startswith(before) and key.removeprefix(before) in names
    }
    if found:
        return found
    accept = matcher(wanted)
    firsts = {
        key: next((name for name in (key, *names) if accept(name)), None)
        for key, names in named.items()
    }
    return {key: first for key, first in firsts.items() if first is not None}


def _regex_of(parts: list[str], pattern: str) -> str:
    regex = ""
    for position, part in enumerate(parts):
        is_last = position == len(parts) - 1
        if part != "**":
            regex += _part(part, pattern) + ("" if is_last else r"\.")
        elif not is_last:
            regex += r"(?:[^.]*\.)*"
        else:  # it may match no part at all, and then the dot before it is dropped too
            regex = regex.removesuffix(r"\.") + r"(?:\.[^.]*)*"
    return regex


def _part(part: str, pattern: str) -> str:
    tokens = [*_TOKENS.findall(part)]
    regex = ""
    for token, before, behind in zip(tokens, ["", *tokens], [*tokens[1:], ""], strict=False):
        if token.startswith("["):
            regex += _bracket(token, before, behind, pattern)
        elif token.startswith(("*", "?")):
            regex += "[^.]*" if token.startswith("*") else "[^.]"
        else:
            regex += re.escape(token)
    return regex


def _bracket(token: str, before: str, behind: str, pattern: str) -> str:
    """Read a bracket between two other tokens."""
    inside = re.sub(r"\s*([,-])\s*", r"\1", token.removeprefix("[").removesuffix("]").strip())
    negation = "!" if inside.startswith("!") else ""
    inside = inside.removeprefix("!")
    if not token.endswith("]"):
        raise HookNameError(f"{pattern!r} has a '[' without its ']'; {_HOW}")
    if re.fullmatch(r"\d(?:,?\d|-\d)*", inside) and _is_digit(before[-1:], behind[:1]):
        return _characters(inside, negation, token, pattern)  # as in blocks.1[0-3]
    if _NUMBERS.fullmatch(inside):
        return _numbers(inside, negation, token, behind, pattern)
    if _LETTERS.fullmatch(inside):
        return _characters(inside, negation, token, pattern)
    raise HookNameError(_refusal(token, pattern, _remedy(inside, negation)))


def _is_digit(before: str, behind: str) -> bool:
    """Return whether a bracket is one character of a number, judging by its neighbours."""
    return any(each.isdecimal() or each in {"?", "[", "]"} for each in (before, behind) if each)


def _characters(inside: str, negation: str, token: str, pattern: str) -> str:
    descending = [pair for pair in re.findall(r"\w-\w", inside) if pair[0] > pair[2]]
    words = [each for each in inside.split(",") if len(each) > 1 and each[1] != "-"]
    if descending or inside.endswith(",") or ("," in inside and words):
        raise HookNameError(_refusal(token, pattern, _remedy(inside, negation)))
    return f"[{'^.' if negation else ''}{inside.replace(',', '')}]"


def _numbers(inside: str, negation: str, token: str, behind: str, pattern: str) -> str:
    """Write a regular expression for whole numbers."""
    bounds = [(int(first), int(last or first)) for first, last in _RANGE.findall(inside)]
    count = sum(last + 1 - first for first, last in bounds)
    descends = any(first > last for first, last in bounds)
    if descends or re.fullmatch(r"\d\d+", inside):
        raise HookNameError(_refusal(token, pattern, _remedy(inside, negation)))
    if count > _MOST:
        remedy = f"it holds {count} numbers; write one with at most {_MOST}, or '*' for all"
        raise HookNameError(_refusal(token, pattern, remedy))
    if behind.startswith("*") and re.fullmatch(r"\d(?:[-,]\d)*", inside):
        remedy = (
            "it could mean these numbers, or all that begin with them; write '*' for every number, "
            "or the numbers themselves, as in '[0-11]'"
        )
        raise HookNameError(_refusal(f"{token}*", pattern, remedy))
    one = "|".join(str(number) for first, last in bounds for number in range(first, last + 1))
    excluded = rf"(?!(?:{one})(?!\d))\d+" if negation else f"(?:{one})"
    return rf"(?<!\d){excluded}(?!\d)"


def _refusal(token: str, pattern: str, remedy: str) -> str:
    where = f" in {pattern!r}" if token != pattern else ""
    return f"{token!r}{where} is not a valid bracket: {remedy}"


def _remedy(inside: str, negation: str) -> str:
    """Say what to write instead of a bracket."""
    if (found := re.fullmatch(r"(\d*):(\d+)", inside)) and int(found[2]) > int(found[1] or 0):
        low, high = int(found[1] or 0), int(found[2]) - 1
        numbers = f"{low}-{high}" if high > low else f"{low}"
        return f"a range has a hyphen, and its last number is in it; write '[{negation}{numbers}]'"
    if re.fullmatch(r"\d+-\d+|[a-z]-[a-z]|[A-Z]-[A-Z]", inside):
        first, last = inside.split("-")
        return f"a range ascends; write '[{negation}{last}-{first}]'"
    if re.fullmatch(r"\d\d+", inside):
        listed = ",".join(inside)
        return (
            f"write '[{negation}{listed}]' for the numbers {listed.replace(',', ' and ')}, or "
            f"{int(inside)} without a bracket for the one number"
        )
    return _HOW
