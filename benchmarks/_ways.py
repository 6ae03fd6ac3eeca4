"""The ways to get one activation, as they are compared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Never, TypeVar

import torch
from torch import Tensor

from actctx import capture

T = TypeVar("T")

LAYER = 6
NAME = f"blocks.{LAYER}.hook_resid_post"

BATCHES = 64
NEURONS = f"blocks.{LAYER}.mlp.hook_post"
"""What is gathered: four times as wide, so that a batch of it weighs as much as a forward."""


@dataclass(frozen=True)
class Way:
    """One way to get the activation.

    Attributes:
        name: What it is chosen by.
        title: What the table calls it.
        run: Runs it on a model and tokens, those of all batches where several are gathered. It
            returns the activation and holds nothing else; a bare forward, which captures
            nothing, returns None.

    """

    name: str
    title: str
    run: Callable[[Any, Tensor], Tensor | None]


def _run_with_cache(**options: Any) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, tokens: Tensor) -> Tensor:
        _, cache = model.run_with_cache(tokens, **options)
        activation: Tensor = cache[NAME]
        return activation

    return run


def _recipe(model: Any, tokens: Tensor) -> Tensor:
    """Run the recipe that people copy."""
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: object) -> None:  # noqa: ARG001  TransformerLens passes it
        kept.append(activation.detach().clone())

    model.hook_dict[NAME].add_hook(keep)
    with torch.no_grad():
        model(tokens)
    model.reset_hooks()
    return torch.cat(kept)


def _capture(*, stop: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, tokens: Tensor) -> Tensor:
        with capture(model, NAME, stop=stop) as acts:
            model(tokens)
        return acts.tensor

    return run


def _bare(**options: Any) -> Callable[[Any, Tensor], None]:
    def run(model: Any, tokens: Tensor) -> None:
        model(tokens, **options)

    return _no_grad(run)


class _EndForward(Exception):  # noqa: N818  a signal, not an error
    """Unwinds a forward."""


def _bare_stopped(model: Any, tokens: Tensor) -> None:
    """Run a forward to the place where `capture(stop=True)` ends it, and keep nothing."""
    with _hooked(model, NAME, _end), suppress(_EndForward):
        model(tokens)


def _end(*_: object) -> Never:
    raise _EndForward


@contextmanager
def _hooked(model: Any, name: str, hook: Callable[..., None]) -> Iterator[None]:
    handle = model.hook_dict[name].register_forward_hook(hook)
    with torch.no_grad():
        yield
    handle.remove()


def _gather(*, make_room: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, tokens: Tensor) -> Tensor:
        capacity = len(tokens) if make_room else None
        with capture(model, NEURONS, stop=True, capacity=capacity) as acts:
            for batch in tokens.chunk(BATCHES):
                model(batch)
        return acts.tensor

    return run


def _gather_by_recipe(model: Any, tokens: Tensor) -> Tensor:
    """Run the recipe that people copy, with forwards that are stopped as those of `capture`."""
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, activation: Tensor) -> None:
        kept.append(activation.detach().clone())
        raise _EndForward

    with _hooked(model, NEURONS, keep):
        for batch in tokens.chunk(BATCHES):
            with suppress(_EndForward):
                model(batch)
    return torch.cat(kept)


def _gather_nothing(model: Any, tokens: Tensor) -> None:
    with _hooked(model, NEURONS, _end):
        for batch in tokens.chunk(BATCHES):
            with suppress(_EndForward):
                model(batch)


def _no_grad(run: Callable[[Any, Tensor], T]) -> Callable[[Any, Tensor], T]:
    def without(model: Any, tokens: Tensor) -> T:
        with torch.no_grad():
            return run(model, tokens)

    return without


_everything = _run_with_cache()
_filtered = _run_with_cache(names_filter=NAME)
_filtered_stopped = _run_with_cache(names_filter=NAME, stop_at_layer=LAYER + 1)

LIMIT = "bare-stopped"

WAYS = {
    way.name: way
    for way in (
        Way("cache", "`run_with_cache(tokens)`", _everything),
        Way("cache-nograd", "the same under `torch.no_grad()`", _no_grad(_everything)),
        Way("filter", "`run_with_cache(tokens, names_filter=name)`", _filtered),
        Way("filter-nograd", "the same under `torch.no_grad()`", _no_grad(_filtered)),
        Way(
            "filter-stop",
            f"`run_with_cache(tokens, names_filter=name, stop_at_layer={LAYER + 1})`",
            _filtered_stopped,
        ),
        Way("filter-stop-nograd", "the same under `torch.no_grad()`", _no_grad(_filtered_stopped)),
        Way("recipe", "the hook recipe", _recipe),
        Way("capture", "**`capture(model, name)`**", _capture(stop=False)),
        Way("capture-stop", "**`capture(model, name, stop=True)`**", _capture(stop=True)),
        Way("bare", "bare forward, nothing captured", _bare()),
        Way(
            "bare-stop-at-layer",
            f"bare forward, `stop_at_layer={LAYER + 1}`",
            _bare(stop_at_layer=LAYER + 1),
        ),
        Way(LIMIT, "bare forward, stopped at the hook: the limit", _bare_stopped),
    )
}

GATHER_LIMIT = "gather-bare"

GATHER_WAYS = {
    way.name: way
    for way in (
        Way("gather-recipe", "a list of clones, and `torch.cat`", _gather_by_recipe),
        Way("gather", "**`capture(model, name, stop=True)`**", _gather(make_room=False)),
        Way(
            "gather-capacity",
            "**`capture(model, name, stop=True, capacity=rows)`**",
            _gather(make_room=True),
        ),
        Way(GATHER_LIMIT, "bare forwards, stopped at the hook", _gather_nothing),
    )
}
