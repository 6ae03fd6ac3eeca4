"""Compare two descriptions of models, and say what differs."""

import base64
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeAlias

from actctx._errors import DataError
from actctx._model.digest import is_alike, is_sketch

Fact: TypeAlias = tuple[str, Any, Any]
"""Its name, its old value and its new value."""

FINGERPRINT = "model's fingerprint"
"""What is compared for data sets of earlier versions, which have nothing else."""

ANEW = (
    "if a part of the model is initialised at random each time it is loaded, such as a head that "
    "was not saved, call torch.manual_seed() before loading it; a model in another dtype is also "
    "another model"
)
"""What to do if only the weights of a model differ."""

_NAMES = {
    "weights": "weight {!r}",
    "buffers": "buffer {!r}",
    "computed": "buffer {!r}",
    "modules": "class of {!r}",
    "functions": "function {!r}",
    "config": "setting {!r}",
    "attributes": "setting {!r}",
    "run": "{}",
}
"""The sections of a description, and the term for an entry of each."""

_OPTIONAL = {"attributes", "run"}
"""Sections in which a missing entry is not a difference: attributes appear with their first use."""

_OF_VERSIONS = {"computed", "modules", "config"}
"""Sections in which a missing entry may be due to another version of a library."""

_DIGESTED = re.compile(r"^(.+) [0-9a-f]{8}$")

_MOST_BYTES = 2**26  # of settings, unpacked


def differences(
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    versions_differ: bool,
    is_run: bool = True,
    changing: Collection[str] = (),
    spared: Collection[str] = (),
) -> Iterator[Fact]:
    """Compare two descriptions of models.

    Args:
        was: The description in a data set.
        now: The description from `describe_model`.
        versions_differ: Whether other versions of the libraries wrote the data set.
        is_run: Whether it matters how the model is run: autocast, and hooks of others.
        changing: The places whose hooks have changed values.
        spared: The names of settings that may differ.

    Raises:
        DataError: The description in the data set is damaged.

    """
    here = unpacked(now)
    if "settings" not in was:
        if was.get("fingerprint") != here["parameters"]:
            yield FINGERPRINT, was.get("fingerprint"), here["parameters"]
        return
    there = unpacked(was)
    passed = {*spared, *there.get("states", ())}
    if there.get("python") != here["python"]:  # the same code then has other bytes
        here, there = map(_without_digests, (here, there))
    for section, name in _NAMES.items():
        if section == "run" and not is_run:
            continue
        old, new = there.get(section, {}), here[section]
        may_lack = section in _OPTIONAL or (versions_differ and section in _OF_VERSIONS)
        for key in dict.fromkeys((*old, *new)):
            is_passed = key in passed or (may_lack and (key not in old or key not in new))
            if not is_passed and not is_alike(old.get(key), new.get(key)):
                yield name.format(key), _shown(old.get(key)), _shown(new.get(key))
    if is_run:
        yield from _of_hooks(there, here, changing)


def summed_up(facts: Iterator[Fact]) -> Iterator[Fact]:
    """Return the first of several differences, with their number."""
    found = [*facts]
    for name, was, now in found[:1]:
        yield name if len(found) == 1 else f"{name} (1 of {len(found)} differences)", was, now


def is_of_weights(fact: Fact) -> bool:
    """Return whether a difference is in weights, which may be initialised at random."""
    return fact[0] == FINGERPRINT or fact[0].startswith("weight ")


def _of_hooks(
    there: Mapping[str, Any], here: Mapping[str, Any], changing: Collection[str]
) -> Iterator[Fact]:
    known = there.get("hooks", {})
    for place in dict.fromkeys((*known, *changing)):
        old, new = known.get(place, []), here["hooks"].get(place, [])
        pairs = zip(old, new, strict=False)
        is_same = all(a == c and b in {d, ""} for (a, b), (c, d) in pairs)
        if len(old) != len(new) or not is_same:
            yield f"hooks on the {place}", _joined(old), _joined(new)


def _without_digests(settings: dict[str, Any]) -> dict[str, Any]:
    """Reduce the descriptions of functions to their names."""
    named = {
        section: {key: _name_of(value) for key, value in settings.get(section, {}).items()}
        for section in ("functions", "attributes", "config")
    }
    hooks = {
        place: [[name, ""] for name, _ in there]
        for place, there in settings.get("hooks", {}).items()
    }
    return {**settings, **named, "hooks": hooks}


def _name_of(value: Any) -> Any:
    return _DIGESTED.sub(r"\1", value) if isinstance(value, str) else value


def _joined(hooks: list[list[str]]) -> list[str]:
    return [" ".join(filter(None, hook)) for hook in hooks]


def _shown(value: Any) -> Any:
    return f"{value[0]} ~{value[1]}" if is_sketch(value) else value


def packed(settings: Mapping[str, Any]) -> str:
    """Write settings compactly, since most repeat from layer to layer."""
    written = json.dumps(settings, separators=(",", ":")).encode()
    return base64.b64encode(zlib.compress(written, 9)).decode()


def unpacked(described: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of a description.

    Raises:
        DataError: They are damaged.

    """
    try:
        compressed = base64.b64decode(described["settings"], validate=True)
        found = json.loads(zlib.decompressobj().decompress(compressed, _MOST_BYTES))
        sections = [found.get(name, {}) for name in (*_NAMES, "hooks")]
        states = found.get("states", [])
    except (ValueError, TypeError, AttributeError, zlib.error) as error:
        raise _damaged(error) from error
    if not all(isinstance(each, dict) for each in sections):
        raise _damaged("a section is not a dict")
    if not isinstance(states, list):
        raise _damaged("a section is not a list")
    if not all(map(_are_hooks, found.get("hooks", {}).values())):
        raise _damaged("a hook is not a name and a digest")
    return dict(found)


def _are_hooks(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, list) and [type(part) for part in each] == [str, str] for each in value
    )


def _damaged(reason: object) -> DataError:
    return DataError(
        f"what the data set says of its model is damaged ({reason}), so no model can be compared "
        "with it; give another path"
    )
