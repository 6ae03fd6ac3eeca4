"""Other work on a bridge and on the same plain model, beside a bare hook written for it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks._models import BRIDGE, PLAIN, block_path, depth, projection_path, resid_name
from benchmarks._ways import EndForward, Run, Table, Way

HEADS = [0, 3]


@dataclass(frozen=True)
class Work:
    """Something to capture.

    Attributes:
        title: What the table calls it.
        layers: Chooses the layers of a model of a given depth.
        select: What a bare hook keeps of an activation, given the number of heads.
        options: The options of `capture` that select the same.
        heads: Whether it is the output of the heads instead of the `resid_post`.

    """

    title: str
    layers: Callable[[int], Sequence[int]]
    select: Callable[[Tensor, int], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    heads: bool = False


def _middle(layers: int) -> Sequence[int]:
    return [layers // 2]


def _heads(z: Tensor, heads: int) -> Tensor:
    """Select of a bridge's `hook_z`, or of what a plain model projects instead."""
    return z.view(*z.shape[:2], heads, -1)[:, :, HEADS]


def _whole(resid: Tensor, _heads: int) -> Tensor:
    return resid.clone()


WORK = {
    "all": Work("all `resid_post`", range, _whole),
    "last": Work(
        "the last position",
        _middle,
        lambda resid, _heads: resid[:, -1].clone(),
        {"slice": {"pos": -1}},
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
    layers = work.layers(depth(model))
    return [f"blocks.{i}.attn.hook_z" if work.heads else resid_name(i) for i in layers]


def by_capture(work: Work) -> Run:
    """Capture it."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        with capture(model, names(work, model), stop=True, **work.options) as acts:
            model(tokens)
        return list(acts.values())

    return run


@contextmanager
def bare_hooks(work: Work, model: Any, hook: Callable[..., None]) -> Iterator[int]:
    """Have bare torch hooks at all its places, without gradients, and yield how many."""
    with ExitStack() as hooks, torch.no_grad():
        layers = work.layers(depth(model))
        for layer, name in zip(layers, names(work, model), strict=True):
            hooks.callback(_register(work, model, layer, name)(hook).remove)
        yield len(layers)


def _register(work: Work, model: Any, layer: int, name: str) -> Callable[..., Any]:
    if hasattr(model, "hook_dict"):
        register: Callable[..., Any] = model.hook_dict[name].register_forward_hook
    elif work.heads:
        register = model.get_submodule(projection_path(model, layer)).register_forward_pre_hook
    else:
        register = model.get_submodule(block_path(model, layer)).register_forward_hook
    return register


def by_hand(work: Work) -> Run:
    """Keep it in bare hooks, the last of which ends the forward."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        heads = model.cfg.n_heads if hasattr(model, "cfg") else model.config.num_attention_heads

        def keep(_module: object, args: Any, *output: Any) -> None:
            kept.append(work.select(output[0] if output else args[0], heads))
            if len(kept) == asked:
                raise EndForward

        with bare_hooks(work, model, keep) as asked, suppress(EndForward):
            model(tokens)
        return kept

    return run


def _ways() -> tuple[Way, ...]:
    ways = []
    for name, work in WORK.items():
        for kind in (BRIDGE, PLAIN):
            ours, limit = f"{kind}-{name}", f"{kind}-{name}-by-hand"
            ways += [
                Way(ours, f"**{work.title}, {kind}**", by_capture(work), limit, kind),
                Way(limit, f"{work.title}, {kind}, by hand", by_hand(work), limit, kind),
            ]
    return tuple(ways)


WORK_TABLE = Table("work", "`capture(stop=True)` of other things, beside a bare hook", _ways())
