"""Save captured activations to a safetensors file, and read them back.

The metadata has `axes`, for other readers, and `activations`: everything else that a buffer knows
about its sites, in the order in which they ran. Sites with a mask also have a tensor of positions.
A file with less metadata, or none, is read as far as possible.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._files import describe, read_safetensors, unreadable, write_safetensors
from actctx._model.axes import Axes
from actctx._results.annotations import Sizes
from actctx._stats.kinds import of_state
from actctx._stats.statistic import Statistic
from actctx._text import is_utf8

_KEY = "activations"
_FORMAT = 1
_WITH_STATISTICS = 2
"""The format of a file that has some; earlier versions of actctx refuse it."""
_TAKEN = {"axes", "model", "actctx", "torch", _KEY}
_JOINS = ("batch", "pos")
_INSTEAD = "give a file that acts.save wrote, or another safetensors file"


@dataclass(frozen=True, eq=False)
class SavedSite:
    """One site in a file.

    Attributes:
        names: All of its names.
        axes: The axes of its tensor; `"_"` for unknown ones.
        sizes: Their sizes, None for those that depend on the input.
        tensor: Its value; None if it never fired.
        positions: The sequences and positions of the rows that a mask kept.
        statistic: Its statistic, in place of a tensor.

    """

    names: tuple[str, ...]
    axes: Axes = ()
    sizes: Sizes = ()
    tensor: Shaped[Tensor, "..."] | None = None
    positions: Int64[Tensor, "token 2"] | None = None
    statistic: Statistic | None = None


@dataclass(frozen=True, eq=False)
class Saved:
    """The content of a file.

    Attributes:
        sites: The sites by key, in the order in which they ran.
        join: The axis along which forwards were joined.
        source: The class of the model.
        forwards: The number of forwards that yielded something; 0 if unknown.

    """

    sites: Mapping[str, SavedSite]
    join: str = "batch"
    source: str = ""
    forwards: int = 0


def write_saved(saved: Saved, path: str | PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write captured activations to a file; see `Activations.save`."""
    _check_metadata(metadata)
    tensors = {key: site.tensor for key, site in saved.sites.items() if site.tensor is not None}
    shared: list[str] = []
    sites: dict[str, dict[str, Any]] = {}
    for key, site in saved.sites.items():
        sites[key] = {"names": site.names, "sizes": site.sizes}
        if site.statistic is not None:
            sites[key]["statistic"] = _write_statistic(key, site, tensors, {*saved.sites})
        elif site.tensor is None:
            sites[key] = {"names": site.names, "fired": False}
        if site.positions is not None:  # often those of all sites
            there = [name for name in shared if torch.equal(tensors[name], site.positions)]
            name = there[0] if there else _unused("positions", {*saved.sites, *tensors}, " of rows")
            shared += [] if there else [name]
            tensors[name] = site.positions
            sites[key]["positions"] = name
    has_statistics = any(site.statistic is not None for site in saved.sites.values())
    known = {
        "format": _WITH_STATISTICS if has_statistics else _FORMAT,
        "join": saved.join,
        "forwards": saved.forwards,
        "sites": sites,
    }
    axes = {key: site.axes for key, site in saved.sites.items() if site.tensor is not None}
    described = {**describe(axes, saved.source), _KEY: json.dumps(known)}
    write_safetensors(tensors, path, {**metadata, **described})


def _write_statistic(
    key: str, site: SavedSite, tensors: dict[str, Tensor], taken: set[str]
) -> dict[str, Any]:
    """Put the tensors of a statistic beside the others, and return the rest of it."""
    assert site.statistic is not None  # noqa: S101  the caller has looked
    parts, rest = {}, {}
    for part, value in site.statistic.state_dict().items():
        if isinstance(value, Tensor):
            parts[part] = _unused(f"{key}.{part}", {*taken, *tensors}, "_")
            tensors[parts[part]] = value.detach().contiguous()
        else:
            rest[part] = value
    return {"axes": " ".join(site.axes), "parts": parts, "rest": rest}


def _unused(name: str, taken: set[str], behind: str) -> str:
    while name in taken:
        name += behind
    return name


