"""The ways to write one activation of many batches to disk."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ways.bridge import EndForward, stopped
from benchmarks.ways.models import PLAIN, Setup, middle, resid_name
from benchmarks.ways.way import Run, Table, Way, bare_way

BATCHES = 16
ROWS = 4096
"""The number of first rows that are compared."""


def extract_rows(model: nn.Module, batches: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Extract, and read the first rows back."""
    from actctx.dataset import ActivationDataset
    from actctx.extract import extract

    with tempfile.TemporaryDirectory() as folder:
        path, name = Path(folder) / "acts.lance", resid_name(middle(model))
        extract(model, batches, name, path, dtype=dtype, progress=False)
        found: Tensor = ActivationDataset(path)[:ROWS][name]
        return found


def _extract(model: nn.Module, tokens: Tensor) -> Tensor:
    return extract_rows(model, tokens.chunk(BATCHES), torch.float16)


def _in_memory(model: nn.Module, tokens: Tensor) -> Tensor:
    """Keep everything in memory, and save it at the end."""
    kept: list[Tensor] = []

    def keep(_module: object, _args: object, output: Tensor) -> None:
        kept.append(output.half().flatten(0, 1))
        raise EndForward

    stopped(BATCHES, hook=keep)(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        rows = torch.cat(kept)
        kept.clear()
        torch.save(rows, Path(folder) / "acts.pt")
    return rows[:ROWS].clone()


EXTRACT_TABLE = Table(
    "extract",
    f"one `resid_post` of a plain model, {BATCHES} batches, to disk in float16",
    (
        Way(
            "extract-memory",
            "a list of clones, `torch.cat`, `torch.save`",
            _in_memory,
            "extract-bare",
            PLAIN,
        ),
        Way(
            "extract-lance",
            "**`extract(model, batches, name, path)`**",
            _extract,
            "extract-bare",
            PLAIN,
        ),
        bare_way(
            "extract-bare",
            "bare forwards, stopped after the layer",
            stopped(BATCHES),
            "extract-bare",
            PLAIN,
        ),
    ),
    Setup(tokens=128),
    varied={"batches": BATCHES},
    rounds=3,
    to_disk=True,
    needs=("lance",),
)

FLAT = {"16-thousand": 2, "106-thousand": 13, "1-million": 123, "10-million": 1221}
"""The number of batches of 64 x 128 tokens for about this many tokens."""


def _extract_many(batches: int) -> Run:
    def run(model: Any, tokens: Tensor) -> Tensor:
        return extract_rows(model, (tokens for _ in range(batches)), torch.float16)

    return run


FLAT_TABLE = Table(
    "flat",
    "one `resid_post` of a tiny plain model to disk in float16, ever more tokens",
    (
        *(
            Way(
                f"flat-{many}",
                f"**`extract`**, {many.replace('-', ' ')} tokens",
                _extract_many(batches),
                "flat-bare",
                PLAIN,
            )
            for many, batches in FLAT.items()
        ),
        bare_way(
            "flat-bare",
            "a bare forward, stopped after the layer",
            stopped(),
            "flat-bare",
            PLAIN,
        ),
    ),
    Setup(batch=64, tokens=128, layers=2, heads=2, d_model=64, vocab=1001),
    rounds=0,
    to_disk=True,
    needs=("lance",),
)
