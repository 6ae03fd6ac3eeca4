"""Translate the names of a data set's columns between users and Lance, also in conditions."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from actctx._errors import NotCapturedError, OptionError
from actctx._model.globs import meant
from actctx._store.site_columns import FLOAT8, StoredSite, is_known_to_others
from actctx._text import shortened

# The strings of a condition, and its names in backticks.
_READ_AHEAD_BYTES = 2**25
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`((?:[^`]|``)*)`")
# What stands for a value that is given elsewhere.
_PLACEHOLDER = re.compile(r"\?|\$\w|(?<!:):[A-Za-z_]")


def find_site(
    sites: Mapping[str, StoredSite], name: str, others: Collection[str] = ()
) -> StoredSite:
    """Find the one site that a name means: one it is read under, its hook's, or an ending.

    Args:
        sites: The sites to look among, by name.
        name: The name.
        others: What else could have been meant, for the message.

    Raises:
        NotCapturedError: It is not there, or there are several of the hook.

    """
    found = meant_sites(sites, name) if isinstance(name, str) else {}
    if len(found) == 1:
        return sites[next(iter(found))]
    if found:
        raise NotCapturedError(
            f"the data set has {name!r} several times, so read one of "
            f"{shortened([*map(repr, found)])}"
        )
    aliased = {key: site.hook for key, site in sites.items() if "." not in key and key != site.hook}
    closest = difflib.get_close_matches(str(name), [*sites, *others, *aliased.values()], n=3)
    hint = f"closest: {', '.join(map(repr, closest))}; " if closest else ""
    there = [
        f"{key!r} (of {aliased[key]!r})" if key in aliased else repr(key)
        for key in (*sites, *others)
    ]
    raise NotCapturedError(f"the data set has no {name!r}; {hint}it has {shortened(there)}")


def find_sites(
    sites: Mapping[str, StoredSite], asked: str | Iterable[str] | None
) -> dict[str, StoredSite]:
    """Find several sites, all of them by default.

    Args:
        sites: The sites to look among, by name.
        asked: Their names, or those of their hooks, or endings or globs of either, as in
            `capture`.

    Returns:
        Each site under the name that it was asked for by, or the first that a glob matches.

    Raises:
        NotCapturedError: One is not there, or there are several of a hook.
        OptionError: It is not a name.

    """
    if asked is None:
        return dict(sites)
    names = [*asked] if isinstance(asked, Iterable) and not isinstance(asked, str) else [asked]
    for name in names:
        if not isinstance(name, str):
            raise OptionError(
                f"sites= has {name!r}, which is not a name; give names of sites, or globs, of "
                f"{shortened([*map(repr, sites)])}"
            )
    chosen: dict[str, StoredSite] = {}
    for name in names:
        found = meant_sites(sites, name)
        if not found or name in found.values():
            chosen[name] = find_site(sites, name)
            continue
        for key, matched in found.items():
            is_alone = [*found.values()].count(matched) == 1
            chosen[matched if is_alone else key] = sites[key]
    return chosen


def meant_sites(sites: Mapping[str, StoredSite], name: str) -> dict[str, str]:
    """Find which sites a name means, by their keys, and by which name; see `meant`."""
    return meant(name, {key: (*site.names, site.hook) for key, site in sites.items()})


def as_lance_reads(where: str, sites: Mapping[str, StoredSite], others: Collection[str]) -> str:
    """Put the names of columns in place of those of sites, which stand in backticks.

    Raises:
        OptionError: It is not a string, or a name in it is unknown or lacks its backticks.

    """
    if not isinstance(where, str):
        raise OptionError(
            f"where={where!r} is not a condition; give a string, as in SQL, such as 'position > 0'"
        )

    def column(part: re.Match[str]) -> str:
        if part[1] is None or part[1] in others:
            return part[0]
        try:
            site = find_site(sites, part[1].replace("``", "`"), others)
        except NotCapturedError as error:
            raise OptionError(f"where={where!r} is not a condition on rows: {error}") from None
        _refuse_bits(where, site)
        return f"`{site.column}`"

    bare = _QUOTED.sub(" ", where)
    for name in sorted(sites, key=len, reverse=True):
        if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", bare):
            continue
        if name != sites[name].column:
            what = "dots" if "." in name else "such characters"
            raise OptionError(
                f"where={where!r} names {name!r} without backticks, which names with {what} need; "
                f"write {_in_backticks(name)}"
            )
        _refuse_bits(where, sites[name])
    _check_whole(where, bare)
    end = "\n" if "--" in bare else ""  # where a comment ends
    return f"({_QUOTED.sub(column, where)}{end})"  # without parentheses, Lance may read a part


def _in_backticks(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _check_whole(where: str, bare: str) -> None:
    """Refuse what would end before its end, or what has no value."""
    depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            raise OptionError(
                f"where={where!r} is not a condition on rows: it closes a parenthesis that it does "
                "not open"
            )
    if found := _PLACEHOLDER.search(bare):
        raise OptionError(
            f"where={where!r} has the placeholder {found[0]!r}; write the value itself, as in an "
            "f-string"
        )


def _refuse_bits(where: str, site: StoredSite) -> None:
    if not is_known_to_others(site.torch_dtype):
        raise OptionError(
            f"where={where!r} compares {site.name!r}, which is {site.dtype}, as Lance cannot; read "
            f"the rows and compare them, as in data[:][{site.name!r}]{_cast(site)} > 0"
        )


def _cast(site: StoredSite) -> str:
    return ".float()" if site.torch_dtype in FLOAT8 else ""  # which torch cannot compare either


def rows_where(
    lance: Any, condition: str, *, batch_size: int, refused: Callable[[Exception], OptionError]
) -> Iterator[Int64[np.ndarray, " match"]]:
    """Find the rows that match a condition, some at a time, in any order.

    Args:
        lance: The Lance dataset.
        condition: The condition, as Lance reads it.
        batch_size: The rows to compare at a time.
        refused: Says what is wrong with the condition, in place of an error of Lance's.

    """
    scanner = lance.scanner(
        columns=["_rowoffset"],
        filter=condition,
        batch_size=batch_size,
        io_buffer_size=_READ_AHEAD_BYTES,
    )
    try:
        scanner.explain_plan()
    except (ValueError, OSError) as error:
        raise refused(error) from None
    try:
        scanner.count_rows()  # see the note on takes and scans
        for found in scanner.to_batches():
            yield found["_rowoffset"].to_numpy().astype(np.int64)
    except (ValueError, OSError) as error:
        if "Execution error" not in str(error):  # but one of reading
            raise
        raise refused(error) from None


def why_refused(reason: str, sites: Mapping[str, StoredSite], others: Collection[str]) -> str:
    """Explain what is wrong with a condition, in place of what Lance says."""
    unknown = re.match(r".*No field named (.+?)\. (?:Valid fields are|Did you mean)", reason)
    deep = next((site for site in sites.values() if len(site.shape) > 1), None)
    if deep is not None and "array_element does not support type" in reason:
        return (
            "a condition numbers the elements of a site in one line, from 1 on; of "
            f"{_in_backticks(deep.name)}, with the shape {deep.shape}, give one number from 1 to "
            f"{math.prod(deep.shape)}"
        )
    if unknown is None:
        return as_users_write(reason, sites)
    there = ", ".join([*others, *map(_in_backticks, sites)])
    return (
        f"there is no column {unknown[1]}; the columns are {there}; strings need single quotes, as "
        "in label = 'yes'"
    )


def as_users_write(text: str, sites: Mapping[str, StoredSite]) -> str:
    """Put the names of sites in place of those of columns, in what Lance says."""
    for site in sorted(sites.values(), key=lambda site: len(site.column), reverse=True):
        if site.name != site.column:
            text = text.replace(f'"{site.column}"', f"`{site.name}`")
            text = text.replace(site.column, site.name)
    return text
