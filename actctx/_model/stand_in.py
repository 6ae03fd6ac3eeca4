"""A stand-in of a model: the same modules under the same names, with other tensors for its weights.

TransformerLens' adapters prepare a model for a bridge: they replace its modules and forwards,
change its config, and split its weights. A stand-in is used for this, and for runs that find out
what a model does. The model itself is not changed, and no memory is taken twice.
"""

import contextlib
import copy
import functools
import logging
import random
import sys
import threading
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_LENS_HOOKS = ("fwd_hooks", "bwd_hooks")
_SHARED = ("tokenizer", "processor", "adapter", "_hf_hook")
_LOGGERS = ("torch._subclasses.fake_tensor", "transformers")
_ONE_AT_A_TIME = threading.RLock()


def stand_in(
    model: nn.Module, instead: Callable[[Tensor], Tensor]
) -> tuple[Any, dict[nn.Module, nn.Module]]:
    """Make a stand-in of a model.

    Args:
        model: The model, which is not changed, not even temporarily for other threads.
        instead: Returns the replacement of a parameter or buffer.

    Returns:
        A model of the same classes with the same modules and copies of its configs, and without
        hooks, except those with which TransformerLens itself passes values on; and the stand-in of
        each module. Shared modules and weights stay shared.

    """
    kept = [*model.modules()]  # keeps them alive, so that no `id` is reused
    # Not `copy.deepcopy` of a module: some modules change while they are copied, and some refuse.
    made = {module: object.__new__(type(module)) for module in kept}
    with torch.inference_mode(mode=False), _disable_current_modes():
        memo: dict[int, Any] = {id(module): new for module, new in made.items()}
        for module in kept:
            _remember(module, memo, instead)
        for module, new in made.items():
            for name, value in [*vars(module).items()]:
                new.__dict__[name] = _copied(value, made, memo)
            _run_as_written(new)
        for module in kept:
            _pass_on(module, made)
    return made[model], made


def _remember(module: nn.Module, memo: dict[int, Any], instead: Callable[[Tensor], Tensor]) -> None:
    """Decide what is not copied of a module: weights, hooks, and large shared objects."""
    own = vars(module)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and id(tensor) not in memo:
            memo[id(tensor)] = instead(tensor)
    memo.update({id(own[name]): OrderedDict() for name in _HOOKS if name in own})
    memo.update({id(own[name]): [] for name in _LENS_HOOKS if name in own})
    memo.update({id(own[name]): own[name] for name in _SHARED if name in own})
    for value in own.values():
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, nn.Module):
            memo.setdefault(id(owner), owner)  # such as the adapter that a bridge was made by


def _copied(value: Any, made: Mapping[nn.Module, Any], memo: dict[int, Any]) -> Any:
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return _rebound(value, made, set())  # such as a forward that TransformerLens replaced
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001  such as a list of losses, whose graph torch does not copy
        for key in [*memo][known:]:  # unfinished copies
            del memo[key]
    if type(value) is list:
        return [_copied(each, made, memo) for each in value]
    if type(value) is dict:
        return {key: _copied(each, made, memo) for key, each in value.items()}
    with contextlib.suppress(Exception):
        return memo.setdefault(id(value), copy.copy(value))
    return value  # whatever cannot be copied at all is shared


def _run_as_written(new: nn.Module) -> None:
    """Make a stand-in run the forward of its class, without fetching weights or compiling."""
    own = vars(new)
    # TransformerLens also asks accelerate's hook for weights, which would record the stand-in's as
    # if they were the model's.
    if own.pop("_hf_hook", None) is not None:
        own["forward"] = own.pop("_old_forward")
    if isinstance(inner := new._modules.get("_orig_mod"), nn.Module):  # of torch.compile
        own["forward"] = inner
    # Transformers adds its hooks for `output_hidden_states` and the like once, and not to copies.
    own.pop("_output_capturing_hooks_installed", None)
    if "_compiled_call_impl" in own:
        own["_compiled_call_impl"] = None


def _pass_on(module: Any, made: Mapping[nn.Module, Any]) -> None:
    """Make a stand-in run other hook points if TransformerLens' own hooks do that."""
    new = made[module]
    if "fwd_hooks" in vars(module):
        for handle in module.fwd_hooks:
            registered = module._forward_hooks.get(handle.hook.id)
            for function in _held(registered) if getattr(handle, "is_permanent", False) else ():
                if _is_of_the_lens(function):
                    new.add_hook(_rebound(function, made, set()), is_permanent=True)
        return
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for number, hook in [*vars(module).get(hooks, {}).items()]:
            if _is_of_the_lens(hook):
                vars(new)[hooks][number] = _rebound(hook, made, set())
                if number in vars(module)[f"{hooks}_with_kwargs"]:
                    vars(new)[f"{hooks}_with_kwargs"][number] = True


def _is_of_the_lens(hook: Any) -> bool:
    is_function = isinstance(hook, types.FunctionType)
    return is_function and hook.__module__.startswith("transformer_lens")


def _rebound(value: Any, made: Mapping[nn.Module, Any], seen: set[int]) -> Any:
    """Return a function with stand-ins in place of the modules that it refers to."""
    if isinstance(value, nn.Module):
        module = value.train.__self__ if isinstance(value, weakref.ProxyTypes) else value
        return made.get(module, module)
    if id(value) in seen:  # a function that refers to itself
        return value
    again = functools.partial(_rebound, made=made, seen={*seen, id(value)})
    if isinstance(value, types.MethodType):
        return types.MethodType(again(value.__func__), again(value.__self__))
    if isinstance(value, functools.partial):
        arguments = {name: again(each) for name, each in value.keywords.items()}
        return functools.partial(again(value.func), *map(again, value.args), **arguments)
    return _rebound_function(value, again) if isinstance(value, types.FunctionType) else value


def _rebound_function(value: Any, again: Callable[[Any], Any]) -> Any:
    defaults, named = value.__defaults__ or (), value.__kwdefaults__ or {}
    if not (value.__closure__ or defaults or named):
        return value
    empty = types.CellType()
    cells = [
        cell if cell == empty else types.CellType(again(cell.cell_contents))
        for cell in value.__closure__ or ()
    ]
    new = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, tuple(map(again, defaults)), tuple(cells)
    )
    new.__dict__.update(value.__dict__)
    new.__kwdefaults__ = {name: again(each) for name, each in named.items()}
    return new


def _held(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if cell != types.CellType()]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a stand-in without gradients, and restore modes and random states afterwards.

    Warnings and logs can only be silenced for all threads, so threads take turns.

    Args:
        model: The model, whose devices draw random numbers.

    """
    devices = {each.device for each in model.parameters() if each.is_cuda}
    with (
        _ONE_AT_A_TIME,
        _disable_current_modes(),
        torch.inference_mode(mode=False),
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
        _drawing_aside(),
        _silence(),
    ):
        yield


@contextlib.contextmanager
def _drawing_aside() -> Iterator[None]:
    """Restore the random states of Python and NumPy, which older models use."""
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(drawn[0])
        if numpy is not None:
            numpy.random.set_state(drawn[1])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence warnings and logs of a run that the user did not request."""
    loggers = [*map(logging.getLogger, _LOGGERS)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def hollow(model: nn.Module, mode: Any) -> Any:
    """Make a stand-in with shapes but no values, on the CPU, in evaluation mode.

    Args:
        model: The model, which is left as it is.
        mode: The `FakeTensorMode` of its tensors, which must be active when it runs.

    """

    def empty(tensor: Tensor) -> Tensor:
        with mode:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(fake, requires_grad=False) if is_parameter else fake

    return stand_in(model, empty)[0].eval()
