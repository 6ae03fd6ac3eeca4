"""The ways to get one activation of a bridge, as they are compared."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Never, TypeVar

import torch
from torch import Tensor

from actctx import capture
from benchmarks._models import BRIDGE, Register, Setup, at_resid, middle, resid_name

T = TypeVar("T")
Captured = Tensor | Sequence[Tensor] | None
Run = Callable[[Any, Tensor], Captured]


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
        label: What plots call it; it is drawn if it has one.
        alone: Whether it leaves a process slower than it was, so that it is timed in its own.
        prepare: Makes what it needs beside the model and the tokens, before anything is measured.
        captures: Whether it yields anything, which a bare forward does not.

    """

    name: str
    title: str
    run: Run
    limit: str
    model: str = BRIDGE
    near: str = ""
    label: str = ""
    alone: bool = False
    prepare: Callable[[Setup], object] | None = None
    captures: bool = True


bare_way = partial(Way, captures=False)
"""Makes a way that captures nothing, for others to be compared with."""

USUAL = Setup()


@dataclass(frozen=True)
class Table:
    """Ways that are compared with each other.

    Attributes:
        name: What all of them are chosen by.
        title: What they do.
        ways: The ways, in the order of the table.
        setup: The model that they do it with, and how.
        varied: What of the setup the table is about, so that a quick run keeps it.
        rounds: The fresh processes to time in; none if memory alone is measured.
        repeats: The passes over all ways in each.
        sweep: The tables that it is one point of, if it is; most have a name for that alone.
        x: Where it is among them.
        to_disk: Whether what is captured goes to disk, or comes from there, so that it is no part
            of what a way may take of memory.
        needs: The libraries that it is left out without.

    """

    name: str
    title: str
    ways: tuple[Way, ...]
    setup: Setup = USUAL
    varied: dict[str, int] = field(default_factory=dict)
    rounds: int = 1
    repeats: int = 1
    sweep: str = ""
    x: int = 0
    to_disk: bool = False
    needs: tuple[str, ...] = ()

    @property
    def is_usual(self) -> bool:
        """Whether it is no mere point of a sweep, so that it is measured without being named."""
        return self.name != f"{self.sweep}-{self.x}"


def run_with_cache(*, only: bool = False, stop: bool = False) -> Callable[[Any, Tensor], Tensor]:
    """Cache everything or the activation alone, to the end or to its layer, and read it."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        name = resid_name(middle(model))
        options: dict[str, Any] = {"names_filter": name} if only else {}
        if stop:
            options["stop_at_layer"] = middle(model) + 1
        _, cache = model.run_with_cache(tokens, **options)
        activation: Tensor = cache[name]
        return activation

    return run


def _recipe(model: Any, tokens: Tensor) -> Tensor:
    """Run the recipe that people copy."""
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: object) -> None:  # noqa: ARG001  TransformerLens passes it
        kept.append(activation.detach().clone())

    model.hook_dict[resid_name(middle(model))].add_hook(keep)
    with torch.no_grad():
        model(tokens)
    model.reset_hooks()
    return torch.cat(kept)


def capturing(*, stop: bool) -> Callable[[Any, Tensor], Tensor]:
    """Capture the activation."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        with capture(model, resid_name(middle(model)), stop=stop) as acts:
            model(tokens)
        return acts.tensor

    return run


def bare(model: Any, tokens: Tensor) -> None:
    """Run a forward without gradients, and capture nothing."""
    with torch.no_grad():
        model(tokens)


def _bare_stop_at_layer(model: Any, tokens: Tensor) -> None:
    with torch.no_grad():
        model(tokens, stop_at_layer=middle(model) + 1)


class EndForward(Exception):  # noqa: N818  a signal, not an error
    """Unwinds a forward."""


def end_forward(*_: object) -> Never:
    """End the forward that called this hook."""
    raise EndForward


def at_middle(model: Any) -> Register:
    """Find where a bare hook sees what is asked for."""
    return at_resid(model, middle(model))


def stopped(
    batches: int = 1,
    *,
    at: Callable[[Any], Register] = at_middle,
    hook: Callable[..., None] = end_forward,
) -> Callable[[Any, Tensor], None]:
    """Run bare forwards to the place where `capture(stop=True)` ends them, and keep nothing.

    Args:
        batches: Among how many forwards the tokens are divided.
        at: Finds where the hook goes.
        hook: Ends each forward, and may keep what it sees before.

    """

    def run(model: Any, tokens: Tensor) -> None:
        with hooked(at(model), hook):
            for batch in tokens.chunk(batches):
                with suppress(EndForward):
                    model(batch)

    return run


@contextmanager
def hooked(register: Register, hook: Callable[..., None]) -> Iterator[None]:
    """Have a bare torch hook in a model, without gradients."""
    handle = register(hook)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()


def no_grad(run: Callable[[Any, Tensor], T]) -> Callable[[Any, Tensor], T]:
    """Run a way without gradients."""

    def without(model: Any, tokens: Tensor) -> T:
        with torch.no_grad():
            return run(model, tokens)

    return without


FILTERED = "run_with_cache(tokens, names_filter=name)"
STOPPED = "run_with_cache(tokens, names_filter=name, stop_at_layer=layer + 1)"
everything = run_with_cache()
_filtered = run_with_cache(only=True)
filtered_stopped = run_with_cache(only=True, stop=True)

LIMIT = "bare-stopped"

BRIDGE_TABLE = Table(
    "bridge",
    "one `resid_post` of a bridge",
    (
        *(
            Way(name, title, run, LIMIT)
            for name, title, run in (
                ("cache", "`run_with_cache(tokens)`", everything),
                ("cache-nograd", "`run_with_cache(tokens)`, no_grad", no_grad(everything)),
                ("filter", f"`{FILTERED}`", _filtered),
                ("filter-nograd", f"`{FILTERED}`, no_grad", no_grad(_filtered)),
                ("filter-stop", f"`{STOPPED}`", filtered_stopped),
                ("filter-stop-nograd", f"`{STOPPED}`, no_grad", no_grad(filtered_stopped)),
                ("recipe", "the hook recipe", _recipe),
                ("capture", "**`capture(model, name)`**", capturing(stop=False)),
                ("capture-stop", "**`capture(model, name, stop=True)`**", capturing(stop=True)),
            )
        ),
        *(
            bare_way(name, title, run, LIMIT)
            for name, title, run in (
                ("bare", "bare forward, nothing captured", bare),
                (
                    "bare-stop-at-layer",
                    "bare forward, `stop_at_layer=layer + 1`",
                    _bare_stop_at_layer,
                ),
                (LIMIT, "bare forward, stopped at the hook: the limit", stopped()),
            )
        ),
    ),
    rounds=2,
    repeats=2,
)
