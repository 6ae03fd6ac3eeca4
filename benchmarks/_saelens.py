"""The ways to write one activation of a number of tokens to disk, beside SAELens' own."""

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks._data import ROWS, extract_rows, stopped
from benchmarks._gather import nothing, resid
from benchmarks._models import HOOKED, PLAIN, Setup
from benchmarks._ways import Table, Way

BATCHES = 8
BUFFERS = 4
"""What SAELens keeps before it writes is that part of the whole, so that it collects no more."""


def _runner(model: Any, tokens: Tensor) -> Tensor:
    """Have SAELens' runner write the activations of a tokenized data set."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    rows, context = tokens.shape
    batch = max(1, rows // BATCHES)
    buffer = max(1, rows // batch // BUFFERS) * batch * context * model.cfg.d_model * 4
    with tempfile.TemporaryDirectory() as folder:
        config = CacheActivationsRunnerConfig(
            dataset_path="tokens",
            model_name="gpt2",
            model_batch_size=batch,
            hook_name=resid(model),
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
        data = Dataset.from_dict({"tokens": tokens.tolist()})
        # It loads models by their names; this one is there already.
        with patch("sae_lens.cache_activations_runner.load_model", return_value=model):
            written = CacheActivationsRunner(config, override_dataset=data).run()
        if len(written) != rows:
            raise RuntimeError(f"SAELens collected {len(written)} sequences of {rows}")
        first = written.with_format("torch")[: ROWS // context + 1][resid(model)]
        return torch.as_tensor(first).flatten(0, 1)[:ROWS]


def _extract(model: Any, tokens: Tensor) -> Tensor:
    return extract_rows(model, tokens.chunk(BATCHES), torch.float32)


def _bare_plain(model: Any, tokens: Tensor) -> None:
    stopped(model, tokens, batches=BATCHES)


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
            Way(
                limit,
                "bare forwards of the `HookedTransformer`, stopped at the hook",
                nothing(BATCHES, resid),
                limit,
                HOOKED,
            ),
            Way(
                f"{name}-plain-bare",
                "bare forwards of the plain model, stopped after the layer",
                _bare_plain,
                limit,
                PLAIN,
            ),
        ),
        setup=setup,
        varied={"batches": BATCHES, **varied},
        repeats=1,
        to_disk=True,
        needs=("sae_lens", "lance"),
    )


SAELENS_EXTRACT_TABLE = _table(
    "saelens-extract", "GPT-2 small's shape", Setup(batch=4, tokens=1024)
)
SAELENS_SMALL_TABLE = _table(
    "saelens-small", "d_model 64", Setup(batch=32, tokens=128), d_model=64, heads=4
)
