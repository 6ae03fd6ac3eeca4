"""The ways to get the last position of each step of a generation with a KV cache.

TransformerLens' own way is not included: `generate(return_cache=True)` takes only one sequence.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks.ways.models import BRIDGE, NNSIGHT, PLAIN, block_path, middle, resid_name
from benchmarks.ways.way import Table, Way, bare_way
from benchmarks.ways.work import WORK, bare_hooks

STEPS = 32
LIKELIEST: dict[str, Any] = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    """Generate one token per step, greedily."""
    if hasattr(model, "hook_dict"):
        return model.generate(
            tokens, STEPS, stop_at_eos=False, do_sample=False, return_type="tokens", verbose=False
        )
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **LIKELIEST, **options)


def _trace(model: Any, tokens: Tensor) -> Tensor:
    import nnsight

    module = model._module
    layer = model.get(block_path(module, middle(module)))
    options = {"fn": module.generate, "attention_mask": torch.ones_like(tokens)} | LIKELIEST
    with torch.no_grad(), model.trace(tokens, **options) as tracer:
        kept: list[Tensor] = nnsight.save([])
        for _ in tracer.iter[:STEPS]:
            kept.append(layer.output[:, -1].clone())  # noqa: PERF401  nnsight steps in the loop
    return torch.stack(kept, dim=1)


def _bare(model: Any, tokens: Tensor) -> None:
    generate(model, tokens)


def _capture(model: Any, tokens: Tensor) -> Tensor:
    name = resid_name(middle(model))
    with capture(model, name, slice={"pos": -1}, join=None) as acts:
        generate(model, tokens)
    return torch.stack(acts[name], dim=1)


def _recipe(model: Any, tokens: Tensor) -> Tensor:
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, activation: Tensor) -> None:
        kept.append(activation[:, -1].detach().clone())

    with bare_hooks(WORK["last"], model, keep):
        generate(model, tokens)
    return torch.stack(kept, dim=1)


def _hidden_states(model: Any, tokens: Tensor) -> Tensor:
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    steps = generate(model, tokens, **options).hidden_states
    return torch.stack([states[middle(model) + 1][:, -1] for states in steps], dim=1)


def _ways() -> Iterator[Way]:
    nnsight = "nnsight: `trace(tokens, fn=model.generate)`, `iter`, `save`"
    for kind in (BRIDGE, PLAIN):
        name, limit = f"generate-{kind}", f"generate-{kind}-bare"
        if kind == PLAIN:
            states = "`plain.generate(output_hidden_states=True)`"
            yield Way(f"{name}-hidden", states, _hidden_states, limit, kind)
            yield Way(f"{name}-nnsight", nnsight, _trace, limit, NNSIGHT)
        yield Way(f"{name}-recipe", f"{kind}, the hook recipe", _recipe, limit, kind)
        ours = f"**{kind}, `capture(model, name, slice=-1, join=None)`**"
        yield Way(f"{name}-capture", ours, _capture, limit, kind)
        yield bare_way(limit, f"{kind}, nothing captured: the limit", _bare, limit, kind)


GENERATE_TABLE = Table(
    "generate",
    f"the last position of each step of `generate()`, {STEPS} tokens",
    tuple(_ways()),
)