def _check_metadata(metadata: object) -> None:
    """Refuse metadata that a file cannot store, or that would be overwritten.

    Raises:
        OptionError: It is not a dict of strings, or has one of the file's own keys.

    """
    if not isinstance(metadata, Mapping):
        raise OptionError(f"metadata={metadata!r} is not a dict of strings; give one, or None")
    for key, value in metadata.items():
        if not all(isinstance(each, str) and is_utf8(each) for each in (key, value)):
            raise OptionError(
                f"metadata has {value!r} under {key!r}, but a file maps text to text; give "
                "strings, such as json.dumps(value)"
            )
        if key in _TAKEN:
            raise OptionError(
                f"metadata has {key!r}, which the file defines itself; give it another name"
            )


def read_saved(path: str | PathLike[str]) -> Saved:
    """Read a file; its tensors share the memory-mapped file.

    Raises:
        DataError: There is no such file, it cannot be read, or its metadata does not fit it.

    """
    place, tensors, metadata = read_safetensors(path, _INSTEAD)
    if "actctx" not in metadata:
        return Saved({name: _plain(name, tensor) for name, tensor in tensors.items()})
    try:
        return _understood(metadata, tensors)
    except DataError as error:
        raise DataError(f"cannot read '{place}': {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise unreadable(place, "its metadata is damaged", _INSTEAD) from None


def _plain(name: str, tensor: Tensor) -> SavedSite:
    """Describe a tensor without metadata."""
    return SavedSite((name,), ("_",) * tensor.dim(), (None,) * tensor.dim(), tensor)


def _understood(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Saved:
    """Read metadata that this or another version of actctx wrote.

    Raises:
        DataError: It is of a later version.
        ValueError, TypeError, LookupError, AttributeError: It is not valid.

    """
    known: dict[str, Any] = json.loads(metadata.get(_KEY, "{}"))
    if known.get("format", _FORMAT) > _WITH_STATISTICS:
        raise DataError(
            f"it was written by actctx {metadata['actctx']!r}, whose files this version cannot "
            "read; upgrade actctx to read it"
        )
    axes: dict[str, str] = json.loads(metadata["axes"])
    said: dict[str, dict[str, Any]] = known.get("sites", {key: {} for key in axes})
    sites = {_text(name): _site(name, each, axes.get(name), tensors) for name, each in said.items()}
    used = {each["positions"] for each in said.values() if "positions" in each}
    for each in said.values():
        used.update(each.get("statistic", {"parts": {}})["parts"].values())
    others = [name for name in tensors if name not in sites and name not in used]
    return Saved(
        sites | {name: _plain(name, tensors[name]) for name in others},
        join=_JOINS[_JOINS.index(known.get("join", "batch"))],
        source=_text(metadata["model"]),
        forwards=_count(known.get("forwards", 0)),
    )


def _site(
    name: str, said: Mapping[str, Any], axes: str | None, tensors: Mapping[str, Tensor]
) -> SavedSite:
    names = tuple(map(_text, said.get("names", [name])))
    if said.get("fired", True) is False:
        return SavedSite(names)
    if "statistic" in said:
        return _statistic(names, said, tensors)
    tensor = tensors[name]
    plain = _plain(name, tensor)
    found = plain.axes if axes is None else tuple(axes.split())
    sizes = tuple(said.get("sizes", plain.sizes))
    if len(found) != tensor.dim() or len(sizes) != tensor.dim():
        raise ValueError
    if any(size not in (None, there) for size, there in zip(sizes, tensor.shape, strict=True)):
        raise ValueError
    positions = tensors[said["positions"]] if "positions" in said else None
    if positions is not None and (
        positions.dtype != torch.int64 or positions.shape != (len(tensor), 2)
    ):
        raise ValueError
    return SavedSite(names, found, sizes, tensor, positions)


def _statistic(
    names: tuple[str, ...], said: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> SavedSite:
    found = said["statistic"]
    parts = {part: tensors[name] for part, name in found["parts"].items()}
    axes, sizes = tuple(_text(found["axes"]).split()), tuple(said["sizes"])
    statistic = of_state({**found["rest"], **parts})
    if not isinstance(statistic, Statistic):
        raise TypeError
    return SavedSite(names, axes, sizes, statistic=statistic)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError
    return value
