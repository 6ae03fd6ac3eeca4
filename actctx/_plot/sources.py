"""What a picture shows, of a buffer or of a data set on disk."""

import operator
from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.linalg import vector_norm

from actctx._errors import AxisError, JoinError, NotCapturedError, OptionError
from actctx._model.axes import Axes
from actctx._results.activations import Activations
from actctx._results.layers import layers_of, stack_layers
from actctx._select.values import check_readable
from actctx._store.indexing import is_int
from actctx._store.where import find_site
from actctx.dataset import ActivationDataset

Source: TypeAlias = Activations | ActivationDataset

_ROWS = 8192  # at a time
_ROUNDING = 1e-3  # of half precision, near 1
_NORMED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what torch takes norms of


def layers_in(acts: Source, name: str) -> list[str]:
    """Find the sites of one kind, in the order of their layers; see `Activations.stack`.

    Raises:
        NotCapturedError: There are none, or a data set has no rows.
        HookNameError: A layer has several.
        OptionError: The name is not a string, or neither a buffer nor a data set is given.

    """
    _check_asked(acts, name)
    if isinstance(acts, Activations):
        return acts._layers(name)
    if not len(acts):
        raise NotCapturedError(f"there are no rows in {acts.path!r} to draw or to compare")
    return layers_of({key: (key, *site.names) for key, site in acts.sites.items()}, name)


def _check_asked(acts: object, name: object) -> None:
    """Refuse what is neither a buffer nor a data set, and names that it does not have.

    Raises:
        OptionError: `acts` is neither, or `name` is not a name.

    """
    if not isinstance(acts, Activations | ActivationDataset):
        raise OptionError(
            f"a picture is drawn of what capture() or ActivationDataset(path) gives, not of a "
            f"{type(acts).__name__}; give one of these"
        )
    if not isinstance(name, str):
        raise OptionError(f"name={name!r} must be a string, such as 'hook_resid_post'")


def read_tokens(tokens: Any) -> list[str]:
    """Read the tokens that a picture is to show.

    Raises:
        OptionError: They are not strings.

    """
    found = None if isinstance(tokens, str) else _listed(tokens)
    if found is None or not all(isinstance(token, str) for token in found):
        raise OptionError(
            "tokens must be strings; give those of model.to_str_tokens(text), or of "
            "tokenizer.convert_ids_to_tokens(ids)"
        )
    return found


def read_integers(option: str, numbers: Any) -> list[int]:
    """Read the numbers of heads or positions, which may be in a tensor.

    Raises:
        OptionError: They are not integers.

    """
    found = _listed(numbers)
    if found is None or not all(map(is_int, found)):
        raise OptionError(f"{option}={numbers!r} must be integers, as in {option}=[0, 3]")
    return [*map(operator.index, found)]


def _listed(given: Any) -> list[Any] | None:
    try:
        return [*given]
    except TypeError:
        return None


def check_count(
    name: str, axis: str, words: Sized, wanted: int, *, remedy: str = "give one for each"
) -> None:
    """Refuse words for the places along an axis where each does not have its own.

    Raises:
        OptionError: There are fewer or more.

    """
    given = len(words)
    if given != wanted:
        raise OptionError(
            f"{name!r} has {wanted} {axis}, but {given} {'was' if given == 1 else 'were'} given; "
            + remedy
        )


def layer_numbers(acts: Source, keys: list[str]) -> list[str]:
    """Return the number of each layer, or its key where it has none."""
    if isinstance(acts, Activations):
        names = [(key, *acts._columns[key].names) for key in keys]
    else:
        names = [(key, acts.sites[key].hook) for key in keys]
    return [_number_in(*each) for each in names]


def _number_in(key: str, *hooks: str) -> str:
    parts = [part for name in (*hooks, key) for part in name.split(".")]
    return next((part for part in parts if part.isdecimal()), key)


