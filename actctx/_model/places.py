"""The places of a model: its hook points and modules, under all of their names."""

import functools
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from torch import nn

from actctx._model.axes import Axes, hook_axes, running_order, ungrouped
from actctx._model.globs import is_glob, matcher, matches
from actctx._model.hugging_face import is_hugging_face, translate, why_wrapped
from actctx._model.translation import Readout, Translation


@dataclass(frozen=True, eq=False)
class Place:
    """One hook point or module of a model, under all of its names.

    Attributes:
        name: The name that the model itself gives it.
        names: All of its names, including aliases.
        module: The `HookPoint`, or the module whose input or output is captured.
        is_hook_point: Whether the module is a TransformerLens `HookPoint`.
        siblings: The names of all other places of its kind in the model.
        readout: How to get the value of a hook point from a Hugging Face module.
        ungrouped: Whether the model repeats grouped keys and values for every head.

    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    is_hook_point: bool
    siblings: Container[str] = field(repr=False)
    ungrouped: bool = False
    readout: Readout | None = None

    @functools.cached_property
    def axes(self) -> Axes | None:
        """The names of the activation's axes, or None where they are not known."""
        if not self.is_hook_point and self.readout is None:
            return None
        axes = hook_axes(self.name, self.siblings, getattr(self.module, "pos_dim", None))
        return ungrouped(axes) if self.ungrouped else axes


class Places:
    """All names in a model: those of its hook points, then those of its modules.

    Names of one module are one place. It is created only when it is requested, since a model has
    thousands.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model = uncompiled(model)
        self.hook_points: Mapping[str, nn.Module] = getattr(model, "hook_dict", None) or {}
        self._made: dict[int, Place] = {}
        self._translated: dict[str, Place] = {}
        config = getattr(model, "cfg", None)
        self._ungrouped = bool(getattr(config, "ungroup_grouped_query_attention", False))

    def __contains__(self, name: str) -> bool:
        if name in self.hook_points or name in self.modules:
            return True
        return "hook_" in name and self.translation.canonical(name) is not None

    def __getitem__(self, name: str) -> Place:
        if name not in self.hook_points and name not in self.modules:
            return self._read(self.translation.canonical(name) or "")
        named = self.hook_points if name in self.hook_points else self.modules
        module = named[name]
        if id(module) not in self._made:
            names = self.names_of(module)
            hooked = is_hook_point(module)
            self._made[id(module)] = Place(
                names[0], tuple(names), module, hooked, named, self._ungrouped
            )
        return self._made[id(module)]

    @functools.cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules that are not hook points; a bridge has thousands, so only when needed."""
        hooked = {id(module) for module in self.hook_points.values()}
        modules = self._model.named_modules(remove_duplicate=False)
        return {name: module for name, module in modules if id(module) not in hooked}

    @functools.cached_property
    def _hook_point_names(self) -> Mapping[int, list[str]]:
        return _grouped(self.hook_points)

    @functools.cached_property
    def _module_names(self) -> Mapping[int, list[str]]:
        return _grouped(self.modules)

    @functools.cached_property
    def translation(self) -> Translation:
        """TransformerLens' names, if the model is a plain Hugging Face model."""
        if self.hook_points:
            return Translation()
        wrapped = "" if is_hugging_face(self._model) else why_wrapped(self._model)
        if not wrapped and hasattr(getattr(self._model, "config", None), "model_type"):
            return translate(self._model, self.modules)
        return Translation(lacks=wrapped)

    def _read(self, name: str) -> Place:
        if name not in self._translated:
            module, readout = self.translation.points[name]
            self._translated[name] = Place(
                name,
                tuple(self.translation.names[name]),
                self.modules[module],
                is_hook_point=False,
                siblings=self.translation.siblings,
                readout=readout,
            )
        return self._translated[name]

    def names_of(self, module: nn.Module) -> list[str]:
        """List the names of a module, the model's own name first."""
        names = self._hook_point_names.get(id(module)) or self._module_names.get(id(module), [])
        own = vars(module).get("name") if is_hook_point(module) else None
        return [own, *(name for name in names if name != own)] if own in names else names

    def listed(self) -> list[list[str]]:
        """List the names that patterns match first: hook points in running order, else modules.

        A bridge lists its hook points alphabetically, layer 10 before layer 2.
        """
        return sorted(self._hooked(), key=_running_order) or self.listed_modules()

    def _hooked(self) -> list[list[str]]:
        return self._unique(self.hook_points) or [
            names for names in self._unique(self.modules) if is_hook_point(self.modules[names[0]])
        ]

    def listed_modules(self) -> list[list[str]]:
        """List the names of modules, without those that a bridge wrapped."""
        return [names for names in self._unique(self.modules) if _is_listed(names[0])]

    def why_not_translated(self, wanted: str) -> str:
        """Explain why a name or a pattern matches nothing in a plain Hugging Face model."""
        found = self.translation
        if not found.points:
            return found.lacks
        inside = (name for name in found.inside if name == wanted or matches(name, wanted))
        name = next(inside, None)
        return "" if name is None else found.why_not(name)

    def listed_translated(self) -> list[list[str]]:
        """List TransformerLens' names in a plain Hugging Face model, in running order."""
        return sorted(self.translation.names.values(), key=_running_order)

    def matching(self, accept: Callable[[str], bool]) -> list[str]:
        """List what `accept` accepts, each place once, under its first accepted name."""
        return [next(filter(accept, names)) for names in self.accepted(accept)]

    def accepted(self, accept: Callable[[str], bool]) -> list[list[str]]:
        """List the names of each place that has an accepted name.

        Hook points are tried first, then modules. In a plain Hugging Face model, modules are tried
        first, then TransformerLens' names.
        """
        accepted = self._accepted(self.hook_points, accept)
        if not accepted:
            named = {name: self.modules[name] for name in self.modules if _is_listed(name)}
            modules = self._accepted(named, accept)
            accepted = [names for names in modules if is_hook_point(named[names[0]])]
            if modules and not accepted:
                return modules
            translated = self.translation.names.values()
            accepted = accepted or [names for names in translated if any(map(accept, names))]
        # Sorted at the end, since only a few of a model's names are requested.
        return sorted(accepted, key=_running_order)

    def _accepted(
        self, named: Mapping[str, nn.Module], accept: Callable[[str], bool]
    ) -> list[list[str]]:
        modules = {id(named[name]): named[name] for name in filter(accept, named)}
        # Without the names of what a bridge wrapped.
        return [
            [name for name in self.names_of(module) if name in named] for module in modules.values()
        ]

    def _unique(self, named: Mapping[str, nn.Module]) -> list[list[str]]:
        unique = {id(module): module for module in named.values()}
        return [self.names_of(module) for module in unique.values()]


