"""The ways to get one activation of a plain Hugging Face model, beside those of a bridge."""

from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks._models import BRIDGE, NNSIGHT, PLAIN, Setup
from benchmarks._ways import (
    LAYER,
    NAME,
    EndForward,
    Table,
    Way,
    bare,
    capturing,
    end_forward,
    everything,
    filtered_stopped,
    no_grad,
)

LIMIT = "plain-bare-stopped"
NEAR = "plain-hidden"
WITH_NNSIGHT = find_spec("nnsight") is not None


def _hidden_states(model: Any, tokens: Tensor) -> Tensor:
    states = model(tokens, output_hidden_states=True).hidden_states
    activation: Tensor = states[LAYER + 1]
    return activation


def _hidden_states_of_the_base(model: Any, tokens: Tensor) -> Tensor:
    """Spare the logits, which are the most of the memory."""
    return _hidden_states(model.transformer, tokens)


def _trace(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), model.trace(tokens) as tracer:
        activation: Tensor = model.transformer.h[LAYER].output.save()
        tracer.stop()
    return activation


def _bare_stopped(model: Any, tokens: Tensor) -> None:
    """Run a forward to the end of the layer, and keep nothing."""
    handle = model.transformer.h[LAYER].register_forward_hook(end_forward)
    with torch.no_grad(), suppress(EndForward):
        model(tokens)
    handle.remove()


def _ways() -> list[Way]:
    stop = f"names_filter=name, stop_at_layer={LAYER + 1}"
    cases: list[tuple[str, str, str, Callable[[Any, Tensor], Tensor | None]]] = [
        ("cache", BRIDGE, "`run_with_cache(tokens)`", everything),
        ("cache-nograd", BRIDGE, "the same under `torch.no_grad()`", no_grad(everything)),
        (
            "filter-stop-nograd",
            BRIDGE,
            f"`run_with_cache(tokens, {stop})`, the same",
            no_grad(filtered_stopped),
        ),
        ("bridge", BRIDGE, "**`capture(bridge, name, stop=True)`**", capturing(stop=True)),
        ("hidden", PLAIN, "`model(output_hidden_states=True)`", no_grad(_hidden_states)),
        (
            "hidden-base",
            PLAIN,
            "`model.transformer(output_hidden_states=True)`",
            no_grad(_hidden_states_of_the_base),
        ),
        ("nnsight", NNSIGHT, "nnsight: `trace`, `save`, `stop`", _trace),
        ("capture", PLAIN, "**`capture(model, name)`**", capturing(stop=False)),
        ("capture-stop", PLAIN, "**`capture(model, name, stop=True)`**", capturing(stop=True)),
        ("bare", PLAIN, "bare forward, nothing captured", bare()),
        ("bare-stopped", PLAIN, "bare forward, stopped after the layer: the limit", _bare_stopped),
    ]
    return [
        Way(f"plain-{name}", title, run, LIMIT, model, near=NEAR if model == BRIDGE else "")
        for name, model, title, run in cases
        if model != NNSIGHT or WITH_NNSIGHT
    ]


PLAIN_TABLE = Table(
    "plain",
    f"one {NAME} of a bridge and of the same plain model",
    Setup(tokens=1024),
    tuple(_ways()),
)
