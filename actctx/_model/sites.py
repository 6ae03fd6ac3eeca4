"""Find the places of a model that a user's names match."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from actctx._errors import HookNameError, OptionError
from actctx._model.axes import hook_axes
from actctx._model.globs import is_glob, matcher
from actctx._model.places import Place, Places


@dataclass(frozen=True)
class Site:
    """A place to capture from, with its own options. Options that are None come from `capture`.

    Args:
        name: A name, a suffix, a glob or a module of the model.
        slice: What to select along the named axes; see `capture`. `{}` selects everything.
        dtype: The dtype of captured floating-point activations.
        device: The device that captured activations move to.
        io: `"out"` captures the output of the module, `"in"` its input. A hook point has one value
            for both.
        axes: Names for the axes, such as `"batch pos d_model"`. They override those from the name
            of the site and from a run of the model.
        output: Which tensor to capture if a module returns several: a position, or a name in a
            mapping, a dataclass or a `ModelOutput`. With `io="in"`, which input: a position or the
            name of a parameter. By default the first.
        firing: Which firing of each forward to keep if the site fires several times; negative
            numbers count from the last. By default all.
        reduce: A statistic to compute in place of keeping tensors; see `capture`.
        map: A function of what was selected, whose result is kept instead; see `capture`.
        map_axis: The name of the last axis of what `map` returns, or None where it drops the last
            axis.

    Raises:
        OptionError: `io` is neither `"in"` nor `"out"`, `axes` names an axis twice, `firing` is
            not an int, or there is a `map_axis` without `map`.

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
    reduce: Any = None
    map: Callable[[Tensor], Tensor] | None = None
    map_axis: str | None = "feature"

    def __post_init__(self) -> None:
        if self.io not in {"in", "out"}:
            raise OptionError(
                f"Site(io={self.io!r}) is neither 'in' nor 'out'; give io='out' for what the "
                "module returns, or io='in' for what it is given"
            )
        if self.axes is not None and len(set(self.axes.split())) < len(self.axes.split()):
            raise OptionError(
                f"Site(axes={self.axes!r}) names an axis twice; give each axis its own name, in "
                "order, as in axes='batch pos d_model'"
            )
        if self.firing is not None and type(self.firing) is not int:
            raise OptionError(
                f"Site(firing={self.firing!r}) is not the number of a firing; give an int, such "
                "as 0 for the first of each forward or -1 for the last"
            )

        check_map_axis(self.map, self.map_axis)

    def __repr__(self) -> str:
        given = {each.name: (getattr(self, each.name), each.default) for each in fields(self)[1:]}
        changed = [
            f"{name}={value!r}"
            for name, (value, default) in given.items()
            if value is not default and not (isinstance(value, str) and value == default)
        ]
        return f"Site({', '.join([repr(self.name), *changed])})"


def check_map_axis(function: object, axis: object) -> None:
    """Refuse the name of an axis of what no function returns.

    Raises:
        OptionError: There is no function.

    """
    if function is None and axis != "feature":
        raise OptionError(
            f"map_axis={axis!r} is for what map= returns, but there is no map=; give it, too, or "
            "leave map_axis out"
        )


Site.__module__ = "actctx"  # where users find it


Name: TypeAlias = str | nn.Module | Site
Predicate: TypeAlias = Callable[[str], bool]
Names: TypeAlias = Name | Predicate | Iterable[Name | Predicate] | Mapping[str, Name]


@dataclass(frozen=True)
class Request:
    """A requested place, with its options.

    Attributes:
        key: The name under which it is returned.
        place: The place.
        site: The requested options.
        exact: Whether it was requested by name, so that it must fire. A place that a pattern
            matched need not.
        pattern: The suffix or glob that matched it, if any.

    """

    key: str
    place: Place
    site: Site = field(repr=False)
    exact: bool
    pattern: str | None = None


