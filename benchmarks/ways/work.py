"""Other work on a bridge and on the same plain model, beside a bare hook written for it.

Hugging Face's hidden states have neither heads nor the last layer's `resid_post`, which it
normalizes, so that it is asked for neither of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks.ways.bridge import EndForward, stopped
from benchmarks.ways.models import (
    BRIDGE,
    NNSIGHT,
    PLAIN,
    Register,
    at_heads,
    at_resid,
    block_path,
    depth,
    heads_name,
    projection_path,
    resid_name,
    seen,
)
from benchmarks.ways.way import Run, Table, Way, bare_way

HEADS = [0, 3]


@dataclass(frozen=True)
class Work:
    """Something to capture.

    Attributes:
        title: What the table calls it.
        layers: Chooses the layers of a model of a given depth.
        select: What is kept of an activation, given the number of heads: its own where it is not
            all of it.
        options: The options of `capture` that select the same.
        cached: The options of `run_with_cache` that do some of it.
        heads: Whether it is the output of the heads instead of the `resid_post`.

    """

    title: str
    layers: Callable[[int], Sequence[int]]
    select: Callable[[Tensor, int], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    cached: dict[str, Any] = field(default_factory=dict)
    heads: bool = False


def _middle(layers: int) -> Sequence[int]:
    return [layers // 2]


def _heads(z: Tensor, heads: int) -> Tensor:
    """Select of a bridge's `hook_z`, or of what a plain model projects instead."""
    return z.view(*z.shape[:2], heads, -1)[:, :, HEADS]


def whole(resid: Tensor, _heads: int) -> Tensor:
    """Keep all of it."""
    return resid


WORK = {
    "all": Work("all `resid_post`", range, whole),
    "last": Work(
        "the last position",
        _middle,
        lambda resid, _heads: resid[:, -1].clone(),
        {"slice": {"pos": -1}},
        {"pos_slice": -1},
    ),
    "heads": Work("two heads of `hook_z`", _middle, _heads, {"slice": {"head": HEADS}}, heads=True),
    "half": Work(
        "as float16",
        _middle,
        lambda resid, _heads: resid.to(torch.float16),
        {"dtype": torch.float16},
    ),
}


def names(work: Work, model: Any) -> list[str]:
    """Return TransformerLens' names of what is asked for."""
    name = heads_name if work.heads else resid_name
    return [name(layer) for layer in work.layers(depth(model))]


def by_capture(work: Work) -> Run:
    """Capture it."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        with capture(model, names(work, model), stop=True, **work.options) as acts:
            model(tokens)
        return list(acts.values())

    return run


def by_cache(work: Work) -> Run:
    """Have TransformerLens cache it alone, to its layer and without gradients."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        asked, layer = names(work, model), work.layers(depth(model))[-1]
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens, names_filter=asked, stop_at_layer=layer + 1, **work.cached
            )
            return [work.select(cache[name], model.cfg.n_heads) for name in asked]

    return run


def by_trace(work: Work) -> Run:
    """Have nnsight save it, and stop behind it."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        import nnsight

        module = model._module
        path, heads = (
            projection_path if work.heads else block_path,
            module.config.num_attention_heads,
        )
        places = [model.get(path(module, layer)) for layer in work.layers(depth(module))]
        with torch.no_grad(), model.trace(tokens) as tracer:
            kept: list[Tensor] = nnsight.save([])
            for place in places:
                activation = place.input if work.heads else place.output
                kept.append(work.select(activation, heads))
            tracer.stop()
        return kept

    return run


def by_hidden_states(work: Work) -> Run:
    """Have Hugging Face return all layers, without the logits, and cut it out of them."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        with torch.no_grad():
            states = model.base_model(tokens, output_hidden_states=True).hidden_states
            layers = work.layers(depth(model))
            return [work.select(states[layer + 1], 0) for layer in layers]

    return run


@contextmanager
def bare_hooks(work: Work, model: Any, hook: Callable[..., None]) -> Iterator[int]:
    """Have bare torch hooks at all its places, without gradients, and yield how many."""
    with ExitStack() as hooks, torch.no_grad():
        layers = work.layers(depth(model))
        for layer in layers:
            hooks.callback(_at(work, model, layer)(hook).remove)
        yield len(layers)


def _at(work: Work, model: Any, layer: int) -> Register:
    return at_heads(model, layer) if work.heads else at_resid(model, layer)


def by_hand(work: Work) -> Run:
    """Keep it in bare hooks, the last of which ends the forward."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        heads = model.cfg.n_heads if hasattr(model, "cfg") else model.config.num_attention_heads

        def keep(_module: object, args: Any, *output: Any) -> None:
            activation = seen(args, output)
            selected = work.select(activation, heads)
            kept.append(selected.clone() if selected is activation else selected)
            if len(kept) == asked:
                raise EndForward

        with bare_hooks(work, model, keep) as asked, suppress(EndForward):
            model(tokens)
        return kept

    return run


def stopped_behind(work: Work) -> Run:
    """Keep nothing, and end the forward where the others do."""

    def at(model: Any) -> Register:
        return _at(work, model, work.layers(depth(model))[-1])

    return stopped(at=at)


def _ways() -> Iterator[Way]:
    for name, work in WORK.items():
        for kind in (BRIDGE, PLAIN):
            ours, limit = f"{kind}-{name}", f"{kind}-{name}-by-hand"
            yield Way(ours, f"**{work.title}, {kind}**", by_capture(work), limit, kind)
            yield from _peers(name, work, kind, limit)
            yield Way(limit, f"{work.title}, {kind}, by hand", by_hand(work), limit, kind)
            bare = f"bare forward to there, {kind}"
            yield bare_way(f"{ours}-bare", bare, stopped_behind(work), limit, kind)


def _peers(name: str, work: Work, kind: str, limit: str) -> Iterator[Way]:
    """Give what a user could pick instead."""
    if kind == BRIDGE:
        title = f"{work.title}, `run_with_cache`, filtered, stopped, no_grad"
        yield Way(f"bridge-{name}-cache", title, by_cache(work), limit)
        return
    title = f"{work.title}, nnsight: `trace`, `save`, `stop`"
    yield Way(f"plain-{name}-nnsight", title, by_trace(work), limit, NNSIGHT)
    if not work.heads and name != "all":
        title = f"{work.title}, `model.base_model(output_hidden_states=True)`"
        yield Way(f"plain-{name}-hidden", title, by_hidden_states(work), limit, PLAIN)


WORK_TABLE = Table(
    "work",
    "`capture(stop=True)` of other things, beside a bare hook and what else does it",
    tuple(_ways()),
)
