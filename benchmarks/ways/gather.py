"""The ways to gather one activation of many batches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    Setup,
    at_neurons,
    at_resid,
    block_path,
    middle,
    neurons_name,
    neurons_path,
    resid_name,
    seen,
)
from benchmarks.ways.way import Run, Table, Way, bare_way

MANY = 64


@dataclass(frozen=True)
class Gathered:
    """The gathered activation.

    Attributes:
        of: Its name in tables.
        name: TransformerLens' name of it in a layer.
        at: Finds where a bare hook sees it in a layer.
        traced: Finds it in a layer, in a trace of nnsight.
        pos: The kept position, if not all of them are.

    """

    of: str
    name: Callable[[int], str]
    at: Callable[[Any, int], Register]
    traced: Callable[[Any, int], Tensor]
    pos: int | None = None

    def select(self, activation: Tensor) -> Tensor:
        """Select the kept part, as a view that keeps the whole activation alive."""
        return activation if self.pos is None else activation[:, self.pos]

    def cut(self, activation: Tensor) -> Tensor:
        """Clone a position; all positions need no clone if they are not overwritten."""
        return activation if self.pos is None else self.select(activation).clone()


def gather(gathered: Gathered, batches: int, *, make_room: bool = False) -> Run:
    """Capture it for all batches."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        name, capacity = gathered.name(middle(model)), len(tokens) if make_room else None
        with capture(model, name, stop=True, slice=gathered.pos, capacity=capacity) as acts:
            for batch in tokens.chunk(batches):
                model(batch)
        return acts.tensor

    return run


def _recipe(gathered: Gathered, batches: int) -> Run:
    """Run the common recipe, with forwards that are stopped like those of `capture`."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(_module: object, args: Any, *output: Tensor) -> None:
            kept.append(gathered.select(seen(args, output)).clone())
            raise EndForward

        stopped(batches, at=_place(gathered), hook=keep)(model, tokens)
        return torch.cat(kept)

    return run


def _cache(gathered: Gathered, batches: int) -> Run:
    def run(model: Any, tokens: Tensor) -> Tensor:
        name, kept = gathered.name(middle(model)), []
        options = {} if gathered.pos is None else {"pos_slice": gathered.pos}
        for batch in tokens.chunk(batches):
            with torch.no_grad():
                _, cache = model.run_with_cache(
                    batch, names_filter=name, stop_at_layer=middle(model) + 1, **options
                )
            kept.append(gathered.cut(cache[name]))
        return torch.cat(kept)

    return run


def _trace(gathered: Gathered, batches: int) -> Run:
    def run(model: Any, tokens: Tensor) -> Tensor:
        import nnsight

        kept: list[Tensor] = []
        layer = middle(model._module)
        for batch in tokens.chunk(batches):
            with torch.no_grad(), model.trace(batch) as tracer:
                activation: Tensor = nnsight.save(gathered.cut(gathered.traced(model, layer)))
                tracer.stop()
            kept.append(activation)
        return torch.cat(kept)

    return run


def _place(gathered: Gathered) -> Callable[[Any], Register]:
    return lambda model: gathered.at(model, middle(model))


NEURONS = Gathered(
    "the neurons of a layer",
    neurons_name,
    at_neurons,
    lambda model, layer: model.get(neurons_path(model._module, layer)).input,
)
"""Four times as wide as a `resid_post`, so that a batch of it is as large as a forward."""
RESID = Gathered(
    "the `resid_post` of a layer",
    resid_name,
    at_resid,
    lambda model, layer: model.get(block_path(model._module, layer)).output,
)
LAST = replace(RESID, of="the last position of a `resid_post`", pos=-1)


def gather_table(gathered: Gathered, batches: int, *, prefix: str, **options: Any) -> Table:
    """Compare the ways to gather as many batches of a bridge, and of the same plain model."""
    ours = "`capture(model, name, stop=True"
    roomy = gather(gathered, batches, make_room=True)
    recipe, ready = _recipe(gathered, batches), gather(gathered, batches)
    cached = "`run_with_cache`, filtered and stopped, and `torch.cat`"
    clones = "a list of clones, and `torch.cat`"
    cases: tuple[tuple[str, str, str, Run, str], ...] = (
        ("cache", BRIDGE, cached, _cache(gathered, batches), ""),
        ("recipe", BRIDGE, clones, recipe, "hook and torch.cat"),
        ("capture", BRIDGE, f"**{ours})`**", ready, "capture, bridge"),
        ("capacity", BRIDGE, f"**{ours}, capacity=rows)`**", roomy, ""),
        ("plain-nnsight", NNSIGHT, "nnsight: `trace`, `save`, `stop`, and `torch.cat`",
            _trace(gathered, batches), "nnsight, stopped"),
        ("plain-recipe", PLAIN, f"{clones}, plain model", recipe, ""),
        ("plain-capture", PLAIN, f"**{ours})`**, plain model", ready, "capture, plain model"),
    )  # fmt: skip
    limits = {BRIDGE: f"{prefix}-{batches}-bare", PLAIN: f"{prefix}-{batches}-plain-bare"}
    near = f"{prefix}-{batches}-plain-capture"
    captured = (
        Way(
            f"{prefix}-{batches}-{name}",
            title,
            run,
            limits[BRIDGE if kind == BRIDGE else PLAIN],
            kind,
            near=near if (kind, name) == (BRIDGE, "capture") else "",
            label=label,
        )
        for name, kind, title, run, label in cases
    )
    nothing = stopped(batches, at=_place(gathered))
    bare = (
        bare_way(limit, f"bare forwards, stopped at the hook, {kind}", nothing, limit, kind)
        for kind, limit in limits.items()
    )
    return Table(
        title=f"{gathered.of}, {batches} batches, of a bridge and of the same plain model",
        ways=(*captured, *bare),
        setup=Setup(tokens=64),
        varied={"batches": batches},
        **options,
    )


GATHER_TABLE = gather_table(
    NEURONS, MANY, prefix="gather", name="gathering", sweep="batches", x=MANY
)
LAST_TABLE = gather_table(LAST, MANY, prefix="last", name="last", rounds=0)
