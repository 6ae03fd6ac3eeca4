"""Where pictures get their values: a buffer or a data set on disk, behind one protocol."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.linalg import vector_norm

from actctx._errors import AxisError, JoinError, NotCapturedError, OptionError
from actctx._model.axes import Axes
from actctx._results.activations import Activations
from actctx._results.layers import layers_of, stack_layers
from actctx._select.values import check_readable
from actctx._store.where import find_site
from actctx.dataset import ActivationDataset

_ROWS = 8192  # at a time
_NORMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what torch takes norms of


@runtime_checkable
class Source(Protocol):
    """What a picture needs from a buffer or a data set."""

    def layers(self, name: str) -> list[str]:
        """List the sites of one kind, in the order of their layers; see `Activations.stack`."""

    def hooks(self, key: str) -> tuple[str, ...]:
        """List the names of a site, which show its layer."""

    def axes(self, key: str) -> Axes:
        """Return the axes of a site, of which the last is that of the features."""

    def parts(
        self, keys: list[str], *, real: bool
    ) -> Iterator[tuple[Shaped[Tensor, "row features"], ...]]:
        """Yield some rows at a time, as a tensor for each site."""

    def positions(self, key: str) -> Int64[Tensor, " row"] | None:
        """Return the position of each row of tokens, None where it is not known."""

    def grid(self, keys: list[str]) -> Float[Tensor, "layer pos"] | None:
        """Return mean norms at each position, None for sites without an axis of positions."""

    def pattern_axes(self, name: str) -> Axes:
        """Return the axes of an attention pattern, queries among them."""

    def pattern(self, name: str, sequence: int) -> Shaped[Tensor, "..."]:
        """Read the attention of one sequence, queries and keys last."""


def source_of(acts: object, name: object) -> Source:
    """Return the source of a picture.

    Raises:
        OptionError: `acts` is neither a buffer nor a data set, or `name` is not a string.

    """
    if not isinstance(acts, Activations | ActivationDataset):
        raise OptionError(
            "a picture needs the result of capture() or ActivationDataset(path), not a "
            f"{type(acts).__name__}; give one of these"
        )
    if not isinstance(name, str):
        raise OptionError(f"name={name!r} must be a string, such as 'hook_resid_post'")
    return Captured(acts) if isinstance(acts, Activations) else Stored(acts)


class Captured:
    """A buffer as a source of pictures."""

    def __init__(self, acts: Activations) -> None:
        self._acts = acts

    def layers(self, name: str) -> list[str]:
        """List the sites of one kind, in the order of their layers.

        Raises:
            NotCapturedError: There are none.
            HookNameError: A layer has several.

        """
        return self._acts._layers(name)

    def hooks(self, key: str) -> tuple[str, ...]:
        """List the names of a site, which show its layer."""
        return self._acts._columns[key].label.names

    def axes(self, key: str) -> Axes:
        """Return the axes of a site, of which the last is that of the features.

        Raises:
            AxisError: It has rows alone.

        """
        axes = self._acts.axes(key)
        _check_features(key, self._joined(key).dim())
        return axes

    def _joined(self, key: str, *, real: bool = False) -> Shaped[Tensor, "..."]:
        """Read a site as one tensor, without its graph.

        Raises:
            OptionError: Its forwards were not joined, or its values cannot be calculated with; or
                they are complex, and are to be real.

        """
        found = self._acts[key]
        if isinstance(found, Tensor):
            check_readable(key, found, real=real)
        else:
            raise OptionError(
                f"{key!r} is a list of tensors, since it was captured with join=None; a picture "
                "needs one tensor, so capture with join='batch'"
            )
        return found.detach()

    def parts(
        self, keys: list[str], *, real: bool
    ) -> Iterator[tuple[Shaped[Tensor, "row features"], ...]]:
        """Yield some rows at a time, as a tensor for each site; a row is all but the last axis.

        Raises:
            NotCapturedError: There are no rows.
            JoinError: The sites do not have as many rows as each other.

        """
        layers = {key: self._joined(key, real=real).flatten(0, -2) for key in keys}
        if not len(layers[keys[0]]):
            raise NotCapturedError(no_rows(keys[0]))
        _check_rows({key: len(layer) for key, layer in layers.items()})
        for start in range(0, len(layers[keys[0]]), _ROWS):
            yield tuple(each[start : start + _ROWS] for each in layers.values())

    def positions(self, key: str) -> Int64[Tensor, " row"] | None:
        """Return the position of each row that a mask kept."""
        is_masked = (
            self._acts._column(key).positions() is not None
        )  # other rows are those of flattened modules
        is_of_tokens = is_masked and self._acts.axes(key)[:1] == ("token",)
        return self._acts.positions(key)[:, 1].cpu() if is_of_tokens else None

    def grid(self, keys: list[str]) -> Float[Tensor, "layer pos"] | None:
        """Return mean norms at each position, None for sites without an axis of positions."""
        if "pos" not in self.axes(keys[0])[:-1]:
            return None
        return stack_layers({key: self._norms(key).cpu() for key in keys})

    def _norms(self, key: str) -> Float[Tensor, " pos"]:
        axes = self.axes(key)
        if "pos" not in axes[:-1]:
            raise JoinError(
                f"{key!r} has the axes {' '.join(axes)!r}, but other layers have positions; "
                "capture all of them with the same slice"
            )
        found = norms_of(self._joined(key))
        if not found.numel():
            raise NotCapturedError(no_rows(key))
        means: Tensor = found.movedim(axes.index("pos"), 0).unsqueeze(1).flatten(1).mean(1)
        return means

    def pattern_axes(self, name: str) -> Axes:
        """Return the axes of an attention pattern."""
        return self._acts.axes(name)

    def pattern(self, name: str, sequence: int) -> Shaped[Tensor, "..."]:
        """Read the attention of one sequence of the batch.

        Raises:
            OptionError: There is no such sequence.

        """
        found = self._joined(name, real=True)
        if not 0 <= sequence < len(found):
            raise OptionError(
                f"there is no sequence {sequence} of {name!r}; there are {len(found)}, from 0"
            )
        return found[sequence]


class Stored:
    """A data set on disk as a source of pictures."""

    def __init__(self, data: ActivationDataset) -> None:
        self._data = data

    def layers(self, name: str) -> list[str]:
        """List the sites of one kind, in the order of their layers.

        Raises:
            NotCapturedError: There are none, or no rows.
            HookNameError: A layer has several.

        """
        if not len(self._data):
            raise NotCapturedError(
                f"there are no rows in {self._data.path!r} to draw or to compare"
            )
        return layers_of({key: (key, *site.names) for key, site in self._data.sites.items()}, name)

    def hooks(self, key: str) -> tuple[str, ...]:
        """List the name of a site in the model, which shows its layer."""
        return (self._data.sites[key].hook,)

    def axes(self, key: str) -> Axes:
        """Return the axes of a site, of which the last is that of the features.

        Raises:
            AxisError: It has rows alone.

        """
        site = self._data.sites[key]
        _check_features(key, 1 + len(site.shape))
        return (self._data.layout.rows, *site.axes)

    def parts(
        self,
        keys: list[str],
        *,
        real: bool,  # noqa: ARG002  what is on disk is real
    ) -> Iterator[tuple[Shaped[Tensor, "row features"], ...]]:
        """Yield some rows at a time, as a tensor for each site."""
        sites = {key: self._data.sites[key] for key in keys}
        some = replace(self._data._rows, sites=sites, others={})
        for start in range(0, len(some), _ROWS):
            read = some.read(range(start, min(start + _ROWS, len(some))))
            yield tuple(read[key].flatten(0, -2) for key in keys)

    def positions(self, key: str) -> Int64[Tensor, " row"] | None:  # noqa: ARG002  one for all
        """Return the position of each row, where rows are tokens."""
        is_of_tokens = self._data.layout.rows == "token"
        return self._data.read("position").long() if is_of_tokens else None

    def grid(self, keys: list[str]) -> None:
        """Return nothing, since positions are a column and not an axis."""

    def pattern_axes(self, name: str) -> Axes:
        """Return the axes that a site had before each query became a row."""
        axes = find_site(self._data.sites, name).axes
        if self._data.layout.rows == "token" and axes:
            return ("batch", *axes[:-1], "query", axes[-1])
        return (self._data._first_axis, *axes)

    def pattern(self, name: str, sequence: int) -> Shaped[Tensor, "..."]:
        """Read the attention of one sequence, by its number in the column `sequence`.

        Raises:
            OptionError: There is no such sequence.

        """
        rows = torch.nonzero(self._data.read("sequence") == sequence).flatten()
        if not len(rows):
            raise OptionError(
                f"there is no sequence {sequence} in {self._data.path!r}; give a number of its "
                "column 'sequence'"
            )
        found: Tensor = self._data._only(name).read(rows.numpy())[name]
        return found.movedim(0, -2)


def read_layers(
    source: Source, keys: list[str], *, real: bool = True
) -> Iterator[tuple[Shaped[Tensor, "row features"], ...]]:
    """Yield some rows at a time, as a tensor for each layer, on the device of the first.

    They are in single precision or, where they need not be real, as they are.

    Raises:
        NotCapturedError: There are no rows.
        AxisError: A layer has rows alone.
        JoinError: The layers do not have as many rows as each other.
        OptionError: Their forwards were not joined, or their values cannot be calculated with.

    """
    for key in keys:
        source.axes(key)
    for part in source.parts(keys, real=real):
        there = [rows.to(part[0].device) for rows in part]
        yield tuple(rows.float() for rows in there) if real else tuple(there)


def norms_of(values: Shaped[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
    """Take norms along the last axis, in single precision, of numbers of any kind."""
    if values.is_complex():
        values = values.abs()
    if values.dtype not in _NORMED:
        values = values.float()
    exact = torch.promote_types(values.dtype, torch.float32)  # it does not narrow what is wider
    norms: Tensor = vector_norm(values, dim=-1, dtype=exact)
    return norms.float()


def layer_numbers(source: Source, keys: list[str]) -> list[str]:
    """Return the number of each layer, or its key if it has none."""
    return [number_in(key, *source.hooks(key)) for key in keys]


def number_in(key: str, *hooks: str) -> str:
    """Return the number of the layer that a site is in, or its key if it is in none."""
    parts = [part for name in (*hooks, key) for part in name.split(".")]
    return next((part for part in parts if part.isdecimal()), key)


def no_rows(key: str) -> str:
    """Say that a site left no rows."""
    return f"{key!r} has no rows to draw or to compare: its mask or slice left none; capture some"


def _check_features(key: str, dims: int) -> None:
    if dims < 2:  # noqa: PLR2004
        raise AxisError(
            f"{key!r} has one number per row, but features along a last axis are needed; capture "
            "it without a slice that selects one of them"
        )


def _check_rows(counts: dict[str, int]) -> None:
    (one, rows), *others = counts.items()
    for two, count in others:
        if count != rows:
            raise JoinError(
                f"{one!r} has {rows} rows and {two!r} has {count}, so they are not of the same "
                "tokens; capture both with the same slice= and mask="
            )
