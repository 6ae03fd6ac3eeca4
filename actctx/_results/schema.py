"""Typed results: a class that declares what to capture, with axes and dtypes."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Never,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor, nn

from actctx._errors import HookNameError, NotCapturedError, OptionError, TypedError
from actctx._model.sites import Request, Site, resolve_sites
from actctx._results.activations import Activations
from actctx._results.annotations import Claim, hold, is_array_type, shown, suggested
from actctx._results.column import Column
from actctx._results.joined import stack_in_place
from actctx._results.layers import check_layers, in_layers, several_in, stack_layers
from actctx._select.mapped import AXIS, MapFunction
from actctx._stats.statistic import Statistic
from actctx._text import counted


class Field:
    """A field of a `Schema`: a site and an annotation."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.name = self.what = ""
        self.owner: type = object
        self.hint: Any = None
        self.is_dict = self.is_statistic = False

    def of(self, owner: type, name: str) -> "Field":
        """Return the field for a class, since one `site(...)` may be used in several."""
        field = Field(self.site)
        field.owner, field.name, field.what = owner, name, f"{owner.__name__}.{name}"
        return field

    def __reduce__(self) -> tuple[Any, ...]:
        # By its class, like a method, since the site may refer to a module of the model.
        return (getattr, (self.owner, self.name))

    def __repr__(self) -> str:
        return repr(self.site).replace("Site", "site", 1)

    def __get__(self, schema: "Schema | None", owner: type) -> Any:
        return self if schema is None else schema._read(self)

    def __set__(self, schema: "Schema", value: object) -> Never:
        raise AttributeError(f"{self.what} is a captured value, and cannot be set")

    def apart(self) -> str:
        """Return the annotation for layers that are not stacked."""
        return f"dict[str, {suggested(self.hint, self.hint.dim_str.split()[1:])}]"

    def annotate(self, hint: object) -> None:
        """Read the annotation: a tensor, or a dict of tensors by hook name."""
        self.is_dict = get_origin(hint) is dict and get_args(hint)[0] is str
        self.hint = get_args(hint)[1] if self.is_dict else hint
        self.is_statistic = _is_statistic(self.hint)
        if self.is_statistic:
            return
        if not is_array_type(self.hint) or not issubclass(Tensor, self.hint.array_type):
            raise OptionError(
                f"{self.what} is annotated {shown(hint)}; annotate it as a tensor, such as "
                'Float[Tensor, "batch pos d_model"], or as a dict[str, ...] of tensors'
            )

    def check_kind(self, reduce: Statistic | None) -> None:
        """Compare the annotation with what is kept: a tensor, or a statistic.

        Raises:
            TypedError: It is of the other, or of another statistic.

        """
        if reduce is None and not self.is_statistic:
            return
        name = self.hint.__name__ if self.is_statistic else shown(self.hint)
        if reduce is None:
            raise TypedError(
                f"{self.what} is annotated {name}, but tensors are captured there; write "
                f"site({self.site.name!r}, reduce={name}())"
            )
        if not self.is_statistic or not isinstance(reduce, self.hint):
            kind = type(reduce).__name__
            raise TypedError(
                f"{self.what} is annotated {name}, but reduce= computes a {kind}; annotate it as "
                f"{kind}, or leave reduce= out"
                if not self.is_statistic
                else f"{self.what} is annotated {name}, but reduce= computes a {kind}; annotate it "
                f"as {kind}, or give reduce= a {name}"
            )


@dataclass(frozen=True, eq=False)
class Part:
    """A field with its sites in a model.

    Attributes:
        field: The field.
        keys: The keys in the buffer, by hook name, layer by layer.
        is_stacked: Whether the layers become one tensor.

    """

    field: Field
    keys: Mapping[str, str]
    is_stacked: bool

    def claims(self, activations: Activations) -> list[Claim]:
        """List the claims to check, once its sites have fired."""
        if self.field.is_statistic:  # which was compared with the annotation before
            return []
        columns = self._columns(activations)
        outlines = {name: column.outline() for name, column in columns.items()}
        axes = next((column.label.axes for column in columns.values()), ())
        if self.is_stacked and outlines:
            outlines = {str(self.field.site.name): stack_layers(outlines)}
            axes = ("layer", *axes)
        return [
            Claim(f"{self.field.what}, from {name!r},", outline, self.field.hint, axes)
            for name, outline in outlines.items()
        ]

    def read(self, activations: Activations) -> Any:
        """Return the tensor, or the dict of tensors by hook name."""
        if not self.is_stacked and not self.field.is_dict:
            return activations[next(iter(self.keys.values()))]
        columns = self._columns(activations)
        if self.field.is_dict:
            return {name: column.read(0) for name, column in columns.items()}
        if not columns:
            return activations[next(iter(self.keys.values()))]  # raises with the reason
        check_layers({name: column.outline() for name, column in columns.items()})
        return stack_in_place([*columns.values()])

    def _columns(self, activations: Activations) -> dict[str, Column[Any]]:
        """Return the columns of its sites, by hook name."""
        fired = {name: key for name, key in self.keys.items() if key in activations}
        missing = [name for name in self.keys if name not in fired]
        if self.is_stacked and fired and missing:
            raise NotCapturedError(
                f"{self.field.what} stacks layers, but {missing[0]!r} has not fired; narrow the "
                f"pattern, or annotate the field as {self.field.apart()}"
            )
        return {name: activations.single(key) for name, key in fired.items()}


