"""The ways to get the last position of each step of a generation with a KV cache."""

from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks._models import BRIDGE, PLAIN, middle, resid_name
from benchmarks._ways import Table, Way
from benchmarks._work import WORK, bare_hooks

STEPS = 32
LAST = WORK["last"]


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    """Generate as many tokens as there are steps, the likeliest ones."""
    if hasattr(model, "hook_dict"):
        return model.generate(
            tokens, STEPS, stop_at_eos=False, do_sample=False, return_type="tokens", verbose=False
        )
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        **options,
    )


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

    with bare_hooks(LAST, model, keep):
        generate(model, tokens)
    return torch.stack(kept, dim=1)


def _hidden_states(model: Any, tokens: Tensor) -> Tensor:
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    steps = generate(model, tokens, **options).hidden_states
    return torch.stack([states[middle(model) + 1][:, -1] for states in steps], dim=1)


GENERATE_TABLE = Table(
    "generate",
    f"the last position of each step of `generate()`, {STEPS} tokens",
    tuple(
        Way(f"generate-{kind}-{name}", title.format(kind), run, f"generate-{kind}-bare", kind)
        for kind in (BRIDGE, PLAIN)
        for name, title, run in (
            ("hidden", "`{}.generate(output_hidden_states=True)`", _hidden_states),
            ("recipe", "{}, the hook recipe", _recipe),
            ("capture", "**{}, `capture(model, name, slice=-1, join=None)`**", _capture),
            ("bare", "{}, nothing captured: the limit", _bare),
        )
        if (kind, name) != (BRIDGE, "hidden")
    ),
    repeats=3,
)
