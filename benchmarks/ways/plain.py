"""The ways to get one activation of a plain Hugging Face model, next to those of a bridge."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.ways.bridge import (
    STOPPED,
    bare,
    capturing,
    everything,
    filtered_stopped,
    no_grad,
    stopped,
)
from benchmarks.ways.models import BRIDGE, NNSIGHT, PLAIN, TORCHLENS, Setup, block_path, middle
from benchmarks.ways.way import Run, Table, Way, bare_way

LIMIT = "plain-bare-stopped"
NEAR = "plain-hidden"


def _hidden_states(model: Any, tokens: Tensor) -> Tensor:
    states = model(tokens, output_hidden_states=True).hidden_states
    activation: Tensor = states[middle(model) + 1]
    return activation


def _hidden_states_of_the_base(model: Any, tokens: Tensor) -> Tensor:
    """Skip the logits, which are most of the memory."""
    return _hidden_states(model.base_model, tokens)


def _trace(model: Any, tokens: Tensor) -> Tensor:
    layer = model.get(block_path(model._module, middle(model)))
    with torch.no_grad(), model.trace(tokens) as tracer:
        activation: Tensor = layer.output.save()
        tracer.stop()
    return activation


def _record(model: Any, tokens: Tensor) -> Tensor:
    """Save one layer, and halt after it: a selector in `halt=` sees no module, a callable does."""
    import torchlens

    path = block_path(model, middle(model))

    def left(event: Any) -> bool:
        return bool(event.kind == "module_exit" and event.address == path)

    with torch.no_grad():
        (saved,) = torchlens.record(model, tokens, save=torchlens.module(path), halt=left)
    activation: Tensor = saved.ram_payload
    return activation


_CASES: tuple[tuple[str, str, str, Run, str], ...] = (
    ("cache", BRIDGE, "`run_with_cache(tokens)`", everything, "run_with_cache"),
    (
        "cache-nograd",
        BRIDGE,
        "`run_with_cache(tokens)`, no_grad",
        no_grad(everything),
        "run_with_cache, no_grad",
    ),
    (
        "filter-stop-nograd",
        BRIDGE,
        f"`{STOPPED}`, no_grad",
        no_grad(filtered_stopped),
        "run_with_cache, filtered, stopped",
    ),
    (
        "bridge",
        BRIDGE,
        "**`capture(bridge, name, stop=True)`**",
        capturing(stop=True),
        "capture, bridge",
    ),
    (
        "hidden",
        PLAIN,
        "`model(output_hidden_states=True)`",
        no_grad(_hidden_states),
        "hidden states",
    ),
    (
        "hidden-base",
        PLAIN,
        "`model.base_model(output_hidden_states=True)`",
        no_grad(_hidden_states_of_the_base),
        "hidden states, no logits",
    ),
    ("nnsight", NNSIGHT, "nnsight: `trace`, `save`, `stop`", _trace, "nnsight, stopped"),
    (
        "torchlens",
        TORCHLENS,
        "torchlens: `record(save=module, halt=...)`",
        _record,
        "torchlens",
    ),
    ("capture", PLAIN, "**`capture(model, name)`**", capturing(stop=False), ""),
    (
        "capture-stop",
        PLAIN,
        "**`capture(model, name, stop=True)`**",
        capturing(stop=True),
        "capture, plain model",
    ),
)
"""For each way its name, its kind of model, its title, its function, and its label in plots."""


def _ways() -> tuple[Way, ...]:
    captured = (
        Way(
            f"plain-{name}",
            title,
            run,
            LIMIT,
            model,
            near=NEAR if model == BRIDGE else "",
            label=label,
            alone=model == TORCHLENS,
        )
        for name, model, title, run, label in _CASES
    )
    return (
        *captured,
        bare_way("plain-bare", "bare forward, nothing captured", bare, LIMIT, PLAIN),
        bare_way(
            LIMIT,
            "bare forward, stopped after the layer: the limit",
            stopped(),
            LIMIT,
            PLAIN,
            label="the limit",
        ),
    )


PLAIN_TABLE = Table(
    "plain",
    "one `resid_post` of a bridge and of the same plain model",
    _ways(),
    Setup(tokens=1024),
    rounds=2,
    repeats=2,
)
