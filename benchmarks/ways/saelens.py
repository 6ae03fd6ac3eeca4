"""The ways to gather one activation, and to write it to disk, next to SAELens' own."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.ways.bridge import stopped
from benchmarks.ways.extract import ROWS, extract_rows
from benchmarks.ways.gather import RESID, gather
from benchmarks.ways.models import HOOKED, PLAIN, Setup, make_tokens, middle, resid_name
from benchmarks.ways.way import Run, Table, Way, bare_way

STORED = 16
BATCHES = 8
BUFFERS = 4
"""SAELens keeps this part of the whole before it writes, so that it collects nothing more."""


@cache
def _tokenized(setup: Setup) -> Any:
    """Make the tokenized data set that SAELens reads, once and before anything is measured."""
    from datasets import Dataset

    return Dataset.from_dict({"tokens": make_tokens(setup).tolist()})


def _prepare(setup: Setup) -> None:
    _tokenized(Setup(setup.batch * setup.batches, tokens=setup.tokens, vocab=setup.vocab))


def _data_set(model: Any, tokens: Tensor) -> Any:
    rows, context = tokens.shape
    return _tokenized(Setup(rows, tokens=context, vocab=model.cfg.d_vocab))


def _store(batches: int) -> Run:
    """Let SAELens' store make the batches of a tokenized data set, and run them."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        from sae_lens.training.activations_store import ActivationsStore

        batch = max(1, len(tokens) // batches)
        store = ActivationsStore(
            model=model,
            dataset=_data_set(model, tokens),
            streaming=False,
            hook_name=resid_name(middle(model)),
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


def _runner(model: Any, tokens: Tensor) -> Tensor:
    """Let SAELens' runner write the activations of a tokenized data set."""
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    name, (rows, context) = resid_name(middle(model)), tokens.shape
    batch = max(1, rows // BATCHES)
    buffer = max(1, rows // batch // BUFFERS) * batch * context * model.cfg.d_model * 4
    with tempfile.TemporaryDirectory() as folder:
        config = CacheActivationsRunnerConfig(
            dataset_path="tokens",
            model_name="gpt2",
            model_batch_size=batch,
            hook_name=name,
            d_in=model.cfg.d_model,
            training_tokens=rows * context,
            context_size=context,
            new_cached_activations_path=str(Path(folder) / "acts"),
            shuffle=False,
            device=str(tokens.device),
            buffer_size_gb=(buffer + 1) / 1e9,
            prepend_bos=False,
            streaming=False,
        )
        data = _data_set(model, tokens)
        # It loads models by name; this one is already loaded.
        with patch("sae_lens.cache_activations_runner.load_model", return_value=model):
            written = CacheActivationsRunner(config, override_dataset=data).run()
        if len(written) != rows:
            raise RuntimeError(f"SAELens collected {len(written)} sequences of {rows}")
        first = written.with_format("torch")[: ROWS // context + 1][name]
        return torch.as_tensor(first).flatten(0, 1)[:ROWS]


def _extract(model: Any, tokens: Tensor) -> Tensor:
    return extract_rows(model, tokens.chunk(BATCHES), torch.float32)


def _table(name: str, shape: str, setup: Setup, **varied: int) -> Table:
    limit, plain = f"{name}-hooked-bare", f"{name}-plain"
    return Table(
        name,
        f"one `resid_post` of {BATCHES} batches of {shape} to disk, beside SAELens' runner",
        (
            Way(
                f"{name}-runner",
                "SAELens: `CacheActivationsRunner`",
                _runner,
                limit,
                HOOKED,
                near=plain,
                prepare=_prepare,
            ),
            Way(
                f"{name}-hooked",
                "**`extract(model, batches, name, path)`**, the same model",
                _extract,
                limit,
                HOOKED,
                near=plain,
            ),
            Way(plain, "**`extract`**, the plain model", _extract, limit, PLAIN),
            bare_way(
                limit,
                "bare forwards of the `HookedTransformer`, stopped at the hook",
                stopped(BATCHES),
                limit,
                HOOKED,
            ),
            bare_way(
                f"{name}-plain-bare",
                "bare forwards of the plain model, stopped after the layer",
                stopped(BATCHES),
                limit,
                PLAIN,
            ),
        ),
        setup=setup,
        varied={"batches": BATCHES, **varied},
        to_disk=True,
        needs=("sae_lens", "lance"),
    )


SAELENS_TABLE = Table(
    "saelens",
    f"one `resid_post` of a `HookedTransformer`, {STORED} batches",
    (
        Way(
            "saelens-store",
            "SAELens: `ActivationsStore`, `torch.cat`",
            _store(STORED),
            "saelens-bare",
            HOOKED,
            prepare=_prepare,
        ),
        Way(
            "saelens-capture",
            "**`capture(model, name, stop=True)`**",
            gather(RESID, STORED),
            "saelens-bare",
            HOOKED,
        ),
        bare_way(
            "saelens-bare",
            "bare forwards, stopped at the hook",
            stopped(STORED),
            "saelens-bare",
            HOOKED,
        ),
    ),
    varied={"batches": STORED},
    needs=("sae_lens",),
)
SAELENS_EXTRACT_TABLE = _table(
    "saelens-extract", "GPT-2 small's shape", Setup(batch=4, tokens=1024)
)
SAELENS_SMALL_TABLE = _table(
    "saelens-small", "d_model 64", Setup(batch=32, tokens=128), d_model=64, heads=4
)
