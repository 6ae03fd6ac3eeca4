"""The ways to gather one activation of many batches."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from actctx import capture
from benchmarks._models import HOOKED, Setup, middle, resid_name
from benchmarks._ways import EndForward, Run, Table, Way, end_forward, hooked

MANY = 64
STORED = 16

Name = Callable[[Any], str]


def _neurons(model: Any) -> str:
    """Name what is gathered: four times as wide, so that a batch of it weighs as a forward."""
    return f"blocks.{middle(model)}.mlp.hook_post"


def resid(model: Any) -> str:
    """Name the residual stream behind the layer that is asked for."""
    return resid_name(middle(model))


def _capture(batches: int, name_of: Name, *, make_room: bool = False) -> Run:
    def run(model: Any, tokens: Tensor) -> Tensor:
        capacity = len(tokens) if make_room else None
        with capture(model, name_of(model), stop=True, capacity=capacity) as acts:
            for batch in tokens.chunk(batches):
                model(batch)
        return acts.tensor

    return run


def _recipe(batches: int) -> Run:
    """Run the recipe that people copy, with forwards that are stopped as those of `capture`."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(_module: object, _args: object, activation: Tensor) -> None:
            kept.append(activation.detach().clone())
            raise EndForward

        with hooked(model.hook_dict[_neurons(model)], keep):
            for batch in tokens.chunk(batches):
                with suppress(EndForward):
                    model(batch)
        return torch.cat(kept)

    return run


def _cache(batches: int) -> Run:
    def run(model: Any, tokens: Tensor) -> Tensor:
        name, kept = _neurons(model), []
        for batch in tokens.chunk(batches):
            with torch.no_grad():
                _, cache = model.run_with_cache(
                    batch, names_filter=name, stop_at_layer=middle(model) + 1
                )
            kept.append(cache[name])
        return torch.cat(kept)

    return run


def nothing(batches: int, name_of: Name) -> Run:
    """Run bare forwards that end at a hook."""

    def run(model: Any, tokens: Tensor) -> None:
        with hooked(model.hook_dict[name_of(model)], end_forward):
            for batch in tokens.chunk(batches):
                with suppress(EndForward):
                    model(batch)

    return run


def _store(batches: int) -> Run:
    """Have SAELens make the batches of a tokenized data set, and run them."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        from datasets import Dataset
        from sae_lens.training.activations_store import ActivationsStore

        batch = max(1, len(tokens) // batches)
        store = ActivationsStore(
            model=model,
            dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
            streaming=False,
            hook_name=resid(model),
            hook_head_index=None,
            context_size=tokens.shape[1],
            d_in=model.cfg.d_model,
            n_batches_in_buffer=batches,
            total_training_tokens=len(tokens),
            store_batch_size_prompts=batch,
            train_batch_size_tokens=batch * tokens.shape[1],
            prepend_bos=False,
            normalize_activations="none",
            device=tokens.device,
            dtype="float32",
        )
        return torch.cat([store.get_raw_llm_batch()[0] for _ in range(len(tokens) // batch)])

    return run


def gather_table(batches: int, **options: Any) -> Table:
    """Compare the ways to gather as many batches."""
    limit = f"gather-{batches}-bare"
    recipe, ours = "a list of clones, and `torch.cat`", "`capture(model, name, stop=True"
    roomy = _capture(batches, _neurons, make_room=True)
    cases = (
        ("cache", "`run_with_cache`, filtered and stopped, and `torch.cat`", _cache(batches), ""),
        ("recipe", recipe, _recipe(batches), "hook and torch.cat"),
        ("capture", f"**{ours})`**", _capture(batches, _neurons), "capture, bridge"),
        (
            "capacity",
            f"**{ours}, capacity=rows)`**",
            roomy,
            "",
        ),
        ("bare", "bare forwards, stopped at the hook", nothing(batches, _neurons), ""),
    )
    return Table(
        title=f"the neurons of a layer of a bridge, {batches} batches",
        ways=tuple(
            Way(f"gather-{batches}-{name}", title, run, limit, label=label)
            for name, title, run, label in cases
        ),
        setup=Setup(tokens=64),
        varied={"batches": batches},
        **options,
    )


GATHER_TABLE = gather_table(MANY, name="gathering", rounds=0)

SAELENS_TABLE = Table(
    "saelens",
    f"one `resid_post` of a `HookedTransformer`, {STORED} batches",
    tuple(
        Way(f"saelens-{name}", title, run, "saelens-bare", HOOKED)
        for name, title, run in (
            ("store", "SAELens: `ActivationsStore`, `torch.cat`", _store(STORED)),
            ("capture", "**`capture(model, name, stop=True)`**", _capture(STORED, resid)),
            ("bare", "bare forwards, stopped at the hook", nothing(STORED, resid)),
        )
    ),
    varied={"batches": STORED},
    repeats=1,
    needs=("sae_lens",),
)
