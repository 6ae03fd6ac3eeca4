"""Find out what the modules of a Hugging Face model are called with, by a run without values.

# NOTE [What a dry run shows]
A stand-in of the model is run under fake tensors, on a few sequences and then on one more token.
Which modules it calls, and whether their inputs and outputs are tensors, does not depend on values.
It may depend on the kind of input: so nothing is said about an image tower, which a text does not
reach, or about any module if the run does not finish. A module is only reported as never called if
a long text does not reach it either. If the run fails, as for a model whose calls depend on values,
the source of the model is searched for calls instead.

# NOTE [Identical layers]
If layers are built identically, the first one is run, and the others return its output. So a
hundred layers take no longer than one.
"""

import ast
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from actctx._model.stand_in import hollow, undisturbed

_SEQUENCES, _SHORT, _LONG = 2, 16, 130
_SAMPLES = 4000
_PATTERN_RANK = 4
_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "block_id"}
# Methods that return modules without calling them.
_NOT_RUN = (
    "__init__",
    "_init_weights",
    "get_input_embeddings",
    "get_output_embeddings",
    "set_",
    "_tie",
    "tie_",
)


@dataclass(frozen=True, eq=False)
class Call:
    """What a module was given and returned in a dry run.

    Attributes:
        is_given_tensor: Whether the first argument that it was given is a tensor.
        returned: The shapes of all tensors that it returned, or None if it did not return.

    """

    is_given_tensor: bool
    returned: list[tuple[int, ...]] | None = None

    @property
    def has_pattern(self) -> bool:
        """Whether it may also return an attention pattern, as far as is known."""
        return self.returned is None or any(
            len(shape) == _PATTERN_RANK for shape in self.returned[1:]
        )


@dataclass(frozen=True, eq=False)
class DryRun:
    """Which modules a model calls.

    Attributes:
        model: The model.
        calls: What each module was given and returned, by its name, at its last call.
        is_whole: Whether the run finished.
        modules: The modules of the stand-in that ran, by name.

    """

    model: nn.Module
    calls: Mapping[str, Call]
    is_whole: bool
    modules: Mapping[str, nn.Module] = field(repr=False)

    def is_passed_by(self, name: str) -> bool:
        """Return whether the model's forward never calls this module."""
        if name in self.calls or not name:
            return False
        holder, _, attribute = name.rpartition(".")
        parent = self.modules[holder]
        if not _may_call(type(parent), attribute):
            return True
        has_run = holder in self.calls and self.calls[holder].returned is not None
        # The run gave only tokens, so nothing is known of towers for other inputs.
        is_tower = hasattr(type(parent), "base_model_prefix")
        is_tower = is_tower and not isinstance(self.modules[name], nn.Embedding)
        return self.is_whole and has_run and not is_tower and name not in self._of_long.calls

    def is_given_tensor(self, name: str) -> bool:
        """Return whether a module is given a tensor first, as far as that is known."""
        if name in self.calls:
            return self.calls[name].is_given_tensor
        parameters = [*inspect.signature(type(self.modules[name]).forward).parameters.values()]
        return not any(each.annotation is torch.Size for each in parameters[1:2])

    @functools.cached_property
    def with_attentions(self) -> "DryRun":
        """The run that requested attention patterns."""
        return dry_run(self.model, output_attentions=True)

    @functools.cached_property
    def _of_long(self) -> "DryRun":
        return dry_run(self.model, positions=_LONG)


def dry_run(model: nn.Module, positions: int = _SHORT, **options: Any) -> DryRun:
    """Run a stand-in of a Hugging Face model without values. No hooks of others fire in it.

    Args:
        model: The model, which is left as it is.
        positions: How many tokens a sequence has.
        options: Further arguments of the forward.

    Returns:
        What was observed of its modules. Errors of the model are not raised.

    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    whole = hollow(model, mode)
    modules = dict(whole.named_modules(remove_duplicate=False))
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    calls: dict[str, Call] = {}
    for module in names:
        note = functools.partial(_note_inputs, calls, names)
        module.register_forward_pre_hook(note, with_kwargs=True)
        module.register_forward_hook(functools.partial(_note_outputs, calls, names))
        _set_runnable(module)
    alike = _run_once(modules)
    is_whole = True
    try:
        with undisturbed(model), torch.device("cpu"), mode:
            _run(whole, positions, options)
    except Exception:  # noqa: BLE001  whatever a model raises if it cannot run without values
        is_whole = False
    for name in modules:
        first = _first_alike(name, alike)
        if first in calls:
            calls.setdefault(name, calls[first])
    return DryRun(model, calls, is_whole, modules)


def _first_alike(name: str, alike: Mapping[str, str]) -> str:
    """Name the corresponding module of the first identical layer."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        first = alike.get(".".join(parts[:length]))
        if first is not None:
            return ".".join([first, *parts[length:]])
    return name