def axes_of(acts: Source, key: str) -> Axes:
    """Return the axes of a site, the last of them that of the features.

    Raises:
        AxisError: It has rows alone.

    """
    if isinstance(acts, Activations):
        axes = acts.axes(key)
        dims = joined(acts, key).dim()
    else:
        axes = (acts.layout.rows, *acts.sites[key].axes)
        dims = 1 + len(acts.sites[key].shape)
    if dims < 2:  # noqa: PLR2004
        raise AxisError(
            f"{key!r} has one number a row, but features along a last axis are needed; capture it "
            "without a slice that takes one of them"
        )
    return axes


def joined(acts: Activations, key: str, *, real: bool = False) -> Shaped[Tensor, "..."]:
    """Read a site as one tensor, without its graph.

    Raises:
        OptionError: Its forwards were not joined, or its values cannot be calculated with; or they
            are complex, and are to be real.

    """
    found = acts[key]
    if isinstance(found, Tensor):
        check_readable(key, found, real=real)
    else:
        raise OptionError(
            f"{key!r} is a list of tensors, since it was captured with join=None; a picture needs "
            "one tensor, so capture with join='batch'"
        )
    return found.detach()


def read_layers(
    acts: Source, keys: list[str], *, real: bool = True
) -> Iterator[tuple[Shaped[Tensor, "row features"], ...]]:
    """Give the rows of some layers, which are everything but the last axis, some at a time.

    Each time a tensor for each layer, on the device of the first: in single precision, or, where
    they need not be real, as they are.

    Raises:
        NotCapturedError: There are no rows.
        AxisError: A layer has rows alone.
        JoinError: The layers do not have as many rows as each other.
        OptionError: Their forwards were not joined, or their values cannot be calculated with.

    """
    for key in keys:
        axes_of(acts, key)
    if isinstance(acts, Activations):
        layers = {key: joined(acts, key, real=real).flatten(0, -2) for key in keys}
        if not len(layers[keys[0]]):
            raise NotCapturedError(_no_rows(keys[0]))
        _check_rows({key: len(layer) for key, layer in layers.items()})
        starts = range(0, len(layers[keys[0]]), _ROWS)
        parts: Iterable[tuple[Tensor, ...]] = (
            tuple(each[at : at + _ROWS] for each in layers.values()) for at in starts
        )
    else:
        parts = _stored(acts, keys)
    for part in parts:
        there = [rows.to(part[0].device) for rows in part]
        yield tuple(rows.float() for rows in there) if real else tuple(there)