def _is_statistic(hint: object) -> bool:
    return isinstance(hint, type) and not get_args(hint) and issubclass(hint, Statistic)


def site(
    name: str | nn.Module,
    *,
    slice: Any = None,  # noqa: A002  as in `capture`
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    io: Literal["in", "out"] = "out",
    axes: str | None = None,
    output: int | str | None = None,
    firing: int | None = None,
    reduce: Statistic | None = None,
    map: MapFunction | None = None,  # noqa: A002  as in `capture`
    map_axis: str | None = AXIS,
) -> Any:
    """Declare where a field of a `Schema` is captured, and how; the options are those of `Site`.

    Args:
        name: A name or a module of the model. A suffix or a glob captures every layer that it
            matches.
        slice: See `Site`, as for all options that follow.
        dtype: See `Site`.
        device: See `Site`.
        io: See `Site`.
        axes: See `Site`.
        output: See `Site`.
        firing: See `Site`.
        reduce: See `Site`. The field is annotated as the class of the statistic.
        map: See `Site`.
        map_axis: See `Site`.

    Returns:
        The value for the class body; for a type checker it has the annotated type.

    Raises:
        OptionError: As `Site`.

    """
    return Field(Site(name, slice, dtype, device, io, axes, output, firing, reduce, map, map_axis))


site.__module__ = "actctx"  # where users find it


