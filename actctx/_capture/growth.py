"""Determine which axes of a model's activations grow with its sequences, and which with positions.

# NOTE [Growth]
A name proposes where an axis is; the behaviour of the model decides. A copy of the model runs a few
times, each time with another number of sequences or positions. Its weights are torch's fake
tensors, which have shapes but no values. An axis that grows with the sequences is `batch`, one that
grows with the positions is `pos`, and one that grows with both has flattened tokens. No value is
computed, the model itself is not touched, and no hooks run.

A model may read values, which fake tensors do not have: for example, whether a mask has zeros, or
whether there are as many image tokens as images. Such questions are answered with no, then with
yes. If a size depends on values, as in some mixtures of experts, the copy shares the weights and
runs on a few real tokens.
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from actctx._capture.forward import unwatched
from actctx._capture.hooks import Hook
from actctx._capture.samples import MANY, SEQUENCES, Sample, samples_of
from actctx._model.axes import Axes, Growth, grown_axes
from actctx._model.parallel import is_cut
from actctx._model.places import is_hook_point
from actctx._model.shape_run import Answers, fake_of, is_fake, original_of
from actctx._model.sides import input_of
from actctx._model.stand_in import stand_in, undisturbed
from actctx._model.structure import Inputs, tensor_of


class _Shape(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype


@dataclass(eq=False)
class _Seen:
    """The inputs and outputs of one module in a run, with shapes instead of tensors."""

    given: list[Any]
    returned: list[Any]


Run = weakref.WeakKeyDictionary[nn.Module, _Seen]
"""The inputs and outputs of a model's modules in one run."""


class Grew(NamedTuple):
    """How the axes of an activation grow.

    Attributes:
        growth: What each axis grows with.
        shape: Its shape in the first run.
        is_whole: Whether runs with other positions also finished, not only those with other
            sequences.
        is_of_part: Whether only a part of the model was run, whose sequences may be different, such
            as images.
        is_of_images: Whether it was run on images, whose height and width grow.

    """

    growth: Growth
    shape: torch.Size
    is_whole: bool
    is_of_part: bool = False
    is_of_images: bool = False

    def axes(self, proposed: Axes | None, shape: tuple[int, ...] | None = None) -> Axes | None:
        """Name the axes of an activation; see `grown_axes`.

        Args:
            proposed: The axes that the name proposes.
            shape: The shape of the activation, by default that of the first run.

        """
        found = grown_axes(self.growth, proposed, self.shape if shape is None else shape)
        if self.is_of_images and found is not None and "query" not in (proposed or ()):
            # Two axes that grow with an image are its height and width, which are not named.
            found = tuple("_" if axis in {"query", "key"} else axis for axis in found)
        if self.is_whole or found is None:
            return found
        rows = [dim for dim, axis in enumerate(found) if axis == "batch"]
        named = [dim for dim, axis in enumerate(proposed or ()) if axis == "batch"]
        return proposed if len(proposed or ()) == len(found) and named == rows else None


@dataclass(frozen=True, eq=False)
class Grown:
    """Observations of a model in runs of different sizes.

    Attributes:
        first: The run that the others are compared with.
        others: The runs in which one size had grown, by its name, such as `"batch"`.
        is_of_images: Whether they were on images.

    """

    first: Run
    others: Mapping[str, Run]
    is_of_images: bool = False

    def of(self, module: nn.Module, io: str, read: Callable[[Any], Tensor]) -> Grew | None:
        """Return what the axes of an activation grow with.

        Args:
            module: The hook point, or the module that it is given to or returned by.
            io: Whether it is an input (`"in"`) or an output (`"out"`).
            read: Finds the activation in that.

        Returns:
            An entry for each axis; None if the module did not run, or not always in the same way.

        """
        first = _shapes(self.first, module, io, read)
        others = {name: _shapes(run, module, io, read) for name, run in self.others.items()}
        if not first or any(len(each) != len(first) for each in others.values()):
            return None
        found = [
            _compared(shape, {name: each[firing] for name, each in others.items()})
            for firing, shape in enumerate(first)
        ]
        if None in found or len({grew.growth for grew in found if grew is not None}) > 1:
            return None
        grew = found[0]
        return None if grew is None else grew._replace(is_of_images=self.is_of_images)


