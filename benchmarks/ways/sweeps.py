"""Tables that differ in one number, for plots.

The last table of gathered batches is `gathering`.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.ways.gather import NEURONS, gather_table
from benchmarks.ways.models import BRIDGE, NNSIGHT, PLAIN, Setup
from benchmarks.ways.plain import LIMIT, PLAIN_TABLE
from benchmarks.ways.way import Run, Table, Way, bare_way
from benchmarks.ways.work import (
    Work,
    by_cache,
    by_capture,
    by_hidden_states,
    by_trace,
    names,
    stopped_behind,
    whole,
)

SWEEPS = {
    "length": "tokens a sequence",
    "batch": "sequences a batch",
    "depth": "layers of the model",
    "asked": "layers asked for",
    "batches": "batches gathered",
}
"""The varied number, as the label of an axis."""

DRAWN = (
    "plain-cache-nograd",
    "plain-filter-stop-nograd",
    "plain-hidden-base",
    "plain-nnsight",
    "plain-bridge",
    "plain-capture-stop",
)


def _plain_table(sweep: str, x: int, setup: Setup, **varied: int) -> Table:
    return Table(
        f"{sweep}-{x}",
        f"one `resid_post`, {x} {SWEEPS[sweep]}",
        tuple(way for way in PLAIN_TABLE.ways if way.name in {*DRAWN, LIMIT}),
        setup,
        varied,
        sweep=sweep,
        x=x,
    )


def _work(asked: int) -> Work:
    """Request the last layers but one, whose hidden state Hugging Face normalizes."""
    return Work(f"{asked} layers", lambda deep: range(deep - 1 - asked, deep - 1), whole)


def _cache_all(work: Work) -> Run:
    """Let TransformerLens cache everything."""

    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
        return [cache[name] for name in names(work, model)]

    return run


def _asked_table(asked: int) -> Table:
    work, limit, near = _work(asked), f"asked-{asked}-bare", f"asked-{asked}-hidden"
    cases: tuple[tuple[str, str, str, Run, str], ...] = (
        (
            "cache",
            BRIDGE,
            "`run_with_cache(tokens)`, no_grad",
            _cache_all(work),
            "run_with_cache, no_grad",
        ),
        (
            "filter-stop",
            BRIDGE,
            "`run_with_cache(tokens, names_filter=names, stop_at_layer=last + 1)`, no_grad",
            by_cache(work),
            "run_with_cache, filtered, stopped",
        ),
        (
            "hidden",
            PLAIN,
            "`model.base_model(output_hidden_states=True)`",
            by_hidden_states(work),
            "hidden states, no logits",
        ),
        (
            "nnsight",
            NNSIGHT,
            "nnsight: `trace`, `save`, `stop`",
            by_trace(work),
            "nnsight, stopped",
        ),
        *(
            (kind, kind, f"**`capture(model, names, stop=True)`, {kind}**", by_capture(work), label)
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
    )
    bare = "bare forward, stopped after the last of them"
    return Table(
        f"asked-{asked}",
        f"the `resid_post` of {asked} layers",
        (*captured, bare_way(limit, bare, stopped_behind(work), limit, PLAIN)),
        sweep="asked",
        x=asked,
    )


SWEEP_TABLES = (
    *(
        _plain_table("length", x, Setup(batch=4), tokens=x, context=2048)
        for x in (64, 256, 1024, 2048)
    ),
    *(_plain_table("batch", x, Setup(), batch=x) for x in (1, 4, 16)),
    *(_plain_table("depth", x, Setup(), layers=x) for x in (6, 12, 24)),
    *(_asked_table(x) for x in (1, 3, 11)),
    *(
        gather_table(NEURONS, x, prefix="gather", name=f"batches-{x}", sweep="batches", x=x)
        for x in (1, 8)
    ),
)
