"""The ways to get one activation of a bridge, as they are compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Never, TypeVar

import torch
from torch import Tensor

from actctx import capture
from benchmarks._models import BRIDGE, Setup

T = TypeVar("T")
Captured = Tensor | Sequence[Tensor] | None

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
            returns the activation, or several, and holds nothing else; a bare forward, which
            captures nothing, returns None.
        limit: The name of the way that it is compared with.
        model: The kind of model that it runs on.
        near: The name of a way with another implementation of attention, whose activation its
            own is near to. Ways that have the limit and the attention in common yield the same.

    """

    name: str
    title: str
    run: Callable[[Any, Tensor], Captured]
    limit: str
    model: str = BRIDGE
    near: str = ""


@dataclass(frozen=True)
class Table:
    """Ways that are compared with each other.

    Attributes:
        name: What all of them are chosen by.
        title: What they do.
        setup: The model that they do it with.
        ways: The ways, in the order of the table.
        timed: Whether time is measured, too.
        factor: How many batches of the setup's are gathered.

    """

    name: str
    title: str
    setup: Setup
    ways: tuple[Way, ...]
    timed: bool = True
    factor: int = 1


def run_with_cache(**options: Any) -> Callable[[Any, Tensor], Tensor]:
    """Cache and read the activation."""

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


def capturing(*, stop: bool) -> Callable[[Any, Tensor], Tensor]:
    """Capture the activation."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        with capture(model, NAME, stop=stop) as acts:
            model(tokens)
        return acts.tensor

    return run


def bare(**options: Any) -> Callable[[Any, Tensor], None]:
    """Run a forward without gradients, and capture nothing."""

    def run(model: Any, tokens: Tensor) -> None:
        model(tokens, **options)

    return no_grad(run)


class EndForward(Exception):  # noqa: N818  a signal, not an error
    """Unwinds a forward."""


def _bare_stopped(model: Any, tokens: Tensor) -> None:
    """Run a forward to the place where `capture(stop=True)` ends it, and keep nothing."""
    with _hooked(model, NAME, end_forward), suppress(EndForward):
        model(tokens)


def end_forward(*_: object) -> Never:
    """End the forward that called this hook."""
    raise EndForward


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
        raise EndForward

    with _hooked(model, NEURONS, keep):
        for batch in tokens.chunk(BATCHES):
            with suppress(EndForward):
                model(batch)
    return torch.cat(kept)


def _gather_nothing(model: Any, tokens: Tensor) -> None:
    with _hooked(model, NEURONS, end_forward):
        for batch in tokens.chunk(BATCHES):
            with suppress(EndForward):
                model(batch)


def no_grad(run: Callable[[Any, Tensor], T]) -> Callable[[Any, Tensor], T]:
    """Run a way without gradients."""

    def without(model: Any, tokens: Tensor) -> T:
        with torch.no_grad():
            return run(model, tokens)

    return without


everything = run_with_cache()
_filtered = run_with_cache(names_filter=NAME)
filtered_stopped = run_with_cache(names_filter=NAME, stop_at_layer=LAYER + 1)

LIMIT = "bare-stopped"

BRIDGE_TABLE = Table(
    "bridge",
    f"one {NAME} of a bridge",
    Setup(),
    tuple(
        Way(name, title, run, LIMIT)
        for name, title, run in (
            ("cache", "`run_with_cache(tokens)`", everything),
            ("cache-nograd", "the same under `torch.no_grad()`", no_grad(everything)),
            ("filter", "`run_with_cache(tokens, names_filter=name)`", _filtered),
            ("filter-nograd", "the same under `torch.no_grad()`", no_grad(_filtered)),
            (
                "filter-stop",
                f"`run_with_cache(tokens, names_filter=name, stop_at_layer={LAYER + 1})`",
                filtered_stopped,
            ),
            (
                "filter-stop-nograd",
                "the same under `torch.no_grad()`",
                no_grad(filtered_stopped),
            ),
            ("recipe", "the hook recipe", _recipe),
            ("capture", "**`capture(model, name)`**", capturing(stop=False)),
            ("capture-stop", "**`capture(model, name, stop=True)`**", capturing(stop=True)),
            ("bare", "bare forward, nothing captured", bare()),
            (
                "bare-stop-at-layer",
                f"bare forward, `stop_at_layer={LAYER + 1}`",
                bare(stop_at_layer=LAYER + 1),
            ),
            (LIMIT, "bare forward, stopped at the hook: the limit", _bare_stopped),
        )
    ),
)

GATHER_TABLE = Table(
    "gathering",
    f"{BATCHES} batches of {NEURONS} of a bridge",
    Setup(batch=8 * BATCHES, tokens=64),
    tuple(
        Way(name, title, run, "gather-bare")
        for name, title, run in (
            ("gather-recipe", "a list of clones, and `torch.cat`", _gather_by_recipe),
            ("gather", "**`capture(model, name, stop=True)`**", _gather(make_room=False)),
            (
                "gather-capacity",
                "**`capture(model, name, stop=True, capacity=rows)`**",
                _gather(make_room=True),
            ),
            ("gather-bare", "bare forwards, stopped at the hook", _gather_nothing),
        )
    ),
    timed=False,
    factor=BATCHES,
)