def resolve(model: nn.Module, names: Names) -> list[Request]:
    """Find every place that `names` requests, before the model is touched.

    Raises:
        HookNameError: A name or a pattern matches nothing (the message has the closest names); or
            one place is requested twice under one name with different options.
        OptionError: `names` has a type that is not supported.

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
            "no hook point was requested: the names are empty, or the predicate accepts none (see "
            "actctx.hook_names(model))"
        )
    return list(found.values())


def resolve_sites(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, list[Request]]:
    """Find the places of each of several sites separately.

    Raises:
        HookNameError: A name or a pattern matches nothing (the message has the closest names).
    """
    places = Places(model)
    found = {name: _find(places, None, site) for name, site in sites.items()}
    unknown = [str(sites[name].name) for name, requests in found.items() if not requests]
    if unknown:
        raise HookNameError(_unknown_names(unknown, places))
    return found


def _sites(names: Names) -> Iterator[tuple[str | None, Site | Predicate]]:
    """Yield the requested sites and predicates, each with its alias if it has one."""
    if isinstance(names, Mapping):
        for alias, name in names.items():
            if not isinstance(alias, str):
                raise OptionError(
                    f"the alias {alias!r} is not a string; give one, as in "
                    "{'resid': 'blocks.0.hook_resid_post'}"
                )
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
            f"cannot capture the class {name.__name__!r} together with other names; give a Schema "
            "alone"
        )
    if isinstance(name, str | nn.Module):
        return Site(name)
    raise OptionError(
        f"cannot capture from {name!r}: give a hook name, a glob, a module, a Site, a predicate, "
        "a list of these, or a mapping of aliases to them"
    )


def _find(places: Places, alias: str | None, site: Site | Predicate) -> list[Request]:
    """Resolve one site or predicate; an empty list if it matches nothing."""
    if not isinstance(site, Site):
        return [
            Request(name, places[name], Site(name), exact=False) for name in places.matching(site)
        ]
    if isinstance(site.name, nn.Module):
        return [_find_module(places, alias, site, site.name)]
    pattern = site.name
    # A glob is hardly ever also a name, and checking that would list all modules.
    matched = _matching(places, pattern) if is_glob(pattern) else []
    if not matched and pattern in places:
        return [Request(alias or pattern, places[pattern], site, exact=True)]
    if not is_glob(pattern):
        matched = places.matching(matcher(pattern))
    if len(matched) == 1 and not is_glob(pattern) and _has_number(pattern):  # of one layer
        return [Request(alias or matched[0], places[matched[0]], site, exact=True)]
    before = f"{alias}." if alias not in {None, pattern} else ""
    keys = [alias] if before and len(matched) == 1 else [before + name for name in matched]
    return [
        Request(key or name, places[name], site, exact=False, pattern=pattern)
        for key, name in zip(keys, matched, strict=True)
    ]


def _matching(places: Places, glob: str) -> list[str]:
    """List what a glob matches; a module may also have a name with a bracket in it."""
    try:
        accept = matcher(glob)
    except HookNameError:
        if glob in places:
            return []
        raise
    return places.matching(accept)


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
        own_names = {key, request.key} <= {*request.place.names}
        if (
            same_place
            and _same_options(other.site, request.site)
            and (key == request.key or own_names)
        ):
            found[key] = replace(other, exact=other.exact or request.exact)
            return
    if request.key in found:
        first, second = found[request.key].site.name, request.site.name
        raise HookNameError(
            f"{request.key!r} is requested twice with different options; name each with a mapping, "
            f"such as {{'first': {_shown(first)}, 'second': {_shown(second)}}}"
        )
    found[request.key] = request


def _has_number(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def _shown(name: str | nn.Module) -> str:
    return f"Site({name!r}, ...)" if isinstance(name, str) else "Site(module, ...)"


def _same_options(first: Site, second: Site) -> bool:
    try:
        return bool(replace(first, name="") == replace(second, name=""))
    except (RuntimeError, ValueError):  # slices with tensors have no single truth value
        return first.slice is second.slice


def _layers_beside(name: str, listed: list[str]) -> set[int]:
    """List the numbers of the layers that have what a name requests of another layer."""
    asked = re.match(r"([^\d-]*)-?\d+(\..*)", re.sub(r"\[[^\]]*\]", "0", name))
    if asked is None:
        return set()
    pattern = re.compile(rf"{re.escape(asked[1])}(\d+){re.escape(asked[2])}")
    return {int(found[1]) for each in listed if (found := pattern.fullmatch(each))}


def _of_the_lens(name: str, *, is_translated: bool) -> str:
    """Explain a name that TransformerLens has, possibly with `hook_` before it."""
    parent, dot, last = name.rpartition(".")
    known = not is_glob(name) and hook_axes(name, ()) is not None
    if known and "hook_" in name:
        only = ", or only in a TransformerBridge" if is_translated else ""
        return f"; TransformerLens has names with this ending, but this architecture may not{only}"
    if not known and hook_axes(f"hook_{last}", ()) is not None:
        return f"; hook names of TransformerLens begin with hook_: '{parent}{dot}hook_{last}'"
    return ""


def _is_deeper(places: Places, name: str) -> bool:
    """Return whether a glob would match if it could start at any depth."""
    return is_glob(name) and "." in name and bool(places.matching(matcher(f"**.{name}")))


def _how_to_write(unknown: list[str], places: Places) -> str:
    """Explain how patterns are written, if an unknown name looks like one in another syntax."""
    indexed = next((name for name in unknown if re.search(r"\w\[\d+\]", name)), None)
    deep = next((f"**.{name}" for name in unknown if _is_deeper(places, name)), None)
    hint = ""
    if indexed:
        dotted = re.sub(r"\[(\d+)\]", r".\1", indexed)
        hint += f"; a number is a part of a name: {dotted!r}"
    elif deep:
        hint += f"; a pattern with a dot matches whole names: {deep!r} matches at any depth"
    elif any(is_glob(name) for name in unknown):
        hint += "; in a pattern '*' stays within two dots and '**' spans them"
    if any("{" in name for name in unknown):
        hint += "; braces mean nothing in a pattern: give a list of names, or '[0-3]'"
    return hint


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
    hint += _how_to_write(unknown, places)
    if kind == "module" and any("hook_" in name for name in unknown):
        hint += (
            "; this model has no hook points, its names are those of named_modules(), such as "
            f"{listed[-1]!r}"
        )
    return f"no {kind} matches {', '.join(map(repr, unknown))}{hint} (see actctx.hook_names(model))"
