"""Other work on a bridge and on the same plain model, beside a bare hook written for it."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks._models import BRIDGE, PLAIN, Setup
from benchmarks._ways import LAYER, NAME, EndForward, Table, Way

HEADS = [0, 3]


@dataclass(frozen=True)
class Work:
    """Something to capture.

    Attributes:
        title: What the table calls it.
        names: The names of the sites.
        module: Where a plain model has the one site, or, with a `*`, the sites.
        select: What a bare hook keeps of an activation, given the number of heads.
        options: The options of `capture` that select the same.

    """

    title: str
    names: str
    module: str
    select: Callable[[Tensor, int], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def _heads(z: Tensor, heads: int) -> Tensor:
    """Select of a bridge's `hook_z`, or of what a plain model projects instead."""
    return z.view(*z.shape[:2], heads, -1)[:, :, HEADS]


WORK = {
    "all": Work(
        "all `resid_post`",
        "blocks.*.hook_resid_post",
        "transformer.h.*",
        lambda resid, _heads: resid.clone(),
    ),
    "last": Work(
        "the last position",
        NAME,
        f"transformer.h.{LAYER}",
        lambda resid, _heads: resid[:, -1].clone(),
        {"slice": {"pos": -1}},
    ),
    "heads": Work(
        "two heads of `hook_z`",
        f"blocks.{LAYER}.attn.hook_z",
        f"transformer.h.{LAYER}.attn.c_proj",
        _heads,
        {"slice": {"head": HEADS}},
    ),
    "half": Work(
        "as float16",
        NAME,
        f"transformer.h.{LAYER}",
        lambda resid, _heads: resid.to(torch.float16),
        {"dtype": torch.float16},
    ),
}


def _capture(work: Work) -> Callable[[Any, Tensor], list[Tensor]]:
    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        with capture(model, work.names, stop=True, **work.options) as acts:
            model(tokens)
        return list(acts.values())

    return run


def _by_hand(work: Work, kind: str) -> Callable[[Any, Tensor], list[Tensor]]:
    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        layers = range(model.config.n_layer) if kind == PLAIN else range(model.cfg.n_layers)
        heads = model.config.n_head if kind == PLAIN else model.cfg.n_heads
        path = work.module if kind == PLAIN else work.names
        paths = [path.replace("*", str(layer)) for layer in (layers if "*" in path else [0])]

        def keep(_module: object, args: Any, *output: Any) -> None:
            kept.append(work.select(output[0] if output else args[0], heads))
            if len(kept) == len(paths):
                raise EndForward

        with ExitStack() as hooks, torch.no_grad(), suppress(EndForward):
            for each in paths:
                place = model.get_submodule(each) if kind == PLAIN else model.hook_dict[each]
                before = each.endswith("c_proj")
                register = (
                    place.register_forward_pre_hook if before else place.register_forward_hook
                )
                hooks.callback(register(keep).remove)
            model(tokens)
        return kept

    return run


def _ways() -> list[Way]:
    ways = []
    for name, work in WORK.items():
        for kind in (BRIDGE, PLAIN):
            ours, limit = f"{kind}-{name}", f"{kind}-{name}-by-hand"
            ways += [
                Way(ours, f"**{work.title}, {kind}**", _capture(work), limit, kind),
                Way(limit, f"{work.title}, {kind}, by hand", _by_hand(work, kind), limit, kind),
            ]
    return ways


WORK_TABLE = Table(
    "work", "`capture(stop=True)` of other things, beside a bare hook", Setup(), tuple(_ways())
)
