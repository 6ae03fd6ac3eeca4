"""The ways to write one activation of many batches to disk."""

import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._models import PLAIN, block_path, middle, resid_name
from benchmarks._ways import EndForward, Table, Way, end_forward

BATCHES = 16
ROWS = 4096
"""The first rows, which are compared."""


def stopped(model: nn.Module, tokens: Tensor, *, keep: Any = None, batches: int = BATCHES) -> None:
    """Run bare forwards that a plain hook ends behind the layer."""
    layer = model.get_submodule(block_path(model, middle(model)))

    def end(module: Any, args: Any, output: Any) -> None:
        if keep is not None:
            keep(output)
        end_forward(module, args, output)

    handle = layer.register_forward_hook(end)
    with torch.no_grad():
        for batch in tokens.chunk(batches):
            with suppress(EndForward):
                model(batch)
    handle.remove()


def extract_rows(model: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
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
    """Keep all of it, and save it at the end, as people do who have no data set."""
    kept: list[Tensor] = []
    stopped(model, tokens, keep=lambda output: kept.append(output.half().flatten(0, 1)))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(torch.cat(kept), Path(folder) / "acts.pt")
    return torch.cat(kept)[:ROWS]


EXTRACT_TABLE = Table(
    "extract",
    f"one `resid_post` of a plain model, {BATCHES} batches, to disk in float16",
    tuple(
        Way(f"extract-{name}", title, run, "extract-bare", PLAIN)
        for name, title, run in (
            ("memory", "a list of clones, `torch.cat`, `torch.save`", _in_memory),
            ("lance", "**`extract(model, batches, name, path)`**", _extract),
            ("bare", "bare forwards, stopped after the layer", stopped),
        )
    ),
    varied={"batches": BATCHES},
    repeats=1,
    needs=("lance",),
)
