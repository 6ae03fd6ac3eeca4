"""From the names that a user writes to places in a model."""

import difflib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from actctx._axes import Axes, hook_axes, running_order
from actctx._errors import HookNameError, OptionError

# Where TransformerLens skips a hook point unless a flag of its config is set.
_FLAGS = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
}


@dataclass(frozen=True, eq=False)
class Place:
    """One hook point or module of a model, under all of its names.

    Attributes:
        name: The name that the model itself gives it.
        names: Every name that it answers to, its aliases included.
        module: The `HookPoint`, or the module whose input or output is captured.
        is_hook_point: Whether the module is a TransformerLens `HookPoint`.
        siblings: The names of all other places of its kind in the model.

    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    is_hook_point: bool
    siblings: Container[str] = field(repr=False)

    @property
    def axes(self) -> Axes | None:
        """The names of the activation's axes, or None where they are not known."""
        if not self.is_hook_point:
            return None
        return hook_axes(self.name, self.siblings, getattr(self.module, "pos_dim", None))


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
            raise OptionError(f"Site(io={self.io!r}) is neither 'in' nor 'out'")
        if self.axes is not None and len(set(self.axes.split())) < len(self.axes.split()):
            raise OptionError(f"Site(axes={self.axes!r}) names an axis twice")

    def __repr__(self) -> str:
        changed = [
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if name != "name" and value is not None and (name, value) != ("io", "out")
        ]
        return f"Site({', '.join([repr(self.name), *changed])})"


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


def is_hook_point(module: nn.Module) -> bool:
    """Recognise a TransformerLens `HookPoint` of any generation without importing it."""
    return "fwd_hooks" in vars(module) and hasattr(type(module), "add_hook")


