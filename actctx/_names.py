"""From the names that a user writes to places in a model."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from actctx._axes import hook_axes
from actctx._errors import HookNameError, OptionError
from actctx._places import Place, Places, is_glob, matcher


@dataclass(frozen=True)
class Site:
    """A place to capture from, with options of its own.

    Options that are left at None come from `capture`.

    Args:
        name: A name, a glob or a module of the model.
        slice: What to select along the named axes; see `capture`. `{}` selects everything.
        dtype: The dtype of captured floating-point activations.
        device: The device that captured activations move to.
        io: `"out"` captures what the module returns, `"in"` what it is given. A hook point has
            one value for both.
        axes: Names for the axes of a module whose axes are not known, such as
            `"batch pos d_model"`.
        output: Which tensor to capture of a module that returns several: a position, or a name
            in a mapping, a dataclass or a `ModelOutput`; with `io="in"` of its inputs, by
            position or by the name of the parameter. By default the first.
        firing: Which firing of each forward to keep of a site that fires several times; negative
            ones count from the last. By default all.

    Raises:
        OptionError: `io` is neither `"in"` nor `"out"`, `axes` names an axis twice, or `firing`
            is no int.

    Example:
        >>> Site("blocks.*.attn.hook_pattern", slice={"head": [0, 3]}, dtype=torch.float16)
        Site('blocks.*.attn.hook_pattern', slice={'head': [0, 3]}, dtype=torch.float16)

    """

    name: str | nn.Module
    slice: Any = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    io: Literal["in", "out"] = "out"
    axes: str | None = None
    output: int | str | None = None
    firing: int | None = None

    def __post_init__(self) -> None:
        if self.io not in {"in", "out"}:
            raise OptionError(
                f"Site(io={self.io!r}) is neither 'in' nor 'out'; give io='out' for what the "
                "module returns, or io='in' for what it is given"
            )
        if self.axes is not None and len(set(self.axes.split())) < len(self.axes.split()):
            raise OptionError(
                f"Site(axes={self.axes!r}) names an axis twice; give each axis a name of its own, "
                "in their order, as in axes='batch pos d_model'"
            )
        if self.firing is not None and type(self.firing) is not int:
            raise OptionError(
                f"Site(firing={self.firing!r}) is no number of a firing; give an int, such as 0 "
                "for the first of each forward or -1 for the last"
            )

    def __repr__(self) -> str:
        changed = [
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if name != "name" and value is not None and (name, value) != ("io", "out")
        ]
        return f"Site({', '.join([repr(self.name), *changed])})"


Site.__module__ = "actctx"  # where users find it


Name: TypeAlias = str | nn.Module | Site
Predicate: TypeAlias = Callable[[str], bool]
Names: TypeAlias = Name | Predicate | Iterable[Name | Predicate] | Mapping[str, Name]


@dataclass(frozen=True)
class Request:
    """A place that was asked for, and how.

    Attributes:
        key: The name under which it is handed back.
        place: The place.
        site: The options that it was asked for with.
        exact: Whether it was asked for by its name, so that it must fire; a place that a
            pattern matched may not.

    """

    key: str
    place: Place
    site: Site = field(repr=False)
    exact: bool


def resolve(model: nn.Module, names: Names) -> list[Request]:
    """Find every place that `names` asks for, before the model is touched.

    Raises:
        HookNameError: A name or a pattern matches nothing, with the closest names; or one place
            is asked for twice with different options.
        OptionError: `names` is of a type that names nothing.

    """
    places = Places(model)
    found: dict[str, Request] = {}
    unknown: list[str] = []
    for alias, site in _sites(names):
        requests = _find(places, alias, site)
        if isinstance(site, Site) and not requests:
            unknown.append(str(site.name))
        for request in requests:
            _add(found, request)
    if unknown:
        raise HookNameError(_unknown_names(unknown, places))
    if not found:
        raise HookNameError(
            "no hook point was asked for: the names are empty, or the predicate accepts none "
            "(see actctx.hook_names(model))"
        )
    return list(found.values())


def resolve_sites(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, list[Request]]:
    """Find the places of each of several sites, apart from each other.

    Raises:
        HookNameError: A name or a pattern matches nothing, with the closest names.

    """
    places = Places(model)
    found = {name: _find(places, None, site) for name, site in sites.items()}
    unknown = [str(sites[name].name) for name, requests in found.items() if not requests]
    if unknown:
        raise HookNameError(_unknown_names(unknown, places))
    return found


def _sites(names: Names) -> Iterator[tuple[str | None, Site | Predicate]]:
    """Yield what was asked for, as sites and predicates, with the alias where it has one."""
    if isinstance(names, Mapping):
        for alias, name in names.items():
            yield alias, _as_site(name)
    elif isinstance(names, str | nn.Module | Site):
        yield None, _as_site(names)
    elif callable(names):
        yield None, names
    elif isinstance(names, Iterable):
        for name in names:
            if callable(name) and not isinstance(name, nn.Module | type):
                yield None, name
            else:
                yield None, _as_site(name)
    else:
        yield None, _as_site(names)


def _as_site(name: Any) -> Site:
    if isinstance(name, Site):
        return name
    if isinstance(name, type):
        raise OptionError(
            f"cannot capture the class {name.__name__!r} beside other names; give a Schema by "
            "itself"
        )
    if isinstance(name, str | nn.Module):
        return Site(name)
    raise OptionError(
        f"cannot capture from {name!r}: give a hook name, a glob, a module, a Site, a predicate, "
        "a list of these, or a mapping of aliases to them"
    )


def _find(places: Places, alias: str | None, site: Site | Predicate) -> list[Request]:
    """Resolve one site or predicate, to nothing where it matches nothing."""
    if not isinstance(site, Site):
        return [
            Request(name, places[name], Site(name), exact=False) for name in places.matching(site)
        ]
    if isinstance(site.name, nn.Module):
        return [_find_module(places, alias, site, site.name)]
    pattern = site.name
    # A glob is hardly ever a name, too, for which all modules would have to be listed.
    matched = _matching(places, pattern) if is_glob(pattern) else []
    if not matched and pattern in places:
        return [Request(alias or pattern, places[pattern], site, exact=True)]
    if not matched and "." not in pattern:
        matched = _matching(places, pattern)
    if alias is not None and len(matched) > 1:
        raise HookNameError(
            f"the alias {alias!r} stands for one place, but {pattern!r} matches {len(matched)}: "
            f"{matched[0]!r}, {matched[1]!r}, ...; give the pattern without an alias"
        )
    return [Request(alias or name, places[name], site, exact=False) for name in matched]


def _matching(places: Places, pattern: str) -> list[str]:
    return places.matching(matcher(pattern))


def _find_module(places: Places, alias: str | None, site: Site, module: nn.Module) -> Request:
    names = places.names_of(module)
    if not names:
        raise HookNameError(
            f"the {type(module).__name__} that was given is not a module of this model; "
            "give a module that model.named_modules() lists, or its name"
        )
    name = names[0]
    return Request(alias or name, places[name], site, exact=True)


def _add(found: dict[str, Request], request: Request) -> None:
    """Add a request, unless its place is already there with the same options."""
    for key, other in found.items():
        same_place = other.place is request.place and other.site.io == request.site.io
        if (
            same_place
            and _same_options(other.site, request.site)
            and (key == request.key or key in request.place.names)
        ):
            found[key] = replace(other, exact=other.exact or request.exact)
            return
    if request.key in found:
        raise HookNameError(
            f"{request.key!r} is asked for twice with different options; name each with a "
            f"mapping, such as {{'first': Site({request.key!r}, ...), 'second': Site(...)}}"
        )
    found[request.key] = request


def _same_options(first: Site, second: Site) -> bool:
    try:
        return bool(replace(first, name="") == replace(second, name=""))
    except (RuntimeError, ValueError):  # slices that hold tensors or arrays have no one truth value
        return first.slice is second.slice


def _layers_beside(name: str, listed: list[str]) -> set[int]:
    """Number the layers that do have what a name asks for of another."""
    asked = re.match(r"([^\d-]*)-?\d+(\..*)", name)
    if asked is None:
        return set()
    pattern = re.compile(rf"{re.escape(asked[1])}(\d+){re.escape(asked[2])}")
    return {int(found[1]) for each in listed if (found := pattern.fullmatch(each))}


def _of_the_lens(name: str, *, is_translated: bool) -> str:
    """Say what is to be known of a name that TransformerLens has, or has with `hook_` before it."""
    parent, dot, last = name.rpartition(".")
    known = not is_glob(name) and hook_axes(name, ()) is not None
    if known and "hook_" in name:
        only = ", or only in a TransformerBridge" if is_translated else ""
        return f"; TransformerLens has names that end so, but this architecture may not{only}"
    if not known and hook_axes(f"hook_{last}", ()) is not None:
        return f"; hook names of TransformerLens begin with hook_: '{parent}{dot}hook_{last}'"
    return ""


def _unknown_names(unknown: list[str], places: Places) -> str:
    listed = [name for names in places.listed() for name in names]
    hooked = [name for name in unknown if "hook_" in name and not places.hook_points]
    reasons: dict[str, list[str]] = {}
    for name in hooked:
        reasons.setdefault(places.why_not_translated(name), []).append(repr(name))
    told = [f"no hook point matches {', '.join(reasons[why])}: {why}" for why in reasons if why]
    if told:
        return "; ".join(told)
    if hooked:
        listed += [name for names in places.listed_translated() for name in names]
    lasts = dict.fromkeys(name.rpartition(".")[2] for name in listed)
    closest = dict.fromkeys(
        close
        for name in unknown
        for close in difflib.get_close_matches(
            name, lasts if name.startswith("hook_") else listed, n=3 if len(unknown) == 1 else 1
        )
    )
    has_hooks = places.hook_points or (hooked and places.translation.points)
    kind = "hook point" if has_hooks else "module"
    hint = f"; closest: {', '.join(map(repr, closest))}" if closest else ""
    layers = _layers_beside(unknown[0], listed)
    if layers:
        hint += f"; it has layers {min(layers)} to {max(layers)}"
    elif has_hooks or "hook_" not in unknown[0]:
        hint += _of_the_lens(unknown[0], is_translated=not places.hook_points)
    if any(is_glob(name) for name in unknown):
        hint += "; in a pattern '*' stays within two dots and '**' spans them"
    if any("{" in name for name in unknown):
        hint += "; braces mean nothing in a pattern: give a list of names, or '[0-3]'"
    if kind == "module" and any("hook_" in name for name in unknown):
        hint += (
            "; this model has no hook points, its names are those of named_modules(), such as "
            f"{listed[-1]!r}"
        )
    return f"no {kind} matches {', '.join(map(repr, unknown))}{hint} (see actctx.hook_names(model))"
