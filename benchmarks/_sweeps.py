"""Tables that differ in one number: what plots are drawn from."""

from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks._gather import MANY, NEURONS, gather_table
from benchmarks._models import (
    BRIDGE,
    NNSIGHT,
    PLAIN,
    Register,
    Setup,
    at_resid,
    block_path,
    depth,
    resid_name,
)
from benchmarks._plain import LIMIT, PLAIN_TABLE, WITHOUT
from benchmarks._ways import Run, Table, Way, bare_way, stopped

SWEEPS = {
    "length": "tokens a sequence",
    "batch": "sequences a batch",
    "depth": "layers of the model",
    "asked": "layers asked for",
    "batches": "batches gathered",
}
"""What is varied, as an axis calls it."""

DRAWN = (
    "plain-cache-nograd",
    "plain-filter-stop-nograd",
    "plain-hidden-base",
    "plain-nnsight",
    "plain-bridge",
    "plain-capture-stop",
)
ONCE: dict[str, Any] = {"rounds": 1, "repeats": 2}
LONG: dict[str, Any] = {"rounds": 1, "repeats": 1}


def _plain_table(sweep: str, x: int, setup: Setup, **varied: int) -> Table:
    return Table(
        f"{sweep}-{x}",
        f"one `resid_post`, {x} {SWEEPS[sweep]}",
        tuple(way for way in PLAIN_TABLE.ways if way.name in {*DRAWN, LIMIT}),
        setup,
        varied,
        sweep=sweep,
        x=x,
        **ONCE,
    )


def _layers(model: Any, asked: int) -> range:
    """Ask for the last layers but one, whose hidden state Hugging Face normalizes."""
    return range(depth(model) - 1 - asked, depth(model) - 1)


def _cache(asked: int, *, only: bool) -> Run:
    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        layers = _layers(model, asked)
        names = [resid_name(layer) for layer in layers]
        options = {"names_filter": names, "stop_at_layer": layers[-1] + 1} if only else {}
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, **options)
        return [cache[name] for name in names]

    return run


def _hidden_states(asked: int) -> Run:
    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        with torch.no_grad():
            states = model.base_model(tokens, output_hidden_states=True).hidden_states
        return [states[layer + 1] for layer in _layers(model, asked)]

    return run


def _capture(asked: int) -> Run:
    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        names = [resid_name(layer) for layer in _layers(model, asked)]
        with capture(model, names, stop=True) as acts:
            model(tokens)
        return [acts[name] for name in names]

    return run


def _trace(asked: int) -> Run:
    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        import nnsight

        module = model._module
        layers = [model.get(block_path(module, layer)) for layer in _layers(module, asked)]
        with torch.no_grad(), model.trace(tokens) as tracer:
            outputs: list[Tensor] = nnsight.save([layer.output for layer in layers])
            tracer.stop()
        return outputs

    return run


def _at_last(model: Any) -> Register:
    return at_resid(model, depth(model) - 2)


def _asked_table(asked: int) -> Table:
    limit, near = f"asked-{asked}-bare", f"asked-{asked}-hidden"
    cases: tuple[tuple[str, str, str, Run, str], ...] = (
        (
            "cache",
            BRIDGE,
            "`run_with_cache(tokens)`, no_grad",
            _cache(asked, only=False),
            "run_with_cache, no_grad",
        ),
        (
            "filter-stop",
            BRIDGE,
            "`run_with_cache(tokens, names_filter=names, stop_at_layer=last + 1)`, no_grad",
            _cache(asked, only=True),
            "run_with_cache, filtered, stopped",
        ),
        (
            "hidden",
            PLAIN,
            "`model.base_model(output_hidden_states=True)`",
            _hidden_states(asked),
            "hidden states, no logits",
        ),
        (
            "nnsight",
            NNSIGHT,
            "nnsight: `trace`, `save`, `stop`",
            _trace(asked),
            "nnsight, stopped",
        ),
        *(
            (kind, kind, f"**`capture(model, names, stop=True)`, {kind}**", _capture(asked), label)
            for kind, label in ((BRIDGE, "capture, bridge"), (PLAIN, "capture, plain model"))
        ),
    )
    captured = (
        Way(
            f"asked-{asked}-{name}",
            title,
            run,
            limit,
            kind,
            near=near if kind == BRIDGE else "",
            label=label,
        )
        for name, kind, title, run, label in cases
        if kind not in WITHOUT
    )
    bare = "bare forward, stopped after the last of them"
    return Table(
        f"asked-{asked}",
        f"the `resid_post` of {asked} layers",
        (*captured, bare_way(limit, bare, stopped(at=_at_last), limit, PLAIN)),
        sweep="asked",
        x=asked,
        **ONCE,
    )


SWEEP_TABLES = (
    *(
        _plain_table("length", x, Setup(batch=4), tokens=x, context=2048)
        for x in (64, 128, 256, 512, 1024, 2048)
    ),
    *(_plain_table("batch", x, Setup(), batch=x) for x in (1, 2, 4, 8, 16)),
    *(_plain_table("depth", x, Setup(), layers=x) for x in (6, 12, 24)),
    *(_asked_table(x) for x in (1, 2, 4, 8, 11)),
    *(
        gather_table(NEURONS, x, prefix="gather", name=f"batches-{x}", sweep="batches", x=x, **ONCE)
        for x in (1, 4, 16)
    ),
    gather_table(
        NEURONS, MANY, prefix="gather", name=f"batches-{MANY}", sweep="batches", x=MANY, **LONG
    ),
)