def _compared(first: torch.Size, others: dict[str, torch.Size]) -> Grew | None:
    if any(len(shape) != len(first) for shape in others.values()):
        return None
    many = others.pop("many", None)
    growth = tuple(
        frozenset(
            "rows" if name == "batch" and (size, shape[dim]) != SEQUENCES else name
            for name, shape in others.items()
            if shape[dim] != size
        )
        for dim, size in enumerate(first)
    )
    few = SEQUENCES[0]
    wide = [
        size * MANY // few if {"batch", "rows"} & grows else size
        for size, grows in zip(first, growth, strict=True)
    ]
    if many is not None and [*many] != wide:  # the layout of axes depends on their sizes
        return None
    return Grew(growth, first, "pos" in others)


def _shapes(
    run: Run, module: nn.Module, io: str, read: Callable[[Any], Tensor]
) -> list[torch.Size]:
    """Return the shapes of an activation in the observations of its module, firing by firing."""
    seen = run.get(module)
    values = [] if seen is None else seen.given if io == "in" else seen.returned
    try:
        return [read(_filled(value, module)).shape for value in values]
    except Exception:  # noqa: BLE001  there is no such tensor, or reading it needs values
        return []


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[object, Grown | None]] = (
    weakref.WeakKeyDictionary()
)


def grown(model: nn.Module) -> Grown | None:
    """Run a copy of a model without values, to see what grows.

    Returns:
        The observations, the same object as long as the model has the same modules and
        settings; None if no run finished.

    """
    settings = _settings(model)
    known = _KNOWN.get(model)
    if known is None or known[0] != settings:
        known = _KNOWN[model] = (settings, _grown(model))
    return known[1]


Known = weakref.WeakKeyDictionary[nn.Module, Grown | None]
"""Observations of models and parts of models since a capture was created or opened."""


def growth_at(
    model: nn.Module,
    module: nn.Module,
    io: str,
    read: Callable[[Any], Tensor],
    *,
    known: Known | None = None,
) -> Grew | None:
    """Return what the axes of an activation grow with; see `Grown.of`.

    For modules that did not run with the model, such as an image tower, the innermost part that
    says what it reads is run. Earlier observations are not compared with the model again, because
    that takes time for each module.
    """
    known = weakref.WeakKeyDictionary() if known is None else known
    model, module = original_of(model), original_of(module)
    for part in itertools.chain([model], _parts_with(model, module)):
        if part not in known:
            known[part] = grown(part)
        found = known[part]
        grew = None if found is None else found.of(module, io, read)
        if grew is not None:
            return grew._replace(is_of_part=part is not model)
    return None