def uncompiled(model: nn.Module) -> nn.Module:
    """Return what `torch.compile` wrapped, whose names are those that a user knows."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def find_places(model: nn.Module) -> dict[str, Place]:
    """Map every name in a model to its place: hook points first, then modules.

    Names of one place share one `Place`. The order is that of registration, in which the layers
    of a model are listed as they run.
    """
    model = uncompiled(model)
    hook_points: Mapping[str, nn.Module] = getattr(model, "hook_dict", None) or {}
    places = _group(hook_points, hook_points)
    modules = dict(model.named_modules(remove_duplicate=False))
    hooked = {id(module) for module in hook_points.values()}
    rest = {name: module for name, module in modules.items() if id(module) not in hooked}
    return places | {name: p for name, p in _group(rest, modules).items() if name not in places}


def _group(named: Mapping[str, nn.Module], siblings: Mapping[str, nn.Module]) -> dict[str, Place]:
    names: dict[int, list[str]] = {}
    for name, module in named.items():
        names.setdefault(id(module), []).append(name)
    places = {}
    for group in names.values():
        module = named[group[0]]
        hooked = is_hook_point(module)
        own = vars(module).get("name") if hooked else None
        canonical = own if own in group else group[0]
        everything = (canonical, *(name for name in group if name != canonical))
        place = Place(canonical, everything, module, hooked, siblings)
        places.update(dict.fromkeys(group, place))
    return places


def hook_names(model: nn.Module, pattern: str | None = None) -> list[str]:
    """List what can be captured from a model, aliases included.

    Args:
        model: A TransformerLens model, whose hook points are listed, or any module, whose
            submodules are.
        pattern: A glob that the names must match; see `capture`.

    Returns:
        The names, aliases directly behind their canonical name. Hook points come in the order
        in which a block that normalizes first runs them (one that normalizes last, as BERT's,
        runs its norms later); modules come in the order of their definition.

    Example:
        >>> hook_names(model, "blocks.0.hook_resid_*")
        ['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_mid', 'blocks.0.hook_resid_post']

    """
    listed = dict.fromkeys(name for place in _listed(find_places(model)) for name in place.names)
    return [name for name in listed if pattern is None or matches(name, pattern)]


def _listed(places: Mapping[str, Place]) -> list[Place]:
    """Keep what a pattern may match: hook points where there are any, else modules."""
    unique = list(dict.fromkeys(places.values()))
    hook_points = [place for place in unique if place.is_hook_point]
    return _in_layer_order(hook_points) or [place for place in unique if place.name]


def _in_layer_order(places: list[Place]) -> list[Place]:
    """Sort hook points as they run; a bridge lists them alphabetically, layer 10 before layer 2."""
    return sorted(places, key=lambda place: running_order(place.name))


def matches(name: str, pattern: str) -> bool:
    """Tell whether a dotted name matches a glob.

    `*`, `?` and `[0-3]` stay within one component of the name, `**` spans any number of them. A
    pattern without a dot matches the last component, at any depth, as in a `.gitignore`.
    """
    if "." not in pattern and pattern != "**":
        return fnmatchcase(name.rpartition(".")[2], pattern)
    return _match_parts(name.split("."), pattern.split("."))


def _match_parts(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_match_parts(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return (
        bool(parts) and fnmatchcase(parts[0], pattern[0]) and _match_parts(parts[1:], pattern[1:])
    )


def resolve(model: nn.Module, names: Names) -> list[Request]:
    """Find every place that `names` asks for, before the model is touched.

    Raises:
        HookNameError: A name or a pattern matches nothing, with the closest names; or one place
            is asked for twice with different options.
        OptionError: `names` is of a type that names nothing.

    """
    places = find_places(model)
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
            yield (
                None,
                name if callable(name) and not isinstance(name, nn.Module) else _as_site(name),
            )
    else:
        yield None, _as_site(names)


def _as_site(name: Any) -> Site:
    if isinstance(name, Site):
        return name
    if isinstance(name, str | nn.Module):
        return Site(name)
    raise OptionError(
        f"cannot capture from {name!r}: give a hook name, a glob, a module, a Site, a predicate, "
        "a list of these, or a mapping of aliases to them"
    )


def _find(places: Mapping[str, Place], alias: str | None, site: Site | Predicate) -> list[Request]:
    """Resolve one site or predicate, to nothing where it matches nothing."""
    if not isinstance(site, Site):
        return [
            Request(name, place, Site(name), exact=False) for name, place in _matching(places, site)
        ]
    if isinstance(site.name, nn.Module):
        return [_find_module(places, alias, site)]
    if site.name in places:
        return [Request(alias or site.name, places[site.name], site, exact=True)]
    pattern = site.name
    is_pattern = _is_glob(pattern) or "." not in pattern
    matched = _matching(places, lambda name: matches(name, pattern)) if is_pattern else []
    if alias is not None and len(matched) > 1:
        raise HookNameError(
            f"the alias {alias!r} stands for one place, but {pattern!r} matches {len(matched)}: "
            f"{matched[0][0]!r}, {matched[1][0]!r}, ...; give the pattern without an alias"
        )
    return [
        Request(alias or name, place, replace(site, name=name), exact=False)
        for name, place in matched
    ]


def _matching(places: Mapping[str, Place], accept: Predicate) -> list[tuple[str, Place]]:
    """List what `accept` matches, each place once, under the first of its names that matches."""
    for candidates in (_listed(places), _modules(places)):
        named = [(next(filter(accept, place.names), None), place) for place in candidates]
        matched = [(name, place) for name, place in named if name is not None]
        if matched:
            return matched
    return []


def _modules(places: Mapping[str, Place]) -> list[Place]:
    """List the modules that a pattern may match; a bridge's wrapped ones only by their name."""
    return [
        place
        for place in dict.fromkeys(places.values())
        if not place.is_hook_point and place.name and "_original_component" not in place.name
    ]


def _find_module(places: Mapping[str, Place], alias: str | None, site: Site) -> Request:
    for name, place in places.items():
        if place.module is site.name:
            return Request(alias or name, place, replace(site, name=name), exact=True)
    raise HookNameError(
        f"the {type(site.name).__name__} that was given is not a module of this model; "
        "give a module that model.named_modules() lists, or its name"
    )


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


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


def _unknown_names(unknown: list[str], places: Mapping[str, Place]) -> str:
    listed = [name for place in _listed(places) for name in place.names]
    closest = dict.fromkeys(
        close
        for name in unknown
        for close in difflib.get_close_matches(name, listed, n=3 if len(unknown) == 1 else 1)
    )
    kind = "hook point" if any(place.is_hook_point for place in places.values()) else "module"
    hint = f"; closest: {', '.join(map(repr, closest))}" if closest else ""
    if any(_is_glob(name) for name in unknown):
        hint += "; in a pattern '*' stays within two dots and '**' spans them"
    return f"no {kind} matches {', '.join(map(repr, unknown))}{hint} (see actctx.hook_names(model))"


def why_it_never_fires(model: nn.Module, place: Place) -> str | None:
    """Say why a hook point can never fire as the model is set up now, and how to change that."""
    config = getattr(model, "cfg", None)
    for ending, flag in _FLAGS.items():
        if place.is_hook_point and place.name.endswith(ending) and not getattr(config, flag, True):
            return f"{flag} is off: call model.set_{flag}(True) first"
    return None
