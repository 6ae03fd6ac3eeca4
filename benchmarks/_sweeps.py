"""Tables that differ in one number: what plots are drawn from."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks._gather import gather_table
from benchmarks._models import BRIDGE, PLAIN, Setup, block_path, depth, resid_name
from benchmarks._plain import LIMIT, PLAIN_TABLE
from benchmarks._ways import EndForward, Run, Table, Way, end_forward, hooked

SWEEPS = {
    "length": "tokens a sequence",
    "batch": "sequences a batch",
    "depth": "layers of the model",
    "asked": "layers asked for",
    "batches": "batches gathered",
}
"""What is varied, as an axis calls it."""

DRAWN = ("plain-cache-nograd", "plain-hidden-base", "plain-bridge", "plain-capture-stop")
STATES = "hidden states, no logits"
ONCE: dict[str, Any] = {"rounds": 1, "repeats": 3}


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


def _cache(asked: int) -> Run:
    def run(model: Any, tokens: Tensor) -> list[Tensor]:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
        return [cache[resid_name(layer)] for layer in _layers(model, asked)]

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


def _stopped(model: Any, tokens: Tensor) -> None:
    layer = model.get_submodule(block_path(model, depth(model) - 2))
    with hooked(layer, end_forward), suppress(EndForward):
        model(tokens)


def _asked_table(asked: int) -> Table:
    limit, near = f"asked-{asked}-bare", f"asked-{asked}-hidden"
    states = "`model.base_model(output_hidden_states=True)`"
    return Table(
        f"asked-{asked}",
        f"the `resid_post` of {asked} layers",
        (
            Way(
                f"asked-{asked}-cache",
                "`run_with_cache(tokens)`, no_grad",
                _cache(asked),
                limit,
                near=near,
                label="run_with_cache, no_grad",
            ),
            Way(near, states, _hidden_states(asked), limit, PLAIN, label=STATES),
            *(
                Way(
                    f"asked-{asked}-{kind}",
                    f"**`capture(model, names, stop=True)`, {kind}**",
                    _capture(asked),
                    limit,
                    kind,
                    near=near if kind == BRIDGE else "",
                    label=f"capture, {label}",
                )
                for kind, label in ((BRIDGE, "bridge"), (PLAIN, "plain model"))
            ),
            Way(limit, "bare forward, stopped after the last of them", _stopped, limit, PLAIN),
        ),
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
    *(gather_table(x, name=f"batches-{x}", sweep="batches", x=x, **ONCE) for x in (1, 4, 16, 64)),
)