def _parts_with(model: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts that contain a module and say what they read, innermost first."""
    parts = [
        part
        for part in model.modules()
        if part is not model
        and says_what_it_reads(part)
        and any(each is module for each in part.modules())
    ]
    yield from reversed(parts)


def says_what_it_reads(model: nn.Module) -> bool:
    """Return whether a model is known to read tokens, or says what it reads instead."""
    is_hooked = isinstance(getattr(model, "hook_dict", None), Mapping)
    return is_hooked or input_of(model) is not None


def _settings(model: nn.Module) -> object:
    """Return what must be unchanged for a model to behave as before: modules and flags."""
    config = getattr(model, "cfg", None)
    switches = (
        [value for name, value in sorted(vars(config).items()) if name.startswith("use_")]
        if hasattr(config, "__dict__")
        else []
    )
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return [weakref.ref(module) for module in model.modules()], switches, attention


def _grown(model: nn.Module) -> Grown | None:
    if is_cut(model):  # all processes would have to run together
        return None
    ways = (_without_values(answer=False), _without_values(answer=True), _with_values)
    samples: list[Sample] = []
    with unwatched(), undisturbed(model):
        with contextlib.suppress(Exception):  # such as a forward that does not say what it takes
            samples += samples_of(model)
        for way, sample in itertools.product(ways, samples):
            with contextlib.suppress(Exception):  # whatever a model raises without values
                found = way(model, sample)
                return None if _has_positions_first(model, found) else found
    return None


def _has_positions_first(model: nn.Module, found: Grown) -> bool:
    """Return whether a model takes ids as `pos batch`, judging by its torch layers."""
    layers = (nn.RNNBase, nn.MultiheadAttention)
    for module in model.modules():
        if isinstance(module, layers) and not module.batch_first:
            grew = found.of(module, "in", functools.partial(tensor_of, "", output=None))
            if grew is not None and [*map(set, grew.growth[:2])] == [{"batch"}, {"pos"}]:
                return True
    return False


def _without_values(*, answer: bool) -> Callable[[nn.Module, Sample], Grown]:
    def run(model: nn.Module, sample: Sample) -> Grown:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        hollow, copies = stand_in(model, functools.partial(fake_of, mode=mode))
        for module in hollow.modules():
            # The default kernel for experts does not infer shapes for float32.
            config: Any = vars(module).get("config")
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = "batched_mm"
        with mode, Answers(answer=answer):
            return _watched(hollow, copies, sample)

    return run


def _with_values(model: nn.Module, sample: Sample) -> Grown:
    if any(each.is_meta or is_fake(each) for each in model.parameters()):
        raise ValueError("the weights lie elsewhere")
    hollow, copies = stand_in(model, _same)
    return _watched(hollow, copies, sample)


def _same(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def _watched(copied: nn.Module, copies: Mapping[nn.Module, nn.Module], sample: Sample) -> Grown:
    """Run a copy of a model on samples, and record the inputs and outputs of each module."""
    runs: list[Run] = []
    _take_notes(copies, runs)
    for args, kwargs in sample.calls(copied):
        runs.append(weakref.WeakKeyDictionary())
        copied(*args, **kwargs)
    others = dict(zip(sample.grown, runs[1:], strict=True))
    return Grown(runs[0], others, sample.is_of_images)


def _take_notes(copies: Mapping[nn.Module, nn.Module], runs: list[Run]) -> None:
    """Make each module of the copy record its inputs and outputs in the current run."""
    for module, hollow in copies.items():
        reference = weakref.ref(module)
        returned = functools.partial(_note_out, reference, runs)
        if is_hook_point(hollow):
            Hook(hollow, "growth", returned, io="point").put_on()
        else:
            given = functools.partial(_note_in, reference, runs)
            Hook(hollow, "growth", given, io="in").put_on()
            Hook(hollow, "growth", returned, io="out").put_on()


def _note_in(reference: "weakref.ref[nn.Module]", runs: list[Run], value: Any) -> None:
    _seen(reference, runs).given.append(_emptied(value))


def _note_out(reference: "weakref.ref[nn.Module]", runs: list[Run], value: Any) -> None:
    _seen(reference, runs).returned.append(_emptied(value))


def _seen(reference: "weakref.ref[nn.Module]", runs: list[Run]) -> _Seen:
    module = reference()
    assert module is not None  # noqa: S101  as its model runs
    return runs[-1].setdefault(module, _Seen([], []))


def _emptied(value: Any) -> Any:
    """Copy a structure with shapes instead of tensors, and without other values."""
    if isinstance(value, Tensor):
        return _Shape(value.shape, value.dtype)
    if isinstance(value, Inputs):
        return Inputs(None, _emptied(value.args), _emptied(value.kwargs))  # type: ignore[arg-type]
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _emptied(inner) for key, inner in value.items()}
    is_sequence = isinstance(value, tuple | list) and not isinstance(value, torch.Size)
    return _mapped(value, _emptied) if is_sequence else None


def _filled(value: Any, module: nn.Module) -> Any:
    """Replace shapes by tensors without values."""
    if isinstance(value, _Shape):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Inputs):
        return Inputs(module, _filled(value.args, module), _filled(value.kwargs, module))
    if isinstance(value, dict):
        return {key: _filled(inner, module) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return _mapped(value, functools.partial(_filled, module=module))
    return value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Map the elements of a list, a tuple or a named tuple."""
    changed = map(change, value)
    if hasattr(value, "_fields"):  # whose own constructor may read the tensors
        return tuple.__new__(type(value), changed)
    return type(value)(changed)