def norms_at_positions(acts: Source, keys: list[str]) -> Float[Tensor, "layer pos"] | None:
    """Take the mean norm at each position, NaN where there is no row; None without positions."""
    axes = axes_of(acts, keys[0])
    if isinstance(acts, Activations) and "pos" in axes[:-1]:
        return stack_layers({key: _captured_norms(acts, key).cpu() for key in keys})
    positions = _positions(acts, keys[0])
    if positions is None:
        return None
    rows = norms_of_rows(acts, keys)
    positions = positions.repeat_interleave(rows.shape[1] // len(positions))
    sums = torch.zeros(len(keys), int(positions.max()) + 1).index_add(1, positions, rows)
    return sums / positions.bincount()


def _captured_norms(acts: Activations, key: str) -> Float[Tensor, " pos"]:
    axes = axes_of(acts, key)
    if "pos" not in axes[:-1]:
        raise JoinError(
            f"{key!r} has the axes {' '.join(axes)!r}, but other layers have positions; capture "
            "all of them with one slice"
        )
    norms = _norms(joined(acts, key))
    if not norms.numel():
        raise NotCapturedError(_no_rows(key))
    means: Tensor = norms.movedim(axes.index("pos"), 0).unsqueeze(1).flatten(1).mean(1)
    return means


def norms_of_rows(acts: Source, keys: list[str]) -> Float[Tensor, "layer row"]:
    """Take the norm of each row of each layer, on the CPU."""
    parts = read_layers(acts, keys, real=False)
    norms = [torch.stack([_norms(rows).cpu() for rows in part]) for part in parts]
    return torch.cat(norms, 1)


def _norms(values: Shaped[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
    """Take norms along the last axis, in single precision, of numbers of any kind."""
    if values.is_complex():
        values = values.abs()
    if values.dtype not in _NORMED:
        values = values.float()
    exact = torch.promote_types(values.dtype, torch.float32)  # it does not narrow what is wider
    norms: Tensor = vector_norm(values, dim=-1, dtype=exact)
    return norms.float()


def _no_rows(key: str) -> str:
    return f"{key!r} has no rows to draw or to compare: its mask or slice left none; capture some"


def read_pattern(acts: Source, name: str, sequence: int) -> Float[Tensor, "head query key"]:
    """Read the attention of one sequence, in single precision on the CPU.

    Raises:
        NotCapturedError: There is no such site.
        AxisError: It is not an attention pattern.
        OptionError: There is no such sequence, the name is not a string, or the forwards were not
            joined.

    """
    _check_asked(acts, name)
    if not is_int(sequence):
        raise OptionError(f"sequence={sequence!r} must be an integer")
    axes = acts.axes(name) if isinstance(acts, Activations) else _axes_with_queries(acts, name)
    if axes[-2:] != ("query", "key") or axes[0] != "batch":
        raise AxisError(
            f"{name!r} has the axes {' '.join(axes)!r}, but a picture of attention needs 'batch "
            "head query key'; capture attn.hook_pattern without a slice along these"
        )
    if isinstance(acts, Activations):
        pattern = _captured_pattern(acts, name, sequence)
    else:
        pattern = _stored_pattern(acts, name, sequence)
    pattern = pattern.float().cpu()
    if not pattern.numel():
        raise AxisError(
            f"{name!r} has the shape {tuple(pattern.shape)}, in which there is nothing to draw; "
            "capture it with another slice"
        )
    low, high = pattern.min().item(), pattern.max().item()
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise OptionError(
            f"the values of {name!r} reach from {low:.3g} to {high:.3g}, but those of an attention "
            "pattern lie between 0 and 1; capture attn.hook_pattern"
        )
    return pattern if "head" in axes else pattern[None]


def _axes_with_queries(data: ActivationDataset, name: str) -> Axes:
    """Return the axes that a site had before each query became a row."""
    axes = find_site(data.sites, name).axes
    if data.layout.rows == "token" and axes:
        return ("batch", *axes[:-1], "query", axes[-1])
    return (data._first_axis, *axes)


def _captured_pattern(acts: Activations, name: str, sequence: int) -> Shaped[Tensor, "..."]:
    found = joined(acts, name, real=True)
    if not 0 <= sequence < len(found):
        raise OptionError(
            f"there is no sequence {sequence} of {name!r}; there are {len(found)}, from 0"
        )
    return found[sequence]


def _stored_pattern(data: ActivationDataset, name: str, sequence: int) -> Shaped[Tensor, "..."]:
    rows = torch.nonzero(data.read("sequence") == sequence).flatten()
    if not len(rows):
        raise OptionError(
            f"there is no sequence {sequence} in {data.path!r}; give a number of its column "
            "'sequence'"
        )
    found: Tensor = data._only(name).read(rows.numpy())[name]
    return found.movedim(0, -2)


def _positions(acts: Source, key: str) -> Int64[Tensor, " row"] | None:
    """Return the position of each row of tokens, None where it is not known."""
    if isinstance(acts, ActivationDataset):
        return acts.read("position").long() if acts.layout.rows == "token" else None
    is_masked = bool(acts._column(key).rows)  # other rows are those that a module flattened
    is_of_tokens = is_masked and acts.axes(key)[:1] == ("token",)
    return acts.positions(key)[:, 1].cpu() if is_of_tokens else None


def _stored(data: ActivationDataset, keys: list[str]) -> Iterator[tuple[Tensor, ...]]:
    some = replace(data._rows, sites={key: data.sites[key] for key in keys}, others={})
    for start in range(0, len(some), _ROWS):
        read = some.read(range(start, min(start + _ROWS, len(some))))
        yield tuple(read[key].flatten(0, -2) for key in keys)


def _check_rows(counts: dict[str, int]) -> None:
    (one, rows), *others = counts.items()
    for two, count in others:
        if count != rows:
            raise JoinError(
                f"{one!r} has {rows} rows and {two!r} has {count}, so they are not of the same "
                "tokens; capture both with the same slice= and mask="
            )