def _run_once(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Make identical layers run once, and return the first of each."""
    alike: dict[str, str] = {}
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList):
            continue
        first: dict[object, tuple[str, _Once]] = {}
        for number, layer in module.named_children():
            built = _built(layer)
            if built not in first:
                first[built] = (f"{name}.{number}", _Once(layer))
            else:
                alike[f"{name}.{number}"] = first[built][0]
            # Not `setattr`, which a module may override.
            layer.__dict__["forward"] = functools.partial(first[built][1], layer)
    return alike


def _built(module: nn.Module) -> object:
    """Describe how a module is built, without its place among others."""
    return tuple(
        (
            name,
            type(each),
            tuple((key, tuple(value.shape)) for key, value in each.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in vars(each).items()
                if isinstance(value, bool | int | float | str | None) and key not in _NUMBERS
            ),
        )
        for name, each in module.named_modules()
    )


class _Once:
    """The forward of identical layers: all return the output of the first."""

    def __init__(self, first: nn.Module) -> None:
        self._first = first
        self._given: list[tuple[int, ...]] = []
        self._returned: Any = None

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = [tuple(each.shape) for each in _tensors([*args, *kwargs.values()])]
        if layer is not self._first and given == self._given:
            return self._returned
        returned = type(layer).forward(layer, *args, **kwargs)
        if layer is self._first:
            self._given, self._returned = given, returned
        return returned


def _set_runnable(module: nn.Module) -> None:
    """Choose implementations that run without values, in the stand-in's own copies of configs."""
    config: Any = vars(module).get("config")
    if getattr(config, "_attn_implementation", "eager") not in {"eager", "sdpa"}:
        config._attn_implementation = "eager"
    if getattr(config, "_experts_implementation", None) is not None:
        # Other implementations read which experts were chosen.
        config._experts_implementation = "batched_mm"
    if hasattr(config, "pad_token_id") and config.pad_token_id is None:
        config.pad_token_id = 0  # classifiers take no batch without one


def _note_inputs(
    calls: dict[str, Call],
    names: Mapping[nn.Module, list[str]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    first = next(iter((*args, *kwargs.values())), None)
    for name in names[module]:
        calls[name] = Call(is_given_tensor=isinstance(first, Tensor))


def _note_outputs(
    calls: dict[str, Call],
    names: Mapping[nn.Module, list[str]],
    module: nn.Module,
    _args: tuple[Any, ...],
    output: Any,
) -> None:
    for name in names[module]:
        calls[name] = Call(
            calls[name].is_given_tensor, [tuple(each.shape) for each in _tensors(output)]
        )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | tuple | list):
        return []
    return [tensor for each in inner for tensor in _tensors(each)]


def _run(model: Any, positions: int, options: Mapping[str, Any]) -> None:
    """Run a model on its inputs, and then on one more token if it keeps a cache."""
    given = {**_inputs(model, positions), **options}
    output = model(**given)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return
    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    given[name] = given[name][:, :1]
    if name == "input_ids" and "attention_mask" in given:
        given["attention_mask"] = torch.ones((_SEQUENCES, positions + 1), dtype=torch.long)
    model(**given, past_key_values=cache)


def _inputs(model: Any, positions: int) -> dict[str, Tensor]:
    """Make inputs of the kind that a model takes: tokens, an image or sound."""
    config, name = model.config, model.main_input_name
    taken = inspect.signature(model.forward).parameters
    if name == "pixel_values":
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        return {name: torch.empty((_SEQUENCES, channels, *sides), dtype=model.dtype)}
    if hasattr(config, "num_mel_bins") and name != "input_ids":
        length = getattr(config, "max_length", None) or 2 * config.max_source_positions
        return {name: torch.empty((_SEQUENCES, length, config.num_mel_bins), dtype=model.dtype)}
    if name != "input_ids":
        return {name: torch.empty((_SEQUENCES, _SAMPLES), dtype=model.dtype)}
    tokens = torch.empty((_SEQUENCES, positions), dtype=torch.long)
    found = {"input_ids": tokens}
    if "attention_mask" in taken:
        found["attention_mask"] = torch.ones(tokens.shape, dtype=torch.long)
    if "decoder_input_ids" in taken:
        found["decoder_input_ids"] = torch.empty((_SEQUENCES, positions - 1), dtype=torch.long)
    return found


def _may_call(kind: type[nn.Module], attribute: str) -> bool:
    """Return whether the code around a class may call a module that it has."""
    for each in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if each.__module__.startswith("torch."):  # a list or a dict of modules
            return True
        try:
            called = _called_in(inspect.getsourcefile(each) or "")
        except TypeError:
            called = None
        if called is None or attribute in called:
            return True
    return False


@functools.lru_cache
def _called_in(file: str) -> frozenset[str] | None:
    """List the attributes that code in a file may call, or pass on to be called.

    Attributes that are only read from, as in `self.conv1d.weight`, are not included.
    """
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    found: set[str] = set()
    _collect(tree, found)
    return frozenset(found)


def _collect(node: ast.AST, found: set[str]) -> None:
    if isinstance(node, ast.FunctionDef) and node.name.startswith(_NOT_RUN):
        return
    if isinstance(node, ast.Attribute):
        if isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        inner = node.value
        # In `self.conv1d.weight`, only the weight is loaded.
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        _collect(inner, found)
        return
    for child in ast.iter_child_nodes(node):
        _collect(child, found)
