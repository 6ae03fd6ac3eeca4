"""The ways to get one activation of a bridge."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Never, TypeVar

import torch
from torch import Tensor

from actctx import capture
from benchmarks.ways.models import Register, at_resid, middle, resid_name
from benchmarks.ways.way import Table, Way, bare_way

T = TypeVar("T")


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
    """Find where a bare hook sees the requested activation."""
    return at_resid(model, middle(model))


def stopped(
    batches: int = 1,
    *,
    at: Callable[[Any], Register] = at_middle,
    hook: Callable[..., None] = end_forward,
) -> Callable[[Any, Tensor], None]:
    """Run bare forwards up to where `capture(stop=True)` ends them, and keep nothing.

    Args:
        batches: The number of forwards that the tokens are split into.
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
    """Add a bare torch hook to a model, without gradients."""
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