class Schema:
    """A base class for typed results: its fields declare sites, axes and dtypes.

    `capture(model, Acts)` captures the fields of `Acts`, and yields an `Acts` whose fields are the
    captured tensors. Annotations name axes as in jaxtyping. Axes in the model's config (`d_model`,
    `d_head`, `d_mlp`, `d_vocab`, `head`, `kv_head`, `layer`) have its sizes, and all others must
    agree between the fields. An annotation that can never match is refused before any forward. The
    rest is checked when a field is read inside the block, and when the block ends.

    A glob captures every layer that it matches. A tensor annotation stacks them along a first axis;
    an annotation `dict[str, Float[Tensor, "..."]]` keeps them apart, by hook name. Schemas inherit
    the fields of their bases.

    Attributes:
        activations: The underlying buffer.

    Example:
        >>> class Acts(Schema):
        ...     resid: Float[Tensor, "layer batch d_model"] = site(
        ...         "blocks.*.hook_resid_post", slice={"pos": -1}
        ...     )
        ...     pattern: Float[Tensor, "batch head query key"] = site("blocks.1.attn.hook_pattern")
        >>> with capture(model, Acts) as acts:
        ...     logits = model(tokens)
        >>> acts.resid.shape
        torch.Size([2, 4, 32])

    """

    _fields: ClassVar[Mapping[str, Field]] = {}

    def __init_subclass__(cls) -> None:
        """Read the fields of a schema.

        Raises:
            OptionError: A field has no site, no annotation of a tensor, or a name in use.

        """
        super().__init_subclass__()
        hints = _hints(cls)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        _check_body(cls, hints, own)
        for name, value in own.items():
            field = value.of(cls, name)
            field.annotate(hints[name])
            setattr(cls, name, field)
        found = {name: getattr(cls, name, None) for name in _in_order(cls)}
        cls._fields = {name: value for name, value in found.items() if isinstance(value, Field)}

    def __init__(
        self, activations: Activations, *, parts: Iterable[Part], sizes: Mapping[str, int] | None
    ) -> None:
        """Wrap a buffer; `capture` calls this.

        Args:
            activations: The buffer.
            parts: The fields with their sites in the model.
            sizes: The sizes that the model's config fixes; None to check nothing.

        """
        self.activations = activations
        self._parts = {part.field.name: part for part in parts}
        self._sizes = sizes
        self._checked = 0

    def check(self, more: Iterable[Claim] = ()) -> None:
        """Check all fields that have fired against their annotations, together with `more`.

        Raises:
            TypedError: One of them does not fit.
            JoinError: The activations of several forwards do not join.
            SeveralFiringsError: A site fired more than once in a forward.

        """
        if self._sizes is not None:
            parts = self._parts.values()
            claims = [claim for part in parts for claim in part.claims(self.activations)]
            hold([*more, *claims], self._own_sizes(self._sizes))
            self._checked = self.activations.forwards

    def _own_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes of axes: those of the sites, else those of the config."""
        own: dict[str, set[int]] = {}
        for column in self.activations.columns:
            for axis, size in column.label.named.whole.items():
                own.setdefault(axis, set()).add(size)
        # If sites differ, their fields are compared with each other.
        alike = {axis: min(found) for axis, found in own.items() if len(found) == 1}
        return {
            axis: alike.get(axis, sizes[axis]) for axis in sizes if axis in alike or axis not in own
        }

    def _read(self, field: Field) -> Any:
        part = self._parts[field.name]
        if self._checked != self.activations.forwards:
            self.check()
        return part.read(self.activations)

    if not TYPE_CHECKING:  # which has no other attributes

        def __getattr__(self, name: str) -> Never:
            if name.startswith("_") or name == "activations":  # looked up by copy and pickle
                raise AttributeError(name)
            raise AttributeError(
                f"{type(self).__name__} has no field {name!r}; its fields are "
                f"{', '.join(map(repr, self._fields))}, and the underlying buffer is "
                "acts.activations"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.activations!r}"

    def _repr_html_(self) -> str:
        return f"<div>{escape(type(self).__name__)}</div>{self.activations._repr_html_()}"


Schema.__module__ = "actctx"  # where users find it


def _hints(schema: type[Schema]) -> dict[str, Any]:
    try:
        return get_type_hints(schema, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise OptionError(
            f"the annotations of {schema.__name__} cannot be read: {error}; import it where the "
            "class's module can see it"
        ) from None


def _check_body(schema: type[Schema], hints: Mapping[str, Any], own: Mapping[str, Field]) -> None:
    for name in inspect.get_annotations(schema):
        is_class_variable = hints[name] is ClassVar or get_origin(hints[name]) is ClassVar
        if name not in own and not is_class_variable:
            given = vars(schema).get(name)
            said = f", not {type(given).__name__}" if name in vars(schema) else ""
            raise OptionError(
                f"{schema.__name__}.{name} is annotated, but nothing says where to capture it; "
                f'write ... = site("blocks.0.hook_resid_post"){said}'
            )
    for name in own:
        if name not in hints:
            raise OptionError(
                f"{schema.__name__}.{name} has no annotation; write {name}: "
                'Float[Tensor, "batch pos d_model"] = site(...)'
            )
        if name.startswith("_") or hasattr(Schema, name) or name == "activations":
            raise OptionError(
                f"{schema.__name__}.{name} has a name that Schema uses itself; choose another"
            )


def _in_order(schema: type[Schema]) -> list[str]:
    """List the fields of the bases, then its own."""
    return list(dict.fromkeys(name for base in reversed(schema.__mro__) for name in vars(base)))


def parts_of(schema: type[Schema], model: nn.Module) -> list[tuple[Part, list[Request]]]:
    """Find the sites of a schema's fields in a model, and their keys.

    Raises:
        OptionError: The schema has no fields.
        HookNameError: A name matches nothing, or a stacked pattern matches several sites of
            one layer.

    """
    if not schema._fields:
        raise OptionError(
            f"{schema.__name__} has no fields, so there is nothing to capture; write, for example, "
            'resid: Float[Tensor, "batch pos d_model"] = site("blocks.0.hook_resid_post")'
        )
    fields = schema._fields
    found = resolve_sites(model, {name: field.site for name, field in fields.items()})
    parts = []
    for name, requests in found.items():
        field = fields[name]
        is_family = field.is_dict or not requests[0].exact
        keys = {each.key: f"{name}.{each.key}" if is_family else name for each in requests}
        is_stacked = is_family and not field.is_dict
        if is_stacked and field.is_statistic:
            raise OptionError(
                f"{field.what} is annotated {field.hint.__name__}, but {field.site.name!r} matches "
                f"{counted(len(keys), 'site')}; annotate it as dict[str, {field.hint.__name__}]"
            )
        if is_stacked:
            _check_layers(field, [*keys])
        kept = [replace(request, key=keys[request.key]) for request in requests]
        parts.append((Part(field, keys, is_stacked), kept))
    return parts


def _check_layers(field: Field, names: list[str]) -> None:
    """Refuse to stack two sites of one layer."""
    layers = in_layers({name: name for name in names})
    outside = [name for name in names if not any(name in keys for keys in layers.values())]
    double = several_in(layers)
    if double is None and len(outside) > 1:
        double = ("site outside of the layers", outside[0], outside[1])
    if double is not None:
        what, one, other = double
        raise HookNameError(
            f"{field.what} stacks layers, but {field.site.name!r} matches more than one {what}: "
            f"{one!r} and {other!r}; narrow the pattern, or annotate the field as {field.apart()}"
        )