def _grouped(named: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in named.items():
        names.setdefault(id(module), []).append(name)
    return names


def _running_order(names: list[str]) -> tuple[int, ...]:
    return running_order(names[0])


def _is_listed(name: str) -> bool:
    return bool(name) and "_original_component" not in name


def is_hook_point(module: nn.Module) -> bool:
    """Recognize a TransformerLens `HookPoint` of any generation without importing it."""
    return "fwd_hooks" in vars(module) and hasattr(type(module), "add_hook")


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`'s wrapper, which has the names that a user knows."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def hook_names(model: nn.Module, pattern: str | Callable[[str], bool] | None = None) -> list[str]:
    """List what can be captured from a model, aliases included.

    Args:
        model: For a TransformerLens model, hook points are listed. For any other module, submodules
            are listed; on a plain Hugging Face model, TransformerLens' hook names come before them.
        pattern: A name, a suffix, a glob or a predicate, with the same meaning as in `capture`:
            hook points, or else modules; on a plain Hugging Face model modules, or else hook names.

    Returns:
        The names, with aliases directly after their canonical name. Hook points come in the order
        in which a pre-norm block runs them (a post-norm block, as in BERT, runs its norms later);
        modules come in the order of their definition.

    Raises:
        HookNameError: The pattern has an invalid bracket.

    Example:
        >>> hook_names(model, "blocks.0.hook_resid_*")
        ['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_mid', 'blocks.0.hook_resid_post']

    """
    places = Places(model)
    if pattern is None:
        if not places.hook_points:
            listed = [*places.listed_translated(), *places.listed()]
        else:
            listed = places.listed()
        return [*dict.fromkeys(name for names in listed for name in names)]
    if isinstance(pattern, str) and not is_glob(pattern) and pattern in places:
        return [pattern]
    accept = pattern if callable(pattern) else matcher(pattern)
    return [name for names in places.accepted(accept) for name in filter(accept, names)]


hook_names.__module__ = "actctx"  # where users find it
